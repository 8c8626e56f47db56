"""GPTQ: codes that minimize the error of a layer's output, not of its weights.

`gptq(weight, hessian, grid)` gives codes on a given grid such that, per output row,
    loss = (w - v) H (w - v)^T,      H = E[x x^T] over calibration inputs x [K]
is far below that of rounding to nearest; `descend` and `refit` lower it further and never raise it (beyond the
rounding of scales). To round is to take the nearest value of the grid, evenly spaced or a table's.

`gptq` visits inputs in order of falling H[k, k] (activation order): the code of input k is rounded to nearest and
the error is compensated in the inputs not yet visited through the upper Cholesky factor of H^-1, in blocks, so that most
of the work is a matrix product. Groups keep their natural place, because the grid is decided before ("static groups").
`descend` then revisits every code with all others fixed: the best value of input k is v_k + ((w - v) H)_k / H[k, k].
`refit` solves for the scales of a row that are best for its codes: a small linear system of groups x groups.
Damping adds a share of the mean diagonal to H's diagonal; where H is still not positive definite the share is raised
tenfold until it is, and the caller is told through `factorize`'s second result.

Sources: Frantar et al. 2023, "GPTQ"; the revisiting of codes is cyclic coordinate descent (Behdin et al. 2023,
"QuantEase").
"""

import math

import torch
from torch import Tensor

from compress.quantizing.grid import Grid
from runtime.errors import UserError

DAMPING = 0.01
BLOCK = 128


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H with `damping` times its mean diagonal added to the diagonal, float32 [K, K]; silent inputs count as unit ones."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())                             # the one number that the host reads of a device
    if not math.isfinite(mean):
        raise UserError("calibration gave activations that are not finite: the checkpoint is broken at this layer")
    if mean <= 0:
        raise UserError("calibration gave activations that are all zero: the layer is dead, so leave it out of --method gptq")
    return hessian + torch.diag(torch.full_like(diagonal, mean * damping))


def factorize(hessian: Tensor, order: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of (H permuted by `order`)^-1 = U^T U, float32 [K, K], and the damping it took.

    Computed in float64. Raises UserError where activations are zero or not finite, or no damping helps.
    """
    while damping <= 1:
        matrix = damped(hessian, damping).double()[order][:, order]
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper.float(), damping
        damping *= 10
    raise UserError("the Hessian of the calibration activations is not positive definite, whatever the damping: "
                    "give more or other calibration text")


def activation_order(hessian: Tensor) -> Tensor:
    """Inputs by falling mean square."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, act_order: bool = True, damping: float = DAMPING,
         factor: Tensor | None = None) -> Tensor:
    """Codes [N, K] (float32) of weight [N, K] on `grid`, for inputs with second moment hessian [K, K].

    factor: `factorize`'s of the same hessian and order, where several weights share their inputs.
    """
    order = activation_order(hessian) if act_order else torch.arange(len(hessian), device=hessian.device)
    if factor is None:
        factor, _ = factorize(hessian, order, damping)
    scales, low, high = (t[order] for t in _by_column(grid, weight.shape[1]))
    rounded = grid.rounding()
    left = weight.t().contiguous()[order]                     # [K, N]: one input's weights lie together
    steps, pivots = torch.empty_like(left), factor.diagonal().unbind()
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for k, here, error, scale, step, least, most in zip(
                range(start, stop), *(t.unbind() for t in (left[start:stop], errors)),
                *(t[start:stop].unbind() for t in (scales, steps, low, high))):
            rounded(torch.div(here, scale, out=step), least, most)
            torch.mul(step, scale, out=error)
            torch.sub(here, error, out=error).div_(pivots[k])
            if k + 1 < stop:
                left[k + 1:stop].addr_(factor[k, k + 1:stop], error, alpha=-1)
        if stop < len(left):
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(steps)
    result[order] = steps
    return grid.codes_of(result.t().contiguous())


def descend(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, passes: int = 1) -> Tensor:
    """Codes with no greater loss, after `passes` rounds of coordinate descent; hessian as `damped` gives it."""
    scales, low, high = _by_column(grid, weight.shape[1])
    rounded, steps = grid.rounding(), grid.steps(codes).t().contiguous()
    values = steps * scales
    slope = hessian @ (weight.t() - values)                   # [K, N], minus half the gradient
    diagonal, better = hessian.diagonal().unbind(), torch.empty_like(values)
    for _ in range(passes):
        for start in range(0, len(steps), BLOCK):
            stop = min(start + BLOCK, len(steps))
            local, moves = slope[start:stop].clone(), torch.empty_like(slope[start:stop])
            for k, slant, move, scale, step, least, most, value, best in zip(
                    range(start, stop), local.unbind(), moves.unbind(),
                    *(t[start:stop].unbind() for t in (scales, steps, low, high, values, better))):
                rounded(torch.addcdiv(value, slant, diagonal[k], out=step).div_(scale), least, most)
                torch.mul(step, scale, out=best)
                torch.sub(best, value, out=move)
                if k + 1 < stop:
                    local[k + 1 - start:].addr_(hessian[k, k + 1:stop], move, alpha=-1)
            slope.addmm_(hessian[:, start:stop], moves, alpha=-1)
        values, better = better, values
    return grid.codes_of(steps.t().contiguous())


def _by_column(grid: Grid, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of every weight, and its first and last value in scales: code - zero, for the codes 0 and top; each [K, N], so that one
    input's lie together. What is done to one input is as few kernels as can be: on a GPU their number is the time it takes."""
    scales, zeros = (t.t().contiguous() for t in grid.columns(columns))
    return scales, -zeros, grid.top - zeros


def refit(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The grid with each row's scales replaced by those of least loss for these codes; hessian as `damped` gives it."""
    rows, columns = weight.shape
    groups = grid.scales.shape[1]
    blocks = hessian.view(groups, columns // groups, columns)
    scales = torch.empty_like(grid.scales)
    step = max(1, (1 << (22 if weight.device.type == "cpu" else 25)) // (groups * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        steps = grid.rows(start, stop).steps(codes[start:stop]).unflatten(1, (groups, -1))          # [n, G, K/G]
        moments = torch.bmm(steps.transpose(0, 1), blocks)                                          # [G, n, K]
        right = (moments * weight[start:stop]).sum(-1).t()
        matrix = (moments.unflatten(2, (groups, -1)) * steps).sum(-1).permute(1, 0, 2)              # [n, G, G]
        # A group of zeros leaves its scale undetermined: a little weight on the scale it had settles it.
        ridge = 1e-4 * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30).expand(-1, groups)
        solved, _ = torch.linalg.solve_ex(matrix + torch.diag_embed(ridge), right + ridge * grid.scales[start:stop])     # asks no device
        before = grid.scales[start:stop]
        sound = (solved * before > 0) & solved.isfinite()                                           # neither another sign nor NaN
        scales[start:stop] = torch.where(sound, solved, before)
    return grid.with_scales(scales)
