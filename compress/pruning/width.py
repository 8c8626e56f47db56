"""Width pruning: fewer MLP neurons, fewer groups of attention heads, layer by layer, with the rest made to fill in.

A neuron j of an MLP speaks through column j of down_proj, a group of heads through its columns of o_proj. Dropping
columns D of such a linear W with inputs x costs, when the kept columns K take over as well as they can,

    min_V E |W x - V x_K|^2,   reached by   V = W_K + W_D H[D, K] H[K, K]^-1,   H = E[x x^T]

(least squares; Kurtic et al. 2023, "ZipLM", and Ling et al. 2024, "SlimGPT"). Which to drop is decided by what each contributes alone, E[x_j^2] |W_j|^2, as a share of the residual
stream's own energy, so that layers can be compared and each keeps what it needs. Every layer is calibrated on the errors
of those before it (compress/layerwise.py).

MLP widths are kept at multiples of `step`, which later quantization groups must divide. The hidden size stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.layerwise import Walk, rewritten, second_moment
from models.checkpoint import Checkpoint
from models.network.config import ModelConfig
from models.network.decoder import Layer

DAMPING = 0.01              # of H's mean diagonal, added before it is inverted


@dataclass(frozen=True)
class Importance:
    """Share of the residual stream's energy that each neuron [mlp_size] and each head group [kv_heads] contributes."""
    neurons: list[Tensor]
    groups: list[Tensor]


def take_over(weight: Tensor, moment: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight [N, len(keep)] over the inputs `keep` that best stands for `weight` [N, K]; moment = E[x x^T] [K, K].

    Damping holds the kept columns to what they were, where the text says too little to move them.
    """
    gone = torch.ones(len(moment), dtype=torch.bool)
    gone[keep] = False
    kept = moment[keep][:, keep].double()
    kept.diagonal().add_(damping * moment.diagonal().mean().double().clamp_min(1e-12))
    moved = torch.linalg.solve(kept, moment[keep][:, gone].double() @ weight[:, gone].T.double()).T
    return weight[:, keep] + moved.to(weight.dtype)


def measure_importance(checkpoint: Checkpoint, ids: Tensor) -> Importance:
    """One pass over ids int64 [windows, tokens]; peak memory is that of compress/layerwise.py."""
    walk, found = Walk(checkpoint, ids), Importance([], [])
    for number, layer in walk.layers("importance"):
        def visit(names, inputs):
            if names[0] not in ("self_attn.o_proj", "mlp.down_proj"):
                return
            weight = layer.get_submodule(names[0]).weight
            energy = sum(part.square().sum((0, 1)) for part in inputs) / sum(part.shape[0] * part.shape[1] for part in inputs)
            share = energy * weight.square().sum(0) / walk.x.square().sum(-1).mean()
            if names[0] == "mlp.down_proj":
                found.neurons.append(share)
            else:
                found.groups.append(share.view(checkpoint.config.layers[number].kv_heads, -1).sum(1))
        walk.step(layer, visit)
    return found


def choose_neurons(importance: Importance, total: int, step: int) -> list[int]:
    """Widths of every layer's MLP that keep `total` neurons in all: the most important over all layers, each layer a
    multiple of `step` and at least one step."""
    blocks = []                                              # (mean share of a step of neurons, layer), best first in a layer
    widths = [step] * len(importance.neurons)
    for number, shares in enumerate(importance.neurons):
        ranked = shares.sort(descending=True).values
        blocks += [(ranked[i:i + step].mean().item(), number) for i in range(step, len(ranked) - step + 1, step)]
    for _, number in sorted(blocks, reverse=True)[:max(0, total // step - len(widths))]:
        widths[number] += step
    return widths


def narrowed(checkpoint: Checkpoint, ids: Tensor, importance: Importance, widths: list[int],
             groups: list[int]) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The pruned model, its configuration and tensors: layer n has widths[n] neurons and groups[n] head groups."""
    walk = Walk(checkpoint, ids)
    shapes = tuple(replace(layer, heads=layer.heads // layer.kv_heads * kept, kv_heads=kept, mlp_size=size)
                   for layer, size, kept in zip(checkpoint.config.layers, widths, groups))

    def change(number: int, layer: Layer) -> dict[str, Tensor]:
        keep = {"self_attn.o_proj": _head_inputs(layer, importance.groups[number].topk(groups[number]).indices),
                "mlp.down_proj": importance.neurons[number].topk(widths[number]).indices.sort().values}

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


def _head_inputs(layer: Layer, groups: Tensor) -> Tensor:
    """Columns of o_proj that belong to the kept key/value groups."""
    per_group = layer.self_attn.o_proj.in_features // (layer.self_attn.k_proj.out_features // layer.self_attn.head_dim)
    return (groups.sort().values[:, None] * per_group + torch.arange(per_group)).flatten()


def _sliced(layer: Layer, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer's tensors without the dropped rows and columns."""
    heads, neurons, size = keep["self_attn.o_proj"], keep["mlp.down_proj"], layer.self_attn.head_dim
    share = layer.self_attn.o_proj.in_features // layer.self_attn.k_proj.out_features      # query heads of one key head
    first = heads.view(-1, share * size)[:, 0] // share                                    # k and v rows: one head a group
    rows = {"q_proj": heads, "k_proj": (first[:, None] + torch.arange(size)).flatten(), "gate_proj": neurons, "up_proj": neurons}
    rows["v_proj"] = rows["k_proj"]
    result = {}
    for name, tensor in layer.state_dict().items():
        module = name.split(".")[1]
        if module in rows and "norm" not in module:
            tensor = tensor[rows[module]]
        elif name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensor = tensor[:, keep[name.removesuffix(".weight")]]
        result[name] = tensor
    return result
