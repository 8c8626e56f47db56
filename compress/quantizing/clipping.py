"""MSE-optimal clipping: the grid whose nearest values lose least, found by search over each group's range.

    grid = clipped_grid(weight, TensorFormat(4, 32), importance)     # weight [N, K], importance [K]

For every group the range is shrunk (and, where symmetric, the scale's sign flipped) over a list of candidates; each is
improved by one least-squares fit of the scale to its own codes, rounded to fp16, and the candidate with the least
sum_k importance[k] (w_k - value_k)^2 is kept. The importance of an input is its mean square over calibration data, the
Hessian's diagonal: without it, clipping cuts the few weights that matter most and makes a language model worse.

Source: Banner et al. 2018, "Post training 4-bit quantization" (clipping by mean square error), weighted as in
llama.cpp's importance matrix. It does not look at correlations between inputs: gptq.py does.
"""

from functools import partial

import torch
from torch import Tensor

from compress.quantizing.grid import Grid, fp16
from models.network.quantized import TensorFormat

_COARSE = tuple(1 - 0.05 * i for i in range(8))      # 4 bits and fewer: clipping pays
_FINE = (1.0, 0.97, 0.94)
_ROWS = 1 << 20                                      # weights handled at once, to stay in the cache


def clipped_grid(weight: Tensor, form: TensorFormat, importance: Tensor | None = None, negative: bool = True) -> Grid:
    """The least-squares grid of a weight.

    weight: float32 [N, K]. importance: float32 [K], not negative; None counts every input alike.
    negative: whether a symmetric grid's scale may be (grid.py).
    Raises UserError where the group does not divide K.
    """
    rows, columns = weight.shape
    groups = form.groups(columns)
    importance = torch.ones(columns) if importance is None else importance
    # A group whose inputs are all silent still needs a scale that fits its weights.
    importance = (importance + 1e-6 * importance.mean().clamp_min(1e-30)).view(1, groups, -1)
    search = partial(_symmetric, negative=negative) if form.symmetric else _asymmetric
    step = max(1, _ROWS // columns)
    parts = [search(weight[i:i + step].unflatten(1, (groups, -1)), form.bits, importance) for i in range(0, rows, step)]
    return Grid(torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts]), form)


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
    return _best(grouped, [(scale, zeros) for scale in candidates], 2 * half - 1, importance)


def _asymmetric(grouped: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    candidates = []
    for shrink in _COARSE if bits < 5 else _FINE:
        scale = fp16((high - low) * shrink / top)
        candidates.append((scale, (-low * shrink / scale).round().clamp(0, top)))
    return _best(grouped, candidates, top, importance)


def _best(grouped: Tensor, candidates: list[tuple[Tensor, Tensor]], top: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates (scale, zero), the best for each group of grouped [N, G, K/G]."""
    best = best_scale = best_zero = None
    for scale, zero in candidates:
        scale = fp16(scale)
        codes = (grouped / scale[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, top).sub_(zero[:, :, None])
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
