"""Codes from neural-compressor's HQQ, one weight at a time and without data: `--method hqq`.

    tensor = hqq(weight, TensorFormat(4, 64, symmetric=False))        # weight float32 [N, K]

HQQ chooses a zero point for each group such that few large errors are preferred to many small ones. Its zero points are
fractions, which no backend here runs; they are rounded, and a weight takes the code nearest to it on the grid that is
left, HQQ's own wherever the zero point was whole. Rounding gives back part of what HQQ won: at 4 bits expect no more than
`--method rtn --no-symmetric`. Needs the extra [quant].

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
"""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import Tensor, nn

from compress.grid import Grid, fp16
from models.quantized import QuantizedTensor, TensorFormat
from runtime.errors import UserError


def hqq(weight: Tensor, form: TensorFormat) -> QuantizedTensor:
    """Quantize weight [N, K], float32. Raises UserError without neural-compressor, or for a format HQQ has not."""
    quantization = _load()
    if form.symmetric or form.bits not in (2, 3, 4, 8):
        raise UserError(f"HQQ has 2, 3, 4 and 8 bits with zero points, not {form.bits} bits"
                        f"{' without' if form.symmetric else ''}: give --bits 4 --no-symmetric")
    rows, columns = weight.shape
    groups = form.groups(columns)
    size = columns // groups
    # HQQ's groups are the columns of the weight reshaped to [size, -1]: give it ours that way.
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.reshape(-1, size).T.reshape(rows, columns).contiguous()
    config = quantization.HQQConfig(bits=form.bits, group_size=size, quant_zero=False, quant_scale=False)
    found = quantization.convert(quantization.prepare(nn.Sequential(linear), config))[0].q_weight
    scales = fp16(found.scale.float().reshape(rows, groups))
    zeros = found.zero.float().reshape(rows, groups).round().clamp(0, 2**form.bits - 1)
    grid = Grid(scales, zeros, form)
    return grid.tensor(grid.codes(weight))


def _load():
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(None):
            from neural_compressor.torch import quantization
    except ImportError as error:
        raise UserError(f"--method hqq needs neural-compressor ({error}): pip install 'edgewright[quant]'") from None
    return quantization
