"""Text with what a teacher says about it, and the run in which a student learns it: what distill and recover share.

    left, held = set_apart(len(blocks), options.eval_rows)
    train, valid = (taught(blocks, chosen, options, shared) for chosen in (left, held))
    fit(trainer_of(distiller, options, train, valid, save, inputs))
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate import PartialState

from compress.distilling.chunked_loss import FAR_LOGITS
from compress.distilling.distiller import Distiller, labelled_tokens
from compress.teacher import build_cache, write
from models.data.corpus import IGNORE
from models.checkpoint import Checkpoint
from models.formats.teacher_cache import TeacherCache, tokenizer_digest, tokenizer_size
from models.network.decoder import Decoder
from models.training.feed import Rows
from models.training.memory import rows_at_once
from models.training.placement import process_state
from models.training.trainer import Trainer
from runtime.errors import UserError

MICRO_TOKENS = 2048              # of a micro-batch, by default on a CPU
LOSS_COPIES = 6                  # of a part's logits that a divergence holds at once


class Windows:
    """Windows of tokens as a trainer reads them: ids int64 [windows, tokens], labels the tokens that follow."""

    lengths = None

    def __init__(self, ids: torch.Tensor):
        self.ids = ids.numpy()
        self.labels = np.concatenate((self.ids[:, 1:], np.full_like(self.ids[:, :1], IGNORE)), 1)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[indices], self.labels[indices]


class Taught:
    """Blocks `chosen` of a text with what a cache says about them, or without."""

    lengths = None

    def __init__(self, blocks: Rows, chosen: np.ndarray, cache: TeacherCache | None = None):
        self.blocks, self.chosen, self.cache = blocks, chosen, cache

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """(input_ids, labels) [r, s], and of a cache index int64 and log-probabilities [r, s, k], others [r, s] float32."""
        rows = self.blocks.rows(self.chosen[indices])
        if self.cache is None:
            return rows
        return *rows, self.cache.indices[indices].astype(np.int64), *(
            part[indices].astype(np.float32) for part in (self.cache.log_probabilities, self.cache.others))


class OnPolicy:
    """Rows of `blocks`, some continued by the student and scored by the teacher (Agarwal et al. 2024, "GKD").

    With probability `share` a micro-batch keeps the first `prompt` tokens of each block (None: what precedes the first label, as of
    a task's rows, whose answers differ in length) and the student writes the rest, or as many tokens as have labels, at
    temperature 1; the loss counts on what it wrote, and no gradient passes through the choice of tokens. A student that only
    ever reads others' text never learns to go on from its own mistakes. Chance is drawn from the seed, the step and the rows,
    so a resumed run writes the same. `trainer()` asks for the rows, and knows the step and the precision.
    """

    lengths, fresh = None, True          # fresh: not to be made before the weights are

    def __init__(self, blocks: Rows, student: Decoder, share: float, prompt: int | None, seed: int,
                 trainer: Callable[[], Trainer], vocabulary: int | None = None):
        self.blocks, self.student, self.share, self.prompt = blocks, student, share, prompt
        self.seed, self.trainer, self.vocabulary = seed, trainer, vocabulary

    def __len__(self) -> int:
        return len(self.blocks)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        input_ids, labels = self.blocks.rows(indices)
        chance = np.random.default_rng((self.seed, self.trainer().step, *map(int, indices)))
        if chance.random() >= self.share:
            return input_ids, labels
        device = self.student.model.embed_tokens.weight.device
        generator = torch.Generator().manual_seed(int(chance.integers(2**62)))
        if self.prompt is None:
            for row in range(len(input_ids)):
                self._answer(input_ids[row], labels[row], device, generator)
            return input_ids, labels
        with self.trainer().accelerator.autocast():
            written = write(self.student, torch.from_numpy(input_ids[:, :self.prompt]).to(device),
                            input_ids.shape[1] + 1 - self.prompt, generator, self.vocabulary).cpu().numpy()
        labels = np.concatenate((np.full_like(labels[:, 1:self.prompt], IGNORE), written), 1)
        return np.concatenate((input_ids[:, :self.prompt], written[:, :-1]), 1), labels


    def _answer(self, ids: np.ndarray, labels: np.ndarray, device: torch.device, generator: torch.Generator) -> None:
        """Put into a row [s] and its labels what the student writes in the place of the answer."""
        places = np.flatnonzero(labels != IGNORE)
        first, count = int(places[0]), len(places)
        with self.trainer().accelerator.autocast():
            written = write(self.student, torch.from_numpy(ids[None, :first + 1]).to(device), count, generator, self.vocabulary)[0].cpu().numpy()
        labels[first:first + count], ids[first + 1:first + count] = written, written[:-1]


class Padded:
    """Rows of one length, (ids, learned) of a task's examples; what is longer is cut, and has no loss where nothing of its answer is left."""

    lengths = None

    def __init__(self, encoded: list, context: int, pad: int):
        self.encoded, self.context, self.pad = [one for one in encoded if one[1][1:context + 1].any()], context, pad

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        input_ids = np.full((len(indices), self.context), self.pad, np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for row, index in enumerate(indices):
            ids, learned = (part[:self.context + 1] for part in self.encoded[index])
            input_ids[row, :len(ids) - 1] = ids[:-1]
            labels[row, :len(ids) - 1] = np.where(learned[1:], ids[1:], IGNORE)
        return input_ids, labels


def taught(blocks: Rows, chosen: np.ndarray, options, shared: int | None) -> Taught:
    """Blocks `chosen` with the predictions of options.teacher among its first `shared` tokens (None: all)."""
    ids = torch.from_numpy(blocks.rows(chosen)[0])
    return Taught(blocks, chosen, build_cache(options.teacher, ids, options.teacher_cache.expanduser(), options.top, vocabulary=shared,
                                              device=process_state(options.device).device))


def spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the indices, spread evenly."""
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)]


def set_apart(count: int, judged: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` blocks to learn from, and which, at most a tenth of them, to judge on."""
    held = spread(np.arange(count), min(judged, max(1, count // 10)))
    return np.setdiff1d(np.arange(count), held), held


def check_tokenizers(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises UserError where the two have not one tokenizer."""
    if tokenizer_digest(student.path) != tokenizer_digest(teacher.path):
        raise UserError(f"teacher and student vocabularies differ ({teacher.path} has {tokenizer_size(teacher.path)} tokens, "
                        f"{student.path} {tokenizer_size(student.path)}): both must share one tokenizer")


def with_defaults(options, tokens: int, student: Decoder, state: PartialState, beside: int = 0):
    """Options of a trainer on rows of `tokens`, their micro-batch and warm-up filled in.

    beside: bytes on the device of what is not the student's parameters: a teacher, codes.
    """
    share, few = max(1, options.batch // state.num_processes), max(1, MICRO_TOKENS // tokens)
    beside += LOSS_COPIES * 4 * FAR_LOGITS                       # of all labels' logits a loss holds some at a time
    micro = options.micro_batch or rows_at_once(student, student.config, share, tokens, 0, options.checkpointing, state.device, few, beside)
    return replace(options, micro_batch=micro, warmup=options.steps // 20 if options.warmup is None else options.warmup)


def trainer_of(distiller: Distiller, options, train: Rows, valid: Rows, save, inputs: dict[str, str], **how) -> Trainer:
    return Trainer(distiller, options, train, valid, save, inputs, loss=lambda module, *rows: module(*rows),
                   judge=lambda module, *rows: module.judge(*rows), pack=labelled_tokens, **how)


def fit(trainer: Trainer) -> None:
    """Train to the end, and print what came of it."""
    metrics, out = trainer.fit(), trainer.options.out
    if "valid_top1" not in metrics:                              # resumed where it was finished
        metrics = {f"valid_{name}": mean for name, mean in trainer.validate().items()}
    print(f"{out / 'last'}: step {trainer.step}, KL {metrics['valid_loss']:.4f} nats a token, top-1 agreement "
          f"{metrics['valid_top1']:.1%} on held-out text; lowest KL {trainer.best:.4f} in {out / 'best'}")
