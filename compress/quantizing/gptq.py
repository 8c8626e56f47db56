"""GPTQ: codes that minimize the error of a layer's output, not of its weights.

`gptq(weight, hessian, grid)` gives codes on a given grid such that, per output row,
    loss = (w - v) H (w - v)^T,      H = E[x x^T] over calibration inputs x [K]
is far below that of rounding to nearest; `descend` and `refit` lower it further and never raise it (beyond the fp16
rounding of scales).

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

import torch
from torch import Tensor

from compress.quantizing.grid import Grid
from runtime.errors import UserError

DAMPING = 0.01
BLOCK = 128


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H with `damping` times its mean diagonal added to the diagonal, float32 [K, K]; silent inputs count as unit ones."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise UserError("calibration gave activations that are not finite: the checkpoint is broken at this layer")
    if mean <= 0:
        raise UserError("calibration gave activations that are all zero: the layer is dead, so leave it out of --method gptq")
    return hessian + torch.diag(torch.full_like(diagonal, float(mean) * damping))


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
    order = activation_order(hessian) if act_order else torch.arange(len(hessian))
    if factor is None:
        factor, _ = factorize(hessian, order, damping)
    scales, zeros = (t.t().contiguous()[order] for t in grid.columns(weight.shape[1]))
    left = weight.t().contiguous()[order]                     # [K, N]: one input's weights lie together
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for k in range(start, stop):
            code = (left[k] / scales[k]).round_().add_(zeros[k]).clamp_(0, grid.top)
            codes[k] = code
            error = torch.sub(left[k], (code - zeros[k]).mul_(scales[k]), out=errors[k - start]).div_(factor[k, k])
            if k + 1 < stop:
                left[k + 1:stop].addr_(factor[k, k + 1:stop], error, alpha=-1)
        if stop < len(left):
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def descend(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, passes: int = 1) -> Tensor:
    """Codes with no greater loss, after `passes` rounds of coordinate descent; hessian as `damped` gives it."""
    scales, zeros = (t.t().contiguous() for t in grid.columns(weight.shape[1]))
    codes = codes.t().contiguous()
    values = (codes - zeros) * scales
    slope = hessian @ (weight.t() - values)                   # [K, N], minus half the gradient
    diagonal = hessian.diagonal()
    for _ in range(passes):
        for start in range(0, len(codes), BLOCK):
            stop = min(start + BLOCK, len(codes))
            local, moves = slope[start:stop].clone(), torch.empty_like(slope[start:stop])
            for k in range(start, stop):
                best = values[k] + local[k - start] / diagonal[k]
                code = best.div_(scales[k]).round_().add_(zeros[k]).clamp_(0, grid.top)
                value = (code - zeros[k]).mul_(scales[k])
                move = torch.sub(value, values[k], out=moves[k - start])
                codes[k], values[k] = code, value
                local[k + 1 - start:].addr_(hessian[k, k + 1:stop], move, alpha=-1)
            slope.addmm_(hessian[:, start:stop], moves, alpha=-1)
    return codes.t().contiguous()


def refit(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The grid with each row's scales replaced by those of least loss for these codes; hessian as `damped` gives it."""
    rows, columns = weight.shape
    groups = grid.scales.shape[1]
    blocks = hessian.view(groups, columns // groups, columns)
    scales = torch.empty_like(grid.scales)
    step = max(1, (1 << 22) // (groups * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        steps = codes[start:stop].unflatten(1, (groups, -1)) - grid.zeros[start:stop, :, None]      # [n, G, K/G]
        moments = torch.bmm(steps.transpose(0, 1), blocks)                                          # [G, n, K]
        right = (moments * weight[start:stop]).sum(-1).t()
        matrix = (moments.unflatten(2, (groups, -1)) * steps).sum(-1).permute(1, 0, 2)              # [n, G, G]
        # A group of zeros leaves its scale undetermined: a little weight on the scale it had settles it.
        ridge = 1e-4 * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30).expand(-1, groups)
        solved = torch.linalg.solve(matrix + torch.diag_embed(ridge), right + ridge * grid.scales[start:stop])
        before = grid.scales[start:stop]
        scales[start:stop] = torch.where(solved * before > 0, solved, before)      # neither another sign nor NaN
    return grid.with_scales(scales)
