"""Linears that round their inputs to int8, one scale for each token's row: the arithmetic of a W8A8 checkpoint.

    config.json: "quantization_config": {..., "activations": {"bits": 8, "per": "row"}}

Row x [K] becomes round(x / s) * s with s = max|x| / 127, before the product with the weights its codes stand for: the
same numbers as an int8 x int8 product with int32 sums. It applies to the quantized linears of the layers; the head stays
as it is. A row's scale depends on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.errors import UserError

INT8_ROWS = {"bits": 8, "per": "row"}


def round_rows(x: Tensor) -> Tensor:
    """x [..., K] rounded to int8 with one scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round_().clamp_(-127, 127).mul_(scale)


def round_inputs(model: nn.Module, modules: list[str], activations: dict) -> None:
    """Make `modules` of the model round their inputs. Raises UserError for activations of another kind."""
    if activations != INT8_ROWS:
        raise UserError(f"quantization_config has activations {activations!r}: supported is {INT8_ROWS!r}")
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (round_rows(inputs[0]),))
