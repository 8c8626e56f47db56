"""Tables of levels: the 2^bits values, in units of a scale, that codes of kind "levels" stand for.

    table = start(3)                               # int8 [8], of a normal variable
    table = moved(table, x, weights)               # one round of weighted k-means

A table is int8, rises strictly and lies within -127 .. 127, so that a kernel looks a byte up and multiplies it as it does 8-bit
codes; one of its ends is 127 or -127. clipping.py alternates between the best scales for a table and `moved`.

Sources: Lloyd 1982 and Max 1960 (quantizers of least squared error).
"""

import torch
from torch import Tensor

NORMAL = {2: (0.4528, 1.5104), 3: (0.2451, 0.7560, 1.3439, 2.1520),
          4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)}        # the positive half
HALVES = torch.arange(-127, 128, 0.5)


def start(bits: int) -> Tensor:
    """The quantizer of least squared error of a normal variable, int8 [2^bits]."""
    half = torch.tensor(NORMAL[bits])
    return rising(torch.cat((-half.flip(0), half)))


def rising(levels: Tensor) -> Tensor:
    """Sorted values as a table, int8: the largest becomes 127, and each is at least one more than the last."""
    count = torch.arange(len(levels), device=levels.device)
    steps = levels * (127 / levels.abs().amax())
    steps = (steps.round() - count).cummax(0).values                   # rises by one at least where this does not fall
    return (steps.clamp(-127, 128 - len(levels)) + count).to(torch.int8)


def nearest(levels: Tensor, values: Tensor) -> Tensor:
    """For `snapped`: the one of values [2^bits] that belongs to the level nearest to x, float32 [510], x in half steps from -127.

    Levels are integers, so the nearest changes at half steps only, and a look-up is exact: several times as fast as a search."""
    levels = levels.float()
    return values.float()[torch.bucketize(HALVES.to(levels.device) + 0.25, (levels[1:] + levels[:-1]) / 2)]


def snapped(x: Tensor, table: Tensor) -> Tensor:
    """What `nearest` tells of x, in units of a scale; x is used up."""
    places = x.mul_(2).floor_().add_(254).clamp_(0, len(table) - 1).int()
    return table.index_select(0, places.flatten()).view(x.shape)


def moved(levels: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """The table whose values are the weighted means of what is nearest to them. x, weights: float32, of one shape, x in units of a scale."""
    codes = snapped(x.clone(), nearest(levels, torch.arange(len(levels), device=levels.device))).long().flatten()
    mass = torch.zeros(len(levels), device=x.device).scatter_add_(0, codes, weights.flatten())
    sums = torch.zeros(len(levels), device=x.device).scatter_add_(0, codes, (weights * x).flatten())
    return rising(torch.where(mass > 0, sums / mass.clamp_min(1e-30), levels.float()))
