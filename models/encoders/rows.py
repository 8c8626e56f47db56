"""Examples of an encoder as rows for the trainer (models/training/trainer.py), and the losses of each task.

A row is (input_ids, labels, mask, types, target): int64 [r, s] and float32 [r], and of a similarity the second text's ids, mask and
types too. Labels stand at the first token (a class, or 0 where the target counts), or of ner at the first token of each word.

Losses are sums over labels: cross-entropy; squared error; and for similarity, where pairs have several scores, CoSENT: the log of 1 + the sum of
exp(20 (cos of the pair that should be less alike - cos of the more alike)) over all such two pairs of the batch; where all have the same,
the second texts of the other pairs are wrong answers to the first (in-batch negatives, Henderson et al. 2017), cosines times 20.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.data.corpus import IGNORE
from models.encoders.network import embedding
from models.tasks.examples import Example
from runtime.encoder import TextEncoder, padded
from runtime.entities import word_starts
from runtime.errors import UserError

SCALE = 20.0                             # of cosines, as sentence-transformers has it


class EncoderRows:
    """Examples of one task. labels: names of classes or tags, in the order of the head's outputs. cut: how many did not fit."""

    def __init__(self, examples: list[Example], task: str, encode: TextEncoder, labels: list[str], pad: int):
        self.task, self.pad = task, pad
        self.first, self.second, self.targets, self.labels, self.cut = [], [], [], [], 0
        known = {name: number for number, name in enumerate(labels)}
        for one in examples:
            texts = asked(one) if task == "similarity" else (asked(one),)
            encoded = [encode(text) for text in texts]
            self.cut += any(part.cut for part in encoded)
            self.first.append(encoded[0])
            self.second.append(encoded[-1])
            number = task in ("regress", "similarity")
            self.targets.append(float(one.answers[0]) if number else 0.0)
            for tag in one.fields["tags"] if task == "ner" else () if number else one.answers[:1]:
                if tag not in known:
                    raise UserError(f"{one.place}: label {tag!r} was never seen; known are {', '.join(known)}. Mend the file, or train on "
                                    "examples of it too")
            labels_of_row = np.full(len(encoded[0]), IGNORE, np.int64)
            if task == "ner":
                for token, tag in tags_of_words(one, encoded[0].offsets, len(encode.before)):
                    labels_of_row[token] = known[tag]
            else:
                labels_of_row[0] = 0 if number else known[one.answers[0]]
            self.labels.append(labels_of_row)
        self.graded = len(set(self.targets)) > 1
        self.lengths = np.array([max(len(a), len(b)) for a, b in zip(self.first, self.second)])
        self.context = int(self.lengths.max())

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, mask, types = padded([self.first[i] for i in indices], self.pad)
        labels = np.full_like(ids, IGNORE)
        for row, i in enumerate(indices):
            labels[row, :len(self.labels[i])] = self.labels[i]
        target = np.array([self.targets[i] for i in indices], np.float32)
        more = padded([self.second[i] for i in indices], self.pad) if self.task == "similarity" else ()
        return ids, labels, mask, types, target, *more


def tags_of_words(one: Example, offsets: np.ndarray, before: int) -> list[tuple[int, str]]:
    """(token, tag) of the first token of every word (runtime/entities.py) of an example of ner: the tag of the example's own word in
    which it stands, an I where that is not its beginning."""
    text, tags = one.fields["text"], one.fields["tags"]
    starts = np.cumsum([0, *(len(word) + 1 for word in one.fields["tokens"])])
    inner = [tuple(place) for place in offsets[before:].tolist() if place != [0, 0] or before == 0]
    found = []
    for token in word_starts(text, inner):
        place = inner[token][0] + len(text[slice(*inner[token])]) - len(text[slice(*inner[token])].lstrip())
        word = int(np.searchsorted(starts, place, side="right")) - 1
        tag = tags[word]
        found.append((before + token, tag if place == starts[word] or tag == "O" else f"I-{tag[2:]}"))
    return found


def asked(one: Example) -> str | tuple[str, str]:
    """What an example asks of: its text, or its pair of texts."""
    fields = one.fields
    return (fields["text"], fields["text2"]) if "text2" in fields else fields["text"]


def losses(task: str, takes_types: bool, pooling: str | None, graded: bool):
    """(loss, judge) for the trainer. graded: pairs of a similarity have several scores."""
    def ask(model, ids, mask, types):
        return model(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if takes_types else {}))

    def loss(model, ids, labels, mask, types, target, *second):
        if task == "similarity":
            a = embedding(ask(model, ids, mask, types).last_hidden_state, mask, pooling)
            b = embedding(ask(model, *second).last_hidden_state, second[1], pooling)
            return (cosent((a * b).sum(1), target) if graded else in_batch(a, b)) * len(ids)
        logits = ask(model, ids, mask, types).logits.float()
        if task == "regress":
            return (logits[:, 0] - target).square().sum()
        if task == "ner":
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum")
        return F.cross_entropy(logits, labels[:, 0], reduction="sum")

    return loss, lambda model, *rows: {"loss": loss(model, *rows)}


def cosent(cosines: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """CoSENT of pairs with these cosines [n] and scores [n], as sentence-transformers' CoSENTLoss."""
    apart = SCALE * (cosines[:, None] - cosines[None, :])
    apart = torch.where(scores[:, None] < scores[None, :], apart, torch.full_like(apart, -1e12)).flatten()
    return torch.logsumexp(torch.cat([apart.new_zeros(1), apart]), 0)


def in_batch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean loss of a's rows [n, h], whose answers are b's rows at the same place among all of b's; all normalized."""
    return F.cross_entropy(SCALE * a @ b.T, torch.arange(len(a), device=a.device))
