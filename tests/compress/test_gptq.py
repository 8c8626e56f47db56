"""GPTQ, coordinate descent and the refit of scales against neural-compressor, brute force and float64 references."""

import itertools

import pytest
import torch

import far
from compress.quantizing.calibrated import gptq_descended
from compress.quantizing.clipping import clipped_grid
from compress.quantizing.gptq import DAMPING, activation_order, damped, descend, factorize, gptq, refit
from compress.quantizing.grid import Grid
from compress.quantizing.rtn import minmax_grid
from models.network.quantized import TensorFormat
from runtime.errors import UserError


def layer(rows=48, columns=128, tokens=512, seed=0):
    """A weight and the second moment of correlated inputs with a few loud channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, ::17] *= 8
    return weight, x.T @ x / tokens, x


def loss(weight, hessian, values):
    """(w - v) H (w - v)^T of each row."""
    error = weight - values
    return ((error @ hessian) * error).sum(1)


def reference_gptq(weight, hessian, grid):
    """Frantar et al.'s equations one by one in float64: after each rounding, the inverse of what is left of H."""
    w, h = weight.double().clone(), damped(hessian).double()
    scales, zeros = (t.double() for t in grid.columns(w.shape[1]))
    left, codes = activation_order(hessian), torch.zeros_like(w)
    while len(left):
        k = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        steps = torch.arange(grid.top + 1.0) - zeros[:, k, None] if grid.levels is None else grid.levels.expand(len(w), -1)
        codes[:, k] = (w[:, k, None] - steps * scales[:, k, None]).abs().argmin(1).double()
        error = (w[:, k] - steps.gather(1, codes[:, k, None].long())[:, 0] * scales[:, k]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("form", [TensorFormat(4, 32), TensorFormat(3, 32, False), TensorFormat(2, 0), TensorFormat(8, 64),
                                  TensorFormat(2, 0, kind="levels"), TensorFormat(4, 32, kind="levels", scale_bits=8)])
def test_equals_the_equations_in_float64(form):
    weight, hessian, _ = layer()
    grid = clipped_grid(weight, form, hessian.diagonal())
    codes, expected = gptq(weight, hessian, grid), reference_gptq(weight, hessian, grid)
    assert (codes == expected).float().mean() > 0.995          # float32 may round a near tie the other way
    h = damped(hessian)
    assert loss(weight, h, grid.values(codes)).sum() <= loss(weight, h, grid.values(expected.float())).sum() * 1.01


def test_blocks_and_shared_factor_do_not_change_the_result():
    weight, hessian, _ = layer(columns=320)                    # three blocks, the last one short
    grid = clipped_grid(weight, TensorFormat(4, 32), hessian.diagonal())
    factor, _ = factorize(hessian, activation_order(hessian))
    both = gptq(weight, hessian, grid, factor=factor)
    halves = [gptq(weight[rows], hessian, Grid(grid.scales[rows], grid.zeros[rows], grid.format), factor=factor)
              for rows in (slice(0, 20), slice(20, 48))]
    assert torch.equal(both, torch.cat(halves))
    assert (both == reference_gptq(weight, hessian, grid)).float().mean() > 0.99


@pytest.mark.parametrize("bits, kind", [(2, "int"), (3, "int"), (4, "int"), (2, "levels"), (4, "levels")])
def test_every_step_lowers_the_loss(bits, kind):
    weight, hessian, _ = layer()
    form, h = TensorFormat(bits, 32, kind=kind), damped(hessian)
    grid = clipped_grid(weight, form, hessian.diagonal())
    nearest = loss(weight, h, grid.values(grid.codes(weight)))
    codes = gptq(weight, hessian, grid)
    solved = loss(weight, h, grid.values(codes))
    assert solved.sum() < 0.8 * nearest.sum()
    better = descend(weight, h, grid, codes, passes=2)
    descended = loss(weight, h, grid.values(better))
    assert (descended <= solved * 1.0001).all() and descended.sum() < solved.sum()
    fitted = refit(weight, h, grid, better)
    assert loss(weight, h, fitted.values(better)).sum() < descended.sum()


@pytest.mark.parametrize("kind", ["int", "levels"])
def test_descent_ends_where_no_single_code_improves(kind):
    weight, hessian, _ = layer(rows=4, columns=32)
    grid, h = clipped_grid(weight, TensorFormat(2, 0, kind=kind)), damped(hessian)
    codes = descend(weight, h, grid, grid.codes(weight), passes=50)
    best = loss(weight, h, grid.values(codes))
    for column, code in itertools.product(range(32), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert (loss(weight, h, grid.values(other)) >= best * (1 - 1e-4)).all()


def test_descent_and_gptq_against_all_code_words():
    """Four inputs, 2 bits: 256 code words a row; nothing beats the best, and the methods come near it."""
    weight, hessian, _ = layer(rows=64, columns=4, seed=3)
    grid, h = clipped_grid(weight, TensorFormat(2, 0)), damped(hessian)
    words = torch.cartesian_prod(*[torch.arange(4.0)] * 4)
    every = torch.stack([loss(weight, h, grid.values(word.expand(64, 4))) for word in words])
    best = every.amin(0)
    found = loss(weight, h, grid.values(descend(weight, h, grid, gptq(weight, hessian, grid), passes=5)))
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.25 * best.sum()


def test_refit_solves_the_normal_equations():
    weight, hessian, _ = layer(rows=6, columns=64)
    grid, h = clipped_grid(weight, TensorFormat(3, 16)), damped(hessian)
    codes = grid.codes(weight)
    fitted = refit(weight, h, grid, codes)
    root = torch.linalg.cholesky(h.double())
    for row in range(6):                                       # least squares on L^T w, one column per group
        design = torch.block_diag(*(codes[row] - 4).double().view(4, 16)).T
        solution = torch.linalg.lstsq(root.T @ design, root.T @ weight[row].double()).solution
        assert torch.allclose(fitted.scales[row].double(), solution, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
def test_no_worse_than_neural_compressor(act_order):
    """The same layer through neural-compressor's GPTQ: our reconstruction error is no greater."""
    module = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.gptq")
    weight, hessian, x = layer(rows=96, columns=256, tokens=2048)
    linear = torch.nn.Linear(256, 96, bias=False)
    linear.weight.data.copy_(weight)
    theirs = module.GPTQ(linear, weight.clone())
    theirs.quantizer.configure(dict(bits=4, perchannel=True, sym=True, mse=False, dtype="int", use_double_quant=False,
                                    double_quant_sym=True))
    theirs.add_batch(x[None], None)
    *_, dense = theirs.fasterquant(weight.clone(), groupsize=32, act_order=act_order, static_groups=True, percdamp=DAMPING)
    grid = clipped_grid(weight, TensorFormat(4, 32), hessian.diagonal())
    ours = grid.values(gptq(weight, hessian, grid, act_order=act_order))
    error = [(x @ (weight - values).T).square().mean() for values in (ours, dense)]
    assert error[0] <= error[1]
    plain = minmax_grid(weight, grid.format)
    nearest = (x @ (weight - plain.values(plain.codes(weight))).T).square().mean()
    assert error[1] < nearest                                  # the peer was set up properly


def test_a_singular_hessian_is_dampened():
    weight, _, x = layer(columns=64)
    x = x[:8]                                                  # 8 tokens cannot fill 64 dimensions
    hessian = x.T @ x / 8
    _, damping = factorize(hessian, activation_order(hessian))
    assert damping == DAMPING
    grid = clipped_grid(weight, TensorFormat(4, 32), hessian.diagonal())
    assert torch.isfinite(gptq(weight, hessian, grid)).all()


def test_an_indefinite_hessian_raises_the_damping_and_says_so():
    _, hessian, _ = layer()
    hessian = hessian - 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian))
    _, damping = factorize(hessian, activation_order(hessian))
    assert damping > DAMPING
    with pytest.raises(UserError, match="not positive definite"):
        factorize(torch.full((4, 4), 5.0).fill_diagonal_(1.0), torch.arange(4))


@pytest.mark.parametrize("value, words", [(0.0, "all zero"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_dead_or_broken_activations_are_refused(value, words):
    weight = torch.randn(4, 32)
    with pytest.raises(UserError, match=words):
        gptq(weight, torch.full((32, 32), value), clipped_grid(weight, TensorFormat(4, 32)))


def test_no_column_waits_for_the_host(device):
    """What the host reads of a device is as much for many inputs as for few."""
    if device.type != far.KIND:
        pytest.skip("a GPU does not count what is read of it")
    counts = []
    for columns in (64, 192):
        weight, hessian, _ = layer(rows=8, columns=columns)
        weight, hessian = weight.to(device), hessian.to(device)
        far.reads.clear()
        gptq_descended(weight, hessian, TensorFormat(4, 32))
        counts.append(len(far.reads))
    assert counts[0] == counts[1] < 10


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_and_scales_of_a_byte_lose_less_at_fewer_bytes(bits, monkeypatch):
    """Against even steps with fp16 scales, and in parts of rows as a token table comes: one table for all."""
    weight, hessian, _ = layer(rows=96, columns=256, tokens=2048)
    plain, small = (gptq_descended(weight, hessian, form).dequantize() for form in
                    (TensorFormat(bits, 32), TensorFormat(bits, 32, kind="levels", scale_bits=8)))
    assert loss(weight, hessian, small).sum() < 0.95 * loss(weight, hessian, plain).sum()
    monkeypatch.setattr("compress.quantizing.calibrated.PART", 40 * 256)
    parts = gptq_descended(weight, hessian, TensorFormat(bits, 32, kind="levels", scale_bits=8))
    assert torch.equal(parts.dequantize(), small) and len(parts.levels) == 2**bits
