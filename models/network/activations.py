"""Linears that round their inputs to int8: the arithmetic of a W8A8 checkpoint.

    config.json: "quantization_config": {..., "activations": {"bits": 8, "per": "row"}}
                                            or {"bits": 8, "per": "tensor", "except": ["down_proj"]}

Input x [..., K] becomes round(x / s) * s, limited to the int8 range, before the product with the weights its codes stand
for: the same numbers as an int8 x int8 product with int32 sums. "row": s = max|x| / 127 of each token's row. "tensor": one s
for each linear, found on calibration text and stored (`M.input_scale`), as QuantizeLinear and DequantizeLinear compute it.
"""

from torch import Tensor, nn


def round_rows(x: Tensor) -> Tensor:
    """x [..., K] rounded to int8 with one scale for each row."""
    return fake_int8(x, x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127)


def fake_int8(x: Tensor, scale: Tensor) -> Tensor:
    """The values of round(x / scale) in int8 (-128 to 127, halves to even); scale broadcasts."""
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def round_inputs(model: nn.Module, modules: list[str], scales: dict[str, Tensor]) -> None:
    """Make `modules` of the model round their inputs: by the scale [1] that `scales` has for one, else row by row."""
    for name in modules:
        def hook(module, inputs, scale=scales.get(name)):
            return (round_rows(inputs[0]) if scale is None else fake_int8(inputs[0], scale),)
        model.get_submodule(name).register_forward_pre_hook(hook)
