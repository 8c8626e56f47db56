"""Chance that falls alike on every device: uniform numbers come from the CPU's generator, and choose on the device.

A generator of a GPU gives other numbers than the CPU's, so what is drawn with it would depend on where a stage runs.
"""

from torch import Tensor, searchsorted


def drawn(weights: Tensor, chance: Tensor) -> Tensor:
    """int64 [..., m]: numbers drawn in proportion to weights [..., n], where chance [..., m], from 0 to 1, falls in their cumulative sum."""
    sums = weights.cumsum(-1)
    found = searchsorted(sums, chance * sums[..., -1:], right=True)
    return found.clamp_max(weights.shape[-1] - 1)
