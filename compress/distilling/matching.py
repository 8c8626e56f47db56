"""Matching what happens inside: hidden states and attention of a student against a teacher of another shape.

- `hidden_loss`: after every layer of the student, the residual stream (through a learned linear map where the widths
  differ) against the teacher's after the layer at the same share of the depth: squared error over the teacher's mean
  square, token by token, averaged over the layers. Relative, because a few tokens have states a thousand times larger
  than all others (Romero et al. 2015, "FitNets"; Jiao et al. 2020, "TinyBERT", for the map and the uniform layers).
- `attention_loss`: in the last attention of each that has keys of its own, which earlier tokens are alike to a token by
  their queries, by their keys and by their values: softmax(x xT / sqrt(width)) over the tokens up to it, in as many
  parts of the width as both can be cut into; KL of the teacher's from the student's. Head counts and widths may differ
  (Wang et al. 2021, "MiniLMv2").
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.distilling.divergence import kl
from models.network.config import ModelConfig
from models.network.decoder import Decoder
from models.network.mixers.attention import Attention
from runtime.errors import UserError

RELATIONS = 16                    # parts that the width of queries, keys and values is cut into, at most


def layer_pairs(student: int, teacher: int) -> list[int]:
    """For each of the student's layers the teacher's to match, both counted from 0; the last goes with the last."""
    return [round((number + 1) * teacher / student) - 1 for number in range(student)]


def hidden_maps(student: ModelConfig, teacher: ModelConfig) -> nn.ModuleList:
    """A linear map for every layer of the student into the teacher's width; none where the widths are the same."""
    if student.hidden_size == teacher.hidden_size:
        return nn.ModuleList(nn.Identity() for _ in student.layers)
    return nn.ModuleList(nn.Linear(student.hidden_size, teacher.hidden_size, bias=False) for _ in student.layers)


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, what the modules give out: a list in their order, filled by each forward pass."""
    found: list[Tensor | None] = [None] * len(modules)
    hooks = [module.register_forward_hook(lambda _, inputs, output, n=n: found.__setitem__(n, output))
             for n, module in enumerate(modules)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def hidden_modules(student: Decoder, teacher: Decoder) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers whose outputs `hidden_loss` takes."""
    pairs = layer_pairs(len(student.model.layers), len(teacher.model.layers))
    return list(student.model.layers), [teacher.model.layers[n] for n in pairs]


def hidden_loss(student: list[Tensor], teacher: list[Tensor], maps: nn.ModuleList) -> Tensor:
    """Relative squared error [b, s] of hidden states [b, s, width], averaged over the layers."""
    losses = []
    for ours, theirs, to_width in zip(student, teacher, maps):
        theirs = theirs.float()
        losses.append((to_width(ours).float() - theirs).square().mean(-1) / theirs.square().mean(-1).clamp_min(1e-6))
    return torch.stack(losses).mean(0)


def attention_modules(decoder: Decoder) -> list[nn.Module]:
    """The projections whose outputs `attention_loss` takes. Raises UserError for a model that has none."""
    found = [block.mixer for layer in decoder.model.layers for block in layer.blocks
             if isinstance(block.mixer, Attention) and block.mixer.k_proj is not None]
    if not found:
        raise UserError(f"--attention-weight matches attention, and this {decoder.config.family} model has none: leave it out")
    return [found[-1].q_proj, found[-1].k_proj, found[-1].v_proj]


def attention_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """KL [b, s] between the relations of queries, keys and values [b, s, width], averaged over the three and the parts."""
    losses = []
    for ours, theirs in zip(student, teacher):
        parts = max(n for n in range(1, RELATIONS + 1) if ours.shape[-1] % n == 0 and theirs.shape[-1] % n == 0)
        losses.append(kl(_relations(theirs, parts), _relations(ours, parts)).mean(1))
    return torch.stack(losses).mean(0)


def _relations(x: Tensor, parts: int) -> Tensor:
    """Log-probabilities [b, parts, s, s] of each token's likeness to the tokens up to it; x [b, s, width]."""
    x = x.float().unflatten(-1, (parts, -1)).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, -1e4).log_softmax(-1)
