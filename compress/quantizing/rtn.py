"""Round to nearest: every group's range decides its scale, every weight goes to the nearest code.

Symmetric: scale = max|w| / (2^(bits-1) - 1), so zero has a code and so has every weight's mirror image but for the
lowest code; with levels scale = max|w| / 127, the table being that of a normal variable (levels.py). Asymmetric: scale =
(max - min) / (2^bits - 1) over the range with zero in it, and a zero point. Kind "e4m3": scale = max|w| / 448, the largest 8-bit float of that kind, and PyTorch's rounding to it. It looks at no data, is
what int8 needs, and costs at 4 bits what clipping.py and gptq.py win back. Codes are the same on every device.
"""

import torch
from torch import Tensor

from compress.quantizing.grid import Grid, fp16, stored_scales
from compress.quantizing.levels import start
from models.network.quantized import QuantizedTensor, TensorFormat

E4M3_LARGEST = 448.0


def minmax_grid(weight: Tensor, form: TensorFormat) -> Grid:
    """The grid that spans each group of weight [N, K], float32. Raises UserError where the group does not divide K."""
    grouped = weight.unflatten(1, (form.groups(weight.shape[1]), -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if form.symmetric:
        half, levels = 2 ** (form.bits - 1), start(form.bits).float().to(weight.device) if form.kind == "levels" else None
        scales = stored_scales(_divided(torch.maximum(-low, high), half - 1 if levels is None else 127), form)
        return Grid(scales, torch.full_like(scales, half), form, levels)
    top = 2**form.bits - 1
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = stored_scales(_divided(high - low, top), form)
    return Grid(scales, (-low / scales).round().clamp(0, top), form)


def round_to_nearest(weight: Tensor, form: TensorFormat) -> QuantizedTensor:
    """Quantize weight [N, K], float32. Raises UserError where the group does not divide K."""
    if form.kind == "e4m3":
        grouped = weight.unflatten(1, (form.groups(weight.shape[1]), -1))
        scales = fp16(_divided(grouped.abs().amax(-1), E4M3_LARGEST))
        codes = (grouped / scales[:, :, None]).clamp_(-E4M3_LARGEST, E4M3_LARGEST).flatten(1).to(torch.float8_e4m3fn)
        return QuantizedTensor(codes, scales.half(), None, form.bits, form.group, form.symmetric, form.kind)
    grid = minmax_grid(weight, form)
    return grid.tensor(grid.codes(weight))


def _divided(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once: by a number of the host's, PyTorch on CUDA multiplies with its rounded reciprocal, and now and then a scale
    would be another fp16 than the CPU's."""
    return x / torch.full_like(x, by)
