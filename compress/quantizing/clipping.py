"""MSE-optimal clipping: the grid whose nearest values lose least, found by search over each group's range.

    grid = clipped_grid(weight, TensorFormat(4, 32), importance)     # weight [N, K], importance [K]

For a format with levels the table comes first (`fitted`): from that of a normal variable on, in turn the best scales for the table and,
by weighted k-means of w / scale, the best table for the scales. As the sign of a scale is free, a table need not be its own mirror
image. For every group the range is shrunk (and, where symmetric, the scale's sign flipped) over a list of candidates; each is
improved by one least-squares fit of the scale to its own codes, rounded to fp16, and the candidate with the least
sum_k importance[k] (w_k - value_k)^2 is kept. The importance of an input is its mean square over calibration data, the
Hessian's diagonal: without it, clipping cuts the few weights that matter most and makes a language model worse.

Source: Banner et al. 2018, "Post training 4-bit quantization" (clipping by mean square error), weighted as in
llama.cpp's importance matrix. It does not look at correlations between inputs: gptq.py does.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compress.quantizing.grid import Grid, fp16, stored_scales
from compress.quantizing.levels import moved, nearest, snapped, start
from models.network.quantized import TensorFormat

_COARSE = tuple(1 - 0.05 * i for i in range(8))      # 4 bits and fewer: clipping pays
_FINE = (1.0, 0.97, 0.94)
_WIDE = tuple(1 - 0.07 * i for i in range(8))        # 2 bits
_ROUNDS, _SAMPLE = 5, 1 << 16                        # of k-means, and the weights a table is fitted to
_ROWS = 1 << 20                                      # weights handled at once, to stay in a CPU's cache
_ROWS_ON_DEVICE = 1 << 24                            # elsewhere, where many small kernels would cost the time


def clipped_grid(weight: Tensor, form: TensorFormat, importance: Tensor | None = None, negative: bool = True,
                 levels: Tensor | None = None) -> Grid:
    """The least-squares grid of a weight.

    weight: float32 [N, K]. importance: float32 [K], not negative; None counts every input alike.
    negative: whether a symmetric grid's scale may be (grid.py). levels: a table to use, else `fitted`'s.
    Raises UserError where the group does not divide K.
    """
    rows, columns = weight.shape
    groups = form.groups(columns)
    importance = torch.ones(columns, device=weight.device) if importance is None else importance
    if form.kind == "levels" and levels is None:
        levels = fitted(weight, form, importance, negative)
    # A group whose inputs are all silent still needs a scale that fits its weights.
    importance = (importance + 1e-6 * importance.mean().clamp_min(1e-30)).view(1, groups, -1)
    search = _asymmetric if not form.symmetric else partial(_symmetric, negative=negative) if levels is None \
        else partial(_levelled, levels=levels, negative=negative)
    step = max(1, (_ROWS if weight.device.type == "cpu" else _ROWS_ON_DEVICE) // columns)
    parts = [search(weight[i:i + step].unflatten(1, (groups, -1)), form.bits, importance) for i in range(0, rows, step)]
    scales = torch.cat([scales for scales, _ in parts])                    # of all groups of a row, as 8-bit scales are rounded together
    return Grid(stored_scales(scales, form) if form.scale_bits == 8 else scales, torch.cat([zeros for _, zeros in parts]), form,
                None if levels is None else levels.float())


def fitted(weight: Tensor, form: TensorFormat, importance: Tensor, negative: bool = True) -> Tensor:
    """The table of levels for a weight [N, K] of any float type, int8 [2^bits] where the importance [K] is, from rows evenly spread."""
    rows = weight[::max(1, weight.numel() // _SAMPLE)].to(importance.device).float()
    grouped, levels = rows.unflatten(1, (form.groups(rows.shape[1]), -1)), start(form.bits).to(importance.device)
    price = (importance + 1e-6 * importance.mean().clamp_min(1e-30)).view(1, grouped.shape[1], -1)
    for _ in range(_ROUNDS):
        scales = _levelled(grouped, form.bits, price, negative, levels)[0][:, :, None]
        levels = moved(levels, grouped / scales, price * scales.square())
    return levels


def _levelled(grouped: Tensor, bits: int, importance: Tensor, negative: bool, levels: Tensor) -> tuple[Tensor, Tensor]:
    table, low, high = nearest(levels, levels), int(levels[0]), int(levels[-1])
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[:, :, 0]
    ends = (largest / low, largest / high) if negative else (largest.abs() / max(-low, high),)
    shrink = _WIDE if bits == 2 else _COARSE
    zeros = torch.full_like(largest, 2 ** (bits - 1))                       # which nobody looks at
    candidates = [(end * s, zeros) for end in ends for s in shrink]
    return _best(grouped, candidates, lambda x, _: snapped(x, table), importance)


def _symmetric(grouped: Tensor, bits: int, importance: Tensor, negative: bool) -> tuple[Tensor, Tensor]:
    half = 2 ** (bits - 1)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[:, :, 0]
    if not negative:
        largest = -largest.abs()                                           # so that -largest / half is positive
    shrink = _COARSE if bits < 5 else _FINE
    candidates = [-largest / half * s for s in shrink]                     # the largest weight on code 0
    other = largest if negative else -largest
    candidates += [other / max(half - 1, 1) * s for s in shrink[::2]]      # or on the other side
    zeros = torch.full_like(largest, half)
    return _best(grouped, [(scale, zeros) for scale in candidates], _even(2 * half - 1), importance)


def _asymmetric(grouped: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    candidates = []
    for shrink in _COARSE if bits < 5 else _FINE:
        scale = fp16((high - low) * shrink / top)
        candidates.append((scale, (-low * shrink / scale).round().clamp(0, top)))
    return _best(grouped, candidates, _even(top), importance)


def _even(top: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rounding to the codes 0 .. top less the zero point; x is used up."""
    return lambda x, zero: x.round_().add_(zero[:, :, None]).clamp_(0, top).sub_(zero[:, :, None])


def _best(grouped: Tensor, candidates: list[tuple[Tensor, Tensor]], rounded: Callable[[Tensor, Tensor], Tensor],
          importance: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates (scale, zero), the best for each group of grouped [N, G, K/G]."""
    best = best_scale = best_zero = None
    for scale, zero in candidates:
        scale = fp16(scale)
        codes = rounded(grouped / scale[:, :, None], zero)
        weighted = codes * importance
        power = (weighted * codes).sum(-1)
        fitted = fp16(torch.where(power > 0, (weighted * grouped).sum(-1) / power.clamp_min(1e-30), scale))
        error = (codes.mul_(fitted[:, :, None]).sub_(grouped).square_() * importance).sum(-1)
        if best is None:
            best, best_scale, best_zero = error, fitted, zero
        else:
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, fitted, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
