"""The grid of values a quantized weight may take, and rounding to it: what every method of this room shares.

Row n of a weight [N, K] may hold, in group j of its inputs, the values (code - zeros[n, j]) * scales[n, j] for codes
0 .. 2^bits - 1. Symmetric grids have zero 2^(bits-1); their scale may be negative, which puts the one value that has no
mirror image, code 0, on the side of the group's largest weight. Scales hold fp16 values from the start (in float32), so
codes are fitted to the scale that is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.network.quantized import QuantizedTensor, TensorFormat

SMALLEST = 2.0**-24           # the smallest positive fp16: a scale is never zero
LARGEST = 65504.0
TABLE = 1 << 26               # numbers of a token table that are looked at together


def fp16(scales: Tensor) -> Tensor:
    """Scales as fp16 stores them, float32, never 0 and never infinite."""
    rounded = scales.clamp(-LARGEST, LARGEST).half().float()
    return torch.where(rounded == 0, torch.full_like(rounded, SMALLEST), rounded)


def by_rows(weight: Tensor, choose: Callable[[Tensor], QuantizedTensor], part: int) -> QuantizedTensor:
    """Codes of weight [N, K] of any float type, about `part` of its numbers in float32 at once: rows do not depend on each other."""
    found = [choose(rows.float().contiguous()) for rows in weight.split(max(1, part // weight.shape[1]))]
    if len(found) == 1:
        return found[0]
    zeros = None if found[0].zeros is None else torch.cat([part.zeros for part in found])
    return replace(found[0], codes=torch.cat([part.codes for part in found]), scales=torch.cat([part.scales for part in found]),
                   zeros=zeros)


@dataclass(frozen=True)
class Grid:
    """Grid of one weight [N, K]; scales and zeros are float32 [N, groups], codes float32 [N, K]."""

    scales: Tensor
    zeros: Tensor
    format: TensorFormat

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.format.bits - 1

    def columns(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, each [N, columns]."""
        width = columns // self.scales.shape[1]
        return self.scales.repeat_interleave(width, 1), self.zeros.repeat_interleave(width, 1)

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of weight [N, K]."""
        grouped = weight.unflatten(1, (self.scales.shape[1], -1))
        return (grouped / self.scales[:, :, None]).round_().add_(self.zeros[:, :, None]).clamp_(0, self.top).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32 [N, K]."""
        grouped = codes.unflatten(1, (self.scales.shape[1], -1))
        return ((grouped - self.zeros[:, :, None]) * self.scales[:, :, None]).flatten(1)

    def with_scales(self, scales: Tensor) -> Grid:
        """The same zero points with other scales, rounded to fp16."""
        return replace(self, scales=fp16(scales))

    def tensor(self, codes: Tensor) -> QuantizedTensor:
        """As a checkpoint stores them."""
        form = self.format
        return QuantizedTensor(codes.to(torch.uint8), self.scales.half(),
                               None if form.symmetric else self.zeros.to(torch.uint8), form.bits, form.group, form.symmetric)
