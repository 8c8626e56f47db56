"""Width pruning: fewer MLP neurons, fewer groups of attention heads, layer by layer, with the rest made to fill in.

A neuron j of an MLP speaks through column j of its last linear, a group of heads through its columns of attention's. Dropping
columns D of such a linear W with inputs x costs, when the kept columns K take over as well as they can,

    min_V E |W x - V x_K|^2,   reached by   V = W_K + W_D H[D, K] H[K, K]^-1,   H = E[x x^T]

(least squares; Kurtic et al. 2023, "ZipLM", and Ling et al. 2024, "SlimGPT"). Which to drop is decided by what each contributes alone, E[x_j^2] |W_j|^2, as a share of the residual
stream's own energy, so that layers can be compared and each keeps what it needs. Every layer is calibrated on the errors
of those before it (compress/layerwise.py).

MLP widths are kept at multiples of `step`, which later quantization groups must divide. The hidden size stays, and so do mixers
that are no attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.layerwise import Walk, rewritten, second_moment
from models.checkpoint import Checkpoint
from models.network.config import ModelConfig
from models.network.decoder import Layer
from models.network.mixers.attention import Attention
from models.network.mixers.mlp import MLP

DAMPING = 0.01              # of H's mean diagonal, added before it is inverted


@dataclass(frozen=True)
class Importance:
    """Share of the residual stream's energy that each neuron [mlp_size] and each head group [kv_heads] contributes, by layer; None
    where a layer has no MLP, or no attention."""
    neurons: list[Tensor | None]
    groups: list[Tensor | None]


def take_over(weight: Tensor, moment: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight [N, len(keep)] over the inputs `keep` that best stands for `weight` [N, K]; moment = E[x x^T] [K, K].

    Damping holds the kept columns to what they were, where the text says too little to move them.
    """
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[keep] = False
    kept = moment[keep][:, keep].double()
    kept.diagonal().add_(damping * moment.diagonal().mean().double().clamp_min(1e-12))
    moved = torch.linalg.solve(kept, moment[keep][:, gone].double() @ weight[:, gone].T.double()).T
    return weight[:, keep] + moved.to(weight.dtype)


def measure_importance(checkpoint: Checkpoint, ids: Tensor) -> Importance:
    """One pass over ids int64 [windows, tokens]; peak memory is that of compress/layerwise.py."""
    walk, found = Walk(checkpoint, ids), Importance([], [])
    for number, layer in walk.layers("importance"):
        writers = _writers(layer)

        def visit(names, inputs):
            if names[0] not in writers:
                return
            weight = layer.get_submodule(names[0]).weight
            energy = sum(part.square().sum((0, 1)) for part in inputs) / sum(part.shape[0] * part.shape[1] for part in inputs)
            share = energy * weight.square().sum(0) / (sum(part.square().sum() for part in walk.x) / ids.numel())
            if isinstance(writers[names[0]], MLP):
                found.neurons[number] = share
            else:
                found.groups[number] = share.view(checkpoint.config.layers[number].kv_heads, -1).sum(1)
        found.neurons.append(None)
        found.groups.append(None)
        walk.step(layer, visit)
    return found


def _writers(layer: Layer) -> dict[str, Attention | MLP]:
    """The attention and the MLP of a layer, by the names of the linears through which they speak."""
    names = {module: name for name, module in layer.named_modules()}
    return {names[block.mixer.writer]: block.mixer for block in layer.blocks if isinstance(block.mixer, (Attention, MLP))}


def choose_neurons(importance: Importance, total: int, step: int) -> list[int]:
    """Widths of every layer's MLP that keep `total` neurons in all: the most important over all layers, each layer a
    multiple of `step` and at least one step."""
    blocks = []                                              # (mean share of a step of neurons, layer), best first in a layer
    widths = [step] * len(importance.neurons)
    for number, shares in enumerate(importance.neurons):
        ranked = shares.cpu().sort(descending=True).values
        blocks += [(ranked[i:i + step].mean().item(), number) for i in range(step, len(ranked) - step + 1, step)]
    for _, number in sorted(blocks, reverse=True)[:max(0, total // step - len(widths))]:
        widths[number] += step
    return widths


def narrowed(checkpoint: Checkpoint, ids: Tensor, importance: Importance, widths: list[int],
             groups: list[int]) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The pruned model, its configuration and tensors: layer n has widths[n] neurons and groups[n] head groups."""
    walk = Walk(checkpoint, ids)
    shapes = tuple(replace(layer, heads=layer.heads // max(layer.kv_heads, 1) * kept, kv_heads=kept, mlp_size=size)
                   for layer, size, kept in zip(checkpoint.config.layers, widths, groups))

    def change(number: int, layer: Layer) -> dict[str, Tensor]:
        keep = {}
        for name, mixer in _writers(layer).items():
            if isinstance(mixer, MLP):
                keep[name] = importance.neurons[number].topk(widths[number]).indices.sort().values
            else:
                keep[name] = _head_inputs(mixer, importance.groups[number].topk(groups[number]).indices)

        def visit(names, inputs):
            if names[0] in keep:
                linear, kept = layer.get_submodule(names[0]), keep[names[0]]
                if len(kept) < linear.in_features:
                    filled = torch.zeros_like(linear.weight)
                    filled[:, kept] = take_over(linear.weight, second_moment(inputs), kept)
                    linear.weight = torch.nn.Parameter(filled, requires_grad=False)
        walk.step(layer, visit)
        return _sliced(layer, keep)
    return replace(checkpoint.config, layers=shapes), rewritten(walk, "pruning", change)


def _head_inputs(attention: Attention, groups: Tensor) -> Tensor:
    """Columns of o that belong to the kept key/value groups."""
    per_group = attention.head_dim * attention.per_value
    return (groups.sort().values[:, None] * per_group + torch.arange(per_group, device=groups.device)).flatten()


def _sliced(layer: Layer, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer's tensors without the dropped rows and columns. keep: kept columns of the linears that write to the stream."""
    names, rows = {module: name for name, module in layer.named_modules()}, {}
    for name, mixer in _writers(layer).items():
        first = keep[name]
        if isinstance(mixer, Attention):                                                # k and v: one head a group
            size = mixer.head_dim
            first = (first.view(-1, size * mixer.per_value)[:, :1] // mixer.per_value + torch.arange(size, device=first.device)).flatten()
        for reader in mixer.groups(None)[0].readers:
            alike = reader.out_features == layer.get_submodule(name).in_features        # q, and what gates it
            rows[names[reader]] = keep[name] if alike else first
    result = {}
    for name, tensor in layer.state_dict().items():
        module = name.rpartition(".")[0]
        if module in rows:
            tensor = tensor[rows[module]]
        elif module in keep and name.endswith(".weight"):
            tensor = tensor[:, keep[module]]
        result[name] = tensor
    return result
