"""Folding factors between the linears of a layer without changing what it computes.

The inputs of a group of linears are multiplied by s in the linears' weights and divided by s where they are made:
    q, k, v and gate, up:  in the norm's gain (and bias) before them
    o:                     in the rows (and bias) of v; heads that share a value head share its factors
    down:                  in the rows (and bias) of up, which the gate's activation does not touch; a plain MLP, whose
                           activation stands between, is left alone
awq.py and smoothquant.py choose the factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.network.decoder import Layer

Tie = Callable[[Tensor], Tensor]
Choose = Callable[[dict[str, nn.Linear], Tie], Tensor | None]


@torch.no_grad()
def fold_scales(layer: Layer, choose: Choose) -> None:
    """Fold what `choose` gives for each group of linears into `layer`, in place.

    choose(linears by name, tie) gives positive factors [K] that are their own `tie`, or None to leave the group alone;
    tie makes factors equal where they must be.
    """
    attention, mlp = layer.self_attn, layer.mlp
    groups = [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.input_layernorm),
              (("self_attn.o_proj",), attention.v_proj),
              (("mlp.up_proj",) if mlp.gate_proj is None else ("mlp.gate_proj", "mlp.up_proj"), layer.post_attention_layernorm)]
    if mlp.gate_proj is not None:
        groups.append((("mlp.down_proj",), mlp.up_proj))
    for names, maker in groups:
        linears = {name: layer.get_submodule(name) for name in names}
        values = maker is attention.v_proj
        scales = choose(linears, (lambda s: shared(s, attention)[1]) if values else (lambda s: s))
        if scales is None:
            continue
        for linear in linears.values():
            linear.weight *= scales
        _divide(maker, shared(scales, attention)[0] if values else scales)


def shared(scales: Tensor, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Factors of o's inputs, made equal in the heads that share a value head: for v's rows, and for o's columns."""
    size = attention.head_dim
    grouped = scales.view(attention.v_proj.out_features // size, -1, size)
    mean = grouped.log().mean(1, keepdim=True).exp()
    return mean.flatten(), mean.expand_as(grouped).reshape(-1)


def _divide(module: nn.Module, scales: Tensor) -> None:
    """Divide a norm's gain, or a linear's rows, and the bias by scales."""
    module.weight /= scales if module.weight.ndim == 1 else scales[:, None]
    if getattr(module, "bias", None) is not None:
        module.bias /= scales
