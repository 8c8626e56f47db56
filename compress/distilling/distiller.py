"""The student in training, and what it learns from: one module whose forward pass is the loss.

    distiller = Distiller(student, teacher, losses)        # teacher: a Decoder, or None where a cache stands for it
    rows = labelled_tokens((input_ids, labels, index, log_probabilities, others))      # on the host; those three with a cache
    total = distiller(*rows on the device)                                             # sum over the labelled tokens

The loss of a token is (1 - label_share) D(teacher, student) + label_share * -ln q(label) + hidden_weight * hidden +
attention_weight * attention, the divergence D over the whole vocabulary with a live teacher, and over the cached top-k
and "any other" with a cache (divergence.py, chunked_loss.py, matching.py). A temperature T divides both sides' logits,
and D is multiplied by T^2, so that its gradient keeps its size (Hinton et al. 2015). Where one's table is padded to
another size than the other's, D is over the `shared` first tokens, and what the student gives to the others goes to 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.distilling.chunked_loss import chunked_loss, chunks, tokens_at_once, top_events
from compress.distilling.divergence import Divergence, kl, mass_beyond
from compress.distilling.matching import attention_loss, attention_modules, hidden_loss, hidden_maps, hidden_modules, watched
from models.data.corpus import IGNORE
from models.network.decoder import Decoder, for_products


def labelled_tokens(rows: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """(input_ids [b, s], labels [b, s], ...) as (input_ids, places, labels, ...): of the n tokens with a label alone, places int64
    [n] in the rows one after the other. Told by the host, because it would wait for a device that has to count them."""
    input_ids, *others = rows
    places = np.flatnonzero(others[0] != IGNORE)
    return input_ids, places, *(part.reshape(-1, *part.shape[2:])[places] for part in others)


@dataclass(frozen=True)
class Losses:
    divergence: Divergence
    temperature: float = 1.0
    label_share: float = 0.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0


class Distiller(nn.Module):
    """Holds the student and the maps of hidden states; the teacher is no part of it: neither trained nor saved."""

    def __init__(self, student: Decoder, teacher: Decoder | None, losses: Losses, shared: int | None = None):
        super().__init__()
        self.student, self.losses, self.shared = student, losses, shared
        self._live = (teacher,)
        self.maps = hidden_maps(student.config, teacher.config) if losses.hidden_weight else nn.ModuleList()

    @property
    def teacher(self) -> Decoder | None:
        return self._live[0]

    def forward(self, input_ids: Tensor, places: Tensor, labels: Tensor, index: Tensor | None = None,
                log_probabilities: Tensor | None = None, others: Tensor | None = None) -> Tensor:
        """Sum of the loss over labelled tokens, nats. input_ids int64 [b, s]; places, labels int64 [n] (`labelled_tokens`).

        With a cache: index int64 and log_probabilities [n, k], others [n], as in models/formats/teacher_cache.py.
        """
        pairs = ([], [])                            # modules of student and teacher whose outputs are matched
        if self.losses.hidden_weight:
            pairs = hidden_modules(self.student, self.teacher)
        if self.losses.attention_weight:
            pairs = pairs[0] + attention_modules(self.student), pairs[1] + attention_modules(self.teacher)
        with watched(pairs[0]) as ours, watched(pairs[1]) as theirs:
            hidden, taught = self.student.model(input_ids), None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = for_products(_at(self.teacher.model(input_ids), places)), for_products(_head(self.teacher))
        told = None if index is None else (index, torch.cat((log_probabilities, others[:, None]), -1))
        head = _head(self.student)
        total = chunked_loss(_at(hidden, places), head, self._token_loss(labels, told, taught))
        losses, layers = self.losses, len(self.maps)
        if losses.hidden_weight:
            total = total + losses.hidden_weight * _at(hidden_loss(ours[:layers], theirs[:layers], self.maps), places).sum()
        if losses.attention_weight:
            total = total + losses.attention_weight * _at(attention_loss(ours[layers:], theirs[layers:]), places).sum()
        return total

    def _token_loss(self, labels: Tensor, told: tuple[Tensor, Tensor] | None,
                    taught: tuple[Tensor, Tensor] | None):
        """The loss of a chunk of logits, as chunked_loss wants it."""
        losses, share, shared = self.losses, self.losses.label_share, self.shared

        def loss(logits: Tensor, part: slice) -> Tensor:
            logits = self.student.capped(logits)
            total = torch.zeros((), device=logits.device)
            if share > 0:
                total = total + share * F.cross_entropy(logits.float(), labels[part], reduction="sum")
            if share < 1:
                heat = losses.temperature
                if shared is not None and shared < logits.shape[-1]:
                    total = total + (1 - share) * mass_beyond(logits, shared).sum()
                    logits = logits[:, :shared]
                if taught is not None:               # no name holds the teacher's logits: one float32 copy of them is alive, their log_p
                    log_p = _cooled(self.teacher.capped(F.linear(taught[0][part], taught[1][:shared]).float()), heat)
                    log_q = _cooled(logits.float(), heat)
                else:
                    log_p, log_q = told[1][part], top_events(logits, told[0][part])
                total = total + (1 - share) * heat**2 * losses.divergence(log_p, log_q).sum()
            return total
        return loss

    @torch.no_grad()
    def judge(self, input_ids: Tensor, places: Tensor, labels: Tensor, index: Tensor, log_probabilities: Tensor, others: Tensor) -> dict:
        """Sums over labelled tokens: "loss" KL(teacher || student), "nll" of the labels, "top1" agreement with the teacher."""
        hidden, log_p = _at(self.student.model(input_ids), places), torch.cat((log_probabilities, others[:, None]), -1)
        sums = {"loss": 0.0, "nll": 0.0, "top1": 0.0}
        for part in chunks(len(hidden), tokens_at_once(hidden.device, self.student.config.vocab_size)):
            logits = self.student.head(hidden[part])
            sums["nll"] += F.cross_entropy(logits, labels[part], reduction="sum")
            logits = logits[:, :self.shared]
            sums["loss"] += kl(log_p[part], top_events(logits, index[part])).sum()
            sums["top1"] += (logits.argmax(-1) == index[part, 0]).sum()
        return sums


def _cooled(logits: Tensor, heat: float) -> Tensor:
    """Log-probabilities at a temperature."""
    return torch.log_softmax(logits if heat == 1 else logits / heat, -1)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """values [b, s, ...] at places [n] of the rows one after the other: [n, ...]."""
    return values.flatten(0, 1)[places]


def _head(decoder: Decoder) -> Tensor:
    return (decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head).weight
