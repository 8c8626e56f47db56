"""The grid of values a quantized weight may take, and rounding to it: what every method of this room shares.

Row n of a weight [N, K] may hold, in group j of its inputs, the values (code - zeros[n, j]) * scales[n, j] for codes
0 .. 2^bits - 1. Symmetric grids have zero 2^(bits-1); their scale may be negative, which puts the one value that has no
mirror image, code 0, on the side of the group's largest weight. Where the format has levels, the values are levels[code] *
scales[n, j]. Scales hold from the start (in float32) what the format can store, so codes are fitted to the scale that is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quantizing.levels import nearest, snapped
from models.network.quantized import LARGEST, SMALLEST, QuantizedTensor, TensorFormat, byte_scales

TABLE = 1 << 26               # numbers of a token table that are looked at together


def fp16(scales: Tensor) -> Tensor:
    """Scales as fp16 stores them, float32, never 0 and never infinite."""
    rounded = scales.clamp(-LARGEST, LARGEST).half().float()
    return torch.where(rounded == 0, torch.full_like(rounded, SMALLEST), rounded)


def stored_scales(scales: Tensor, form: TensorFormat) -> Tensor:
    """Scales [N, groups] as the format stores them, float32: rounded to fp16, or to a row's 127 steps."""
    if form.scale_bits == 16:
        return fp16(scales)
    codes, rows = byte_scales(scales)
    return codes.float() * rows.float()


def by_rows(weight: Tensor, choose: Callable[[Tensor], QuantizedTensor], part: int, device: torch.device | None = None) -> QuantizedTensor:
    """Codes of weight [N, K] of any float type, about `part` of its numbers in float32 at once: rows do not depend on each other.

    device: where `choose` works, if elsewhere than the weight is (a token table stays on the host); codes come to the weight.
    """
    found = [choose(rows.to(device or rows.device).float().contiguous()).to(weight.device)
             for rows in weight.split(max(1, part // weight.shape[1]))]
    if len(found) == 1:
        return found[0]
    zeros = None if found[0].zeros is None else torch.cat([part.zeros for part in found])
    return replace(found[0], codes=torch.cat([part.codes for part in found]), scales=torch.cat([part.scales for part in found]),
                   zeros=zeros)


@dataclass(frozen=True)
class Grid:
    """Grid of one weight [N, K]; scales and zeros are float32 [N, groups], levels float32 [2^bits], codes float32 [N, K]."""

    scales: Tensor
    zeros: Tensor                 # of levels not looked at
    format: TensorFormat
    levels: Tensor | None = None

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
        if self.levels is not None:
            return self.codes_of(snapped(grouped / self.scales[:, :, None], nearest(self.levels, self.levels)).flatten(1))
        return (grouped / self.scales[:, :, None]).round_().add_(self.zeros[:, :, None]).clamp_(0, self.top).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32 [N, K]."""
        return (self.steps(codes).unflatten(1, (self.scales.shape[1], -1)) * self.scales[:, :, None]).flatten(1)

    def steps(self, codes: Tensor) -> Tensor:
        """What codes stand for in units of their scales, float32 [N, K]."""
        if self.levels is not None:
            return self.levels.index_select(0, codes.flatten().int()).view(codes.shape)
        return (codes.unflatten(1, (self.scales.shape[1], -1)) - self.zeros[:, :, None]).flatten(1)

    def codes_of(self, steps: Tensor) -> Tensor:
        """The codes that stand for these: `steps` undone."""
        if self.levels is not None:
            return snapped(steps.clone(), nearest(self.levels, torch.arange(len(self.levels), device=steps.device)))
        return (steps.unflatten(1, (self.scales.shape[1], -1)) + self.zeros[:, :, None]).flatten(1)

    def rounding(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """round(x, low, high): x, in units of a scale, to the nearest step, in place; low and high are the first and last of even steps."""
        if self.levels is None:
            return lambda x, low, high: x.round_().clamp_(low, high)
        table = nearest(self.levels, self.levels)
        return lambda x, low, high: x.copy_(snapped(x, table))

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of some of the rows."""
        return replace(self, scales=self.scales[start:stop], zeros=self.zeros[start:stop])

    def with_scales(self, scales: Tensor) -> Grid:
        """The same with other scales, rounded to what is stored."""
        return replace(self, scales=stored_scales(scales, self.format))

    def tensor(self, codes: Tensor) -> QuantizedTensor:
        """As a checkpoint stores them."""
        form = self.format
        return QuantizedTensor(codes.to(torch.uint8), self.scales.half() if form.scale_bits == 16 else self.scales,
                               None if form.symmetric else self.zeros.to(torch.uint8), form.bits, form.group, form.symmetric, form.kind,
                               form.scale_bits, None if self.levels is None else self.levels.to(torch.int8))
