"""A checkpoint or a bundle, opened for measuring: one interface for both.

A folder with a manifest.json is a bundle and runs through `runtime`; any other is a checkpoint and runs in PyTorch. Both
end in a `runtime.backend.Backend`, so whatever is measured above it is measured by the same lines.

`--device` is where PyTorch computes; of a bundle it narrows down the engines: cuda insists on ONNX Runtime's on the GPU, cpu on
those of the CPU, auto leaves the choice to runtime/backends.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from models.formats.chat import chat_encoder, special_ids, special_tokens, tokenizer_facts
from models.checkpoint import CPU, SPARE, load_decoder, open_checkpoint
from models.device import computing_on, free_bytes, smaller
from models.formats.teacher_cache import is_cache, shared_vocabulary
from models.judging import on_device
from models.judging.ngram import NgramBackend
from models.network.decoder import tensor_shapes
from models.network.torch_backend import TorchBackend
from models.ngram import is_ngram, load_ngram
from models.progress import progress as shown
from runtime import decode, reply
from runtime.backend import Backend
from runtime.backends import open_backend
from runtime.bundle import MANIFEST, open_bundle
from runtime.chat_tokens import ChatEncoder, bundle_encoder
from runtime.errors import UserError
from runtime.likelihood import score_tails, shares
from runtime.machine import cpu_threads
from runtime.sampling import Sampler, SamplingOptions
from runtime.solving import mean
from runtime.task import Task
from runtime.text import ReplyText, Tokenizer

NGRAM_CONTEXT = 1 << 16                   # tokens of a prompt and its reply, of which n-grams see the last few
BATCH, BATCH_THERE = 8, 64                # prompts decoded together, here and on a device where there is room


@dataclass
class LanguageModel:
    folder: Path
    backend: Backend
    tokenizer: Tokenizer
    context: int                     # most tokens of prompt and reply
    eos: frozenset[int]              # ids that end a reply
    vocab_size: int                  # rows of its table: the tokenizer's tokens, and perhaps more
    special_tokens: dict[str, str]   # as templates know them
    open_chat: Callable[[], ChatEncoder | None]

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """int64 ids [n], n >= 1 (ids pass through). Raises UserError for an empty prompt or one as long as the context."""
        ids = prompt if isinstance(prompt, np.ndarray) else self.tokenizer.encode(prompt)
        if not 1 <= len(ids) < self.context:
            raise UserError(f"a prompt has {len(ids)} tokens; {self.folder.name} takes 1 to {self.context - 1}: "
                            "use fewer shots or shorter examples")
        return ids

    def chat_prompt(self, text: str) -> np.ndarray:
        """int64 ids of one user message in the model's chat template, or of the text itself where it has none."""
        if self.chat is None:
            return self.tokenizer.encode(text + "\n")
        return self.chat.tokens([{"role": "user", "content": text}])

    @cached_property
    def chat(self) -> ChatEncoder | None:
        """The chat template with the tokenizer; None: there is none."""
        return self.open_chat()

    def special_id(self, name: str) -> int | None:
        """The id of the tokenizer's "bos_token", "eos_token", ...; None where it has none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.tokenizer.token_id(text)

    def generate(self, prompts: Items[str | np.ndarray], max_new_tokens: int, stop: Items[str] = (), *,
                 sampling: SamplingOptions = SamplingOptions(), label: str = "generating",
                 progress: bool = True) -> list[reply.Reply]:
        """Replies, cut at the first stop string and at the context's end. Similar lengths are decoded together."""
        drafts = []
        for number, ids in enumerate(map(self.encode, prompts)):
            limit = min(max_new_tokens, self.context - len(ids))
            sequence = decode.Sequence(ids, Sampler(sampling, ids, number), limit, self.eos)
            drafts.append(reply.Draft(sequence, ReplyText(self.tokenizer, tuple(stop))))
        waiting = sorted(drafts, key=lambda draft: len(draft.sequence.prompt))
        rows = BATCH_THERE if on_device.computes_there(self.backend) else BATCH
        with shown(total=len(drafts), label=label, unit="prompt", quiet=not progress) as bar:
            def some(rows: int) -> None:
                for draft, _ in reply.run(self.backend, [draft for draft in waiting if not draft.sequence.finish_reason][:rows]):
                    bar.update(draft.sequence.finish_reason is not None)
            while waiting:
                _, rows = smaller(rows, some)                 # of what has no more room, begun replies go on
                waiting = [draft for draft in waiting if not draft.sequence.finish_reason]
        return [draft.reply for draft in drafts]

    def likelihoods(self, task: Task, record: Mapping) -> dict[str, float]:
        """Of each label of the task its probability among them, as the answer to a record."""
        tails = [task.tail(record, words, self.tokenizer, self.chat) for words in task.labels.values()]
        scores = self.score_tails(self.encode(task.prompt(record, self.tokenizer, self.chat)), tails)
        return dict(zip(task.labels, map(float, shares([score for score, _ in scores]))))

    def answer(self, task: Task, record: Mapping) -> str:
        """The likeliest label of the task, or the mean of those that are numbers."""
        likely = self.likelihoods(task, record)
        return f"{mean(likely):.6g}" if task.answer == "number" else max(likely, key=likely.get)

    def score_tails(self, ids: np.ndarray, tails: Items[np.ndarray]) -> list[tuple[float, bool]]:
        """ln p(tail | ids) of each tail (int64 [n], n >= 1), and whether greedy decoding would write it."""
        there = {"after": on_device.continuation} if on_device.computes_there(self.backend) else {}
        return score_tails(self.backend, ids, tails, **there)


@contextmanager
def judging_on(asked: str, *folders: Path) -> Iterator[Callable[..., LanguageModel]]:
    """`open_model` for these folders, on what --device asked for, whose failures are told as sentences (models/device.py). A checkpoint
    leaves room there for those that are opened after it."""
    waiting = [folder for folder in folders if not ((folder / MANIFEST).is_file() or is_cache(folder) or is_ngram(folder))]
    with computing_on(asked if waiting else "cpu") as device:
        def opened(folder: Path, **how) -> LanguageModel:
            if folder in waiting:
                waiting.remove(folder)
            return open_model(folder, device=device, asked=asked, spare=spare_for(device, *waiting), **how)
        yield opened


def spare_for(device: torch.device, *folders: Path) -> int:
    """Bytes to leave free on a device for these checkpoints in float32, but not more than their share of what is free."""
    free = None if device == CPU or not folders else free_bytes(device)
    if free is None:
        return SPARE
    needed = sum(4 * math.prod(shape) for folder in folders for shape in tensor_shapes(open_checkpoint(folder).config).values())
    return SPARE + min(needed, free * len(folders) // (len(folders) + 1))


def open_model(folder: Path | str, *, device: torch.device = CPU, asked: str = "auto", spare: int = SPARE, threads: int | None = None,
               graph: str | None = None, exact: bool = False, provider: str | None = None) -> LanguageModel:
    """Open a checkpoint, which computes on `device`, n-grams (models/ngram.py), or a bundle.

    A bundle runs as an app would run it (runtime/backends.py; `provider` insists on one of its engines, `asked` is what --device said),
    or, where `graph` or `exact` is given, in that graph on ONNX Runtime's CPU (runtime/ort_backend.py).
    Raises UserError where the folder is neither, or its tokenizer is missing.
    """
    folder = Path(folder)
    threads = cpu_threads(threads)
    if (folder / MANIFEST).is_file():
        bundle = open_bundle(folder)
        if (graph or exact) and provider not in (None, "cpu"):
            raise UserError(f"--graph and --exact are ONNX Runtime's on the CPU; leave out --provider {provider}")
        provider, below = _engine(asked, "cpu" if graph or exact else provider)
        backend, _ = open_backend(bundle, provider, threads, below, cpu={"exact": exact, "role": graph})
        model, tokenizer = bundle.model, Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
        return LanguageModel(folder, backend, tokenizer, bundle.max_context, frozenset(model["eos_token_ids"]),
                             model["config"]["vocab_size"], model.get("special_tokens") or {},
                             partial(bundle_encoder, bundle, tokenizer))
    if graph or exact or provider:
        raise UserError(f"{folder}: is no bundle; only a bundle has graphs and engines to choose from")
    if is_ngram(folder):
        ngrams, tokenizer = load_ngram(folder), Tokenizer(folder / "tokenizer.json")
        return LanguageModel(folder, NgramBackend(ngrams), tokenizer, NGRAM_CONTEXT, frozenset({tokenizer_facts(folder)[0]}), ngrams.vocab_size,
                             special_tokens(folder), partial(chat_encoder, folder, tokenizer))
    config = open_checkpoint(folder).config
    torch.set_num_threads(threads)
    backend, tokenizer = TorchBackend(load_decoder(folder, device=device, spare=spare)), Tokenizer(folder / "tokenizer.json")
    return LanguageModel(folder, backend, tokenizer, config.context_length,
                         frozenset(special_ids(config, folder)["eos_token_ids"]), config.vocab_size,
                         special_tokens(folder), partial(chat_encoder, folder, tokenizer))


def _engine(asked: str, provider: str | None) -> tuple[str | None, str | None]:
    """What --device means for a bundle: the provider to insist on, or that below which to look."""
    if asked == "auto":
        return provider, None
    if (asked == "cpu") != (provider in ("native", "cpu")) and provider:
        raise UserError(f"--device {asked} and an engine of the {'CPU' if asked != 'cpu' else 'GPU'} (--provider {provider}"
                        f"{', or --graph or --exact' * (provider == 'cpu')}) are both asked for; leave out one of them")
    if asked == "cpu":
        return provider, None if provider else "cuda"
    if asked not in ("cuda", "cuda:0"):
        raise UserError(f"--device {asked}: a bundle runs on the first GPU; make it that with CUDA_VISIBLE_DEVICES={asked[5:]} and --device cuda")
    return provider or "cuda", None


def check_same_tokenizer(model: LanguageModel, reference: LanguageModel) -> int | None:
    """Raises UserError unless both give every token the same id: their distributions could not be compared.

    Returns how many tokens they share where one's table is padded to another size (models/formats/teacher_cache.py),
    else None.
    """
    if model.tokenizer.vocabulary() != reference.tokenizer.vocabulary():
        raise UserError(f"{reference.folder}: has another tokenizer than {model.folder}; a reference must share the vocabulary")
    return shared_vocabulary(model.folder, model.vocab_size, reference.vocab_size)
