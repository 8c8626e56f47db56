"""Fewer layers of an encoder: which go, and the same network without them.

The layers that change least of what goes through them leave: 1 - cos(what enters, what leaves), averaged over the tokens of the text
(Men et al. 2024, block influence).
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from models.encoders.network import alone
from runtime.errors import UserError


def layers_of(model) -> nn.ModuleList:
    """The list of layers. Raises UserError for a network whose layers share their weights."""
    found = next((part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers")), None)
    if found is None or len(found) != model.config.num_hidden_layers:
        raise UserError(f"a {model.config.model_type} model has no layers of its own weights that could be left out")
    return found


def with_layers(model, kept: list[int]):
    """A copy of the model with these of its layers, in this order."""
    student = copy.deepcopy(model)
    layers = layers_of(student)
    chosen = [layers[number] for number in kept]
    for name, part in student.named_modules():
        if part is layers:
            parent = student.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.ModuleList(chosen))
            break
    student.config.num_hidden_layers = len(kept)
    return student


@torch.no_grad()
def influences(model, texts) -> list[float]:
    """Of each layer: 1 - cos of what enters and what leaves, the mean over tokens."""
    sums, tokens = [0.0] * len(layers_of(model)), sum(map(len, texts))
    for one in texts:
        states = model(**alone(model, one), output_hidden_states=True).hidden_states
        for number, (before, after) in enumerate(zip(states, states[1:])):
            sums[number] += float((1 - F.cosine_similarity(before[0], after[0], dim=-1)).sum())
    return [total / tokens for total in sums]
