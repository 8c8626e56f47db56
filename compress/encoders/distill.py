"""Distill an encoder: `python -m compress.distill --teacher ENCODER --layers 3 --data FILES -o OUT`.

The student is the teacher with some of its layers, spread evenly (or any encoder with the same tokenizer and head, --student), and learns
to answer as the teacher does on the texts of --data, whatever their labels (two texts as a pair, where it judges pairs):
KL(teacher || student) of labels, squared error of numbers, 1 - cosine of embeddings. --hidden-weight adds the squared error of hidden
states, --attention-weight of attention probabilities: student layer i of S against teacher layer (i + 1) L / S (Jiao et al. 2020,
"TinyBERT"). Dropout is off. OUT is a run's folder as in models.train.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from compress.encoders.layers import layers_of, with_layers
from compress.encoders.text import encoded_texts
from models.checkpoint import check_output
from models.data.corpus import IGNORE
from models.encoders.finetune import rows_at_once
from models.encoders.network import embedding, load, pooled_by, read_quantized, save, takes_types, task_of
from models.formats import lineage
from models.training.placement import process_state
from models.training.trainer import Trainer
from runtime.encoder import Encoded, padded
from runtime.errors import UserError

SHARE = 0.1                              # of the texts, judged on


class Texts:
    """Texts as the trainer's rows: (input_ids, labels, mask, types); one label a text, which nobody reads."""

    def __init__(self, encoded: list[Encoded], pad: int):
        self.encoded, self.pad, self.lengths = encoded, pad, np.array(list(map(len, encoded)))

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, mask, types = padded([self.encoded[i] for i in indices], self.pad)
        labels = np.full_like(ids, IGNORE)
        labels[:, 0] = 0
        return ids, labels, mask, types


class EncoderDistiller(nn.Module):
    """The student in training; its forward pass is the summed loss over texts."""

    def __init__(self, student, teacher, task: str, pooling: str | None, hidden: float, attention: float):
        super().__init__()
        self.student, self.task, self.pooling, self.hidden, self.attention = student, task, pooling, hidden, attention
        self.asked = [teacher.eval().requires_grad_(False)]            # in a list: no part of what is trained
        count, total = len(layers_of(student)), len(layers_of(teacher))
        self.map = [(number + 1, round((number + 1) * total / count)) for number in range(count)]

    def forward(self, ids, labels, mask, types) -> torch.Tensor:
        more = {"output_hidden_states": self.hidden > 0 or self.pooling is not None, "output_attentions": self.attention > 0}
        with torch.no_grad():
            theirs = self._ask(self.asked[0], ids, mask, types, more)
        ours = self._ask(self.student, ids, mask, types, more)
        real = mask.float()
        loss = self.answers(ours, theirs, mask)
        if self.hidden:
            error = sum(((ours.hidden_states[a] - theirs.hidden_states[b]).square().mean(-1) * real).sum(1) / real.sum(1) for a, b in self.map)
            loss = loss + self.hidden * error.sum() / len(self.map)
        if self.attention:
            pairs = real[:, :, None] * real[:, None, :]
            error = sum(((ours.attentions[a - 1] - theirs.attentions[b - 1]).square().mean(1) * pairs).sum((1, 2)) / real.sum(1)
                        for a, b in self.map)
            loss = loss + self.attention * error.sum() / len(self.map)
        return loss

    @staticmethod
    def _ask(model, ids, mask, types, more):
        return model(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if takes_types(model) else {}), **more)

    def answers(self, ours, theirs, mask) -> torch.Tensor:
        if self.pooling is not None:
            a, b = (embedding(one.last_hidden_state, mask, self.pooling) for one in (ours, theirs))
            return (1 - (a * b).sum(1)).sum()
        if ours.logits.shape[-1] == 1:
            return (ours.logits - theirs.logits).square().sum()
        kl = F.kl_div(ours.logits.log_softmax(-1), theirs.logits.softmax(-1), reduction="none").sum(-1)
        return (kl * mask / mask.sum(1, keepdim=True)).sum() if kl.dim() > 1 else kl.sum()


def distill_encoder(options) -> None:
    """Read, train, report; options: compress.distill's. Raises UserError, CheckFailed at a loss not finite."""
    folder = options.teacher
    for wrong, words in ((options.preset is not None, "--preset makes decoders: give --layers or --student"),
                         (options.label_share or options.on_policy, "--label-share and --on-policy are for decoders, which learn from text itself"),
                         (options.temperature != 1 or options.loss != "forward", "--loss and --temperature are for decoders")):
        if wrong:
            raise UserError(f"{folder} is an encoder; {words}")
    if read_quantized(folder) is not None:
        raise UserError(f"{folder} is quantized: let the checkpoint teach that it was made from")
    task = task_of(folder)
    if task not in ("sentence-similarity", "text-classification", "token-classification"):
        raise UserError(f"{folder} is a model for {task}, of whose answers there is no loss: fine-tune it on a task first")
    source = options.student or folder
    check_output(options.out / "last", source)
    attention = "eager" if options.attention_weight else "sdpa"
    teacher, student = load(folder, task, attention=attention), load(source, task, attention=attention)
    if (student.config.vocab_size, student.config.hidden_size) != (teacher.config.vocab_size, teacher.config.hidden_size) \
            or getattr(student.config, "id2label", None) != getattr(teacher.config, "id2label", None):
        raise UserError(f"{source} has another vocabulary, hidden size or labels than {folder}: give a student of the teacher's")
    if options.layers is not None:
        total = len(layers_of(student))
        if not 1 <= options.layers <= total:
            raise UserError(f"--layers is {options.layers}, which should be from 1 to {total}")
        student = with_layers(student, np.linspace(0, total - 1, options.layers).round().astype(int).tolist())
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("pooler" not in name or task == "text-classification")
    def read(names, count):
        return encoded_texts(source, student.config, options, names, count, options.context)
    texts = read(options.data, None)
    held = read(options.valid, options.eval_rows) if options.valid else texts[::round(1 / SHARE)]
    learned = texts if options.valid else [one for number, one in enumerate(texts) if number % round(1 / SHARE)]
    if not learned or not held:
        raise UserError(f"{options.data[0]}: {len(texts)} texts are too few to learn from and to judge on: give more")
    rows = [Texts(part, student.config.pad_token_id or 0) for part in (learned, held)]
    options = options.filled(learning_rate=1e-4, warmup=options.steps // 20,
                             micro_batch=rows_at_once(options.batch, process_state(options.device).device))
    pooling = pooled_by(folder) if task == "sentence-similarity" else None
    distiller = EncoderDistiller(student, teacher, task, pooling, options.hidden_weight, options.attention_weight)
    trainer = Trainer(distiller, options, *rows, partial(_save, options, source, pooling), {}, loss=lambda model, *given: model(*given),
                      judge=lambda model, *given: {"loss": model(*given)}, pack=tuple)
    distiller.asked[0].to(trainer.accelerator.device)
    print(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.1f}M parameters in {len(layers_of(student))} layers; {len(learned)} texts to "
          f"learn from, {len(held)} to judge on; {options.steps} steps of {options.batch}")
    metrics = trainer.fit()
    print(f"{options.out / 'last'}: distance from the teacher {trainer.first_loss:.4f} before, {metrics['valid_loss']:.4f} after {trainer.step} steps"
          if trainer.first_loss is not None else f"{options.out / 'last'}: distance from the teacher {metrics['valid_loss']:.4f}")


def _save(options, source, pooling: str | None, distiller: EncoderDistiller, folder, metrics: dict) -> None:
    save(folder, distiller.student, source, lineage.stage("compress.distill", options, {}, metrics, options.seed), pooling)
