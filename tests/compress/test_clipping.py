"""Grids: rounding against a float64 reference, clipping against brute force over scales."""

import pytest
import torch

from compress.quantizing.clipping import clipped_grid, fitted
from compress.quantizing.levels import rising, start
from compress.quantizing.grid import fp16
from models.network.quantized import QuantizedTensor, TensorFormat, check_levels
from runtime.errors import UserError

FORMS = [TensorFormat(bits, group, symmetric) for bits in range(2, 9) for group, symmetric in ((32, True), (0, False))]
FORMS += [TensorFormat(bits, 32, kind="levels", scale_bits=scale_bits) for bits in (2, 3, 4) for scale_bits in (8, 16)]
FORMS += [TensorFormat(5, 32, False, scale_bits=8)]


def error(weight, grid, importance):
    return ((grid.values(grid.codes(weight)) - weight).square() * importance).sum(1)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_nearest_values_of_the_grid(form):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(form.bits)) * 0.1
    grid = clipped_grid(weight, form)
    codes = grid.codes(weight)
    scales, zeros = (t.double() for t in grid.columns(64))
    steps = torch.arange(2.0**form.bits)[:, None, None] - zeros if grid.levels is None else grid.levels[:, None, None].double()
    every = steps * scales                                                            # all values of each weight's grid
    distance = (every - weight.double()).abs()
    chosen = distance.gather(0, codes.long()[None])[0]
    assert torch.allclose(chosen, distance.amin(0), atol=1e-7)
    tensor = grid.tensor(codes)
    assert torch.equal(tensor.dequantize(), grid.values(codes))
    assert torch.equal(tensor.scales.float(), grid.scales)
    assert torch.equal(QuantizedTensor.stored(form, 64, {name[2:]: part for name, part in tensor.tensors("m").items()}).dequantize(),
                       tensor.dequantize())
    assert tensor.zeros is None and (grid.zeros == 2 ** (form.bits - 1)).all() or torch.equal(tensor.zeros.float(), grid.zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_near_the_best_scale_that_brute_force_finds(bits):
    generator = torch.Generator().manual_seed(bits)
    weight, importance = torch.randn(24, 32, generator=generator), torch.rand(32, generator=generator) + 0.01
    found = error(weight, clipped_grid(weight, TensorFormat(bits, 0), importance), importance)
    half = 2 ** (bits - 1)
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.full((24,), float("inf"))
    for fraction in torch.linspace(0.2, 1.3, 1200):
        for sign in (1, -1):
            scale = fp16(sign * fraction * largest / half)
            values = (weight / scale).round().clamp(-half, half - 1) * scale
            best = torch.minimum(best, ((values - weight).square() * importance).sum(1))
    assert found.sum() < 1.08 * best.sum()


@pytest.mark.parametrize("bits, most", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_a_table_of_a_normal_variable_is_max_s(bits, most):
    """The squared errors that Max 1960 prints, of one scale for all; int8 values cost no more than a part in a hundred."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    steps = start(bits).float() * ({2: 1.5104, 3: 2.1520, 4: 2.7326}[bits] / 127)
    error = torch.stack([(x - step).square() for step in steps]).amin(0).mean()
    assert 0.99 * most < error < 1.01 * most


def test_a_fitted_table_finds_the_values_that_are_there():
    """Weights of four values, in groups of every size and sign: 2 bits lose nothing, where even steps lose much."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([-127.0, -20.0, 30.0, 90.0])
    weight = true[torch.randint(0, 4, (64, 128), generator=generator)]
    weight[:, ::32] = -127                                                    # every group shows its end
    weight = weight * torch.randn(64, 4, generator=generator).repeat_interleave(32, 1)
    form, importance = TensorFormat(2, 32, kind="levels"), torch.rand(128, generator=generator) + 0.1
    levels = fitted(weight, form, importance)
    assert (levels - true).abs().max() <= 1 or (levels + true.flip(0)).abs().max() <= 1
    lost, plain = (error(weight, clipped_grid(weight, one, importance), importance).sum() for one in (form, TensorFormat(2, 32)))
    assert lost < 0.002 * plain


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 1.0], [-1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -0.999, -0.998], [1e-9, 2e-9, 3e-9, 1.0]])
def test_a_table_rises_whatever_it_is_made_of(values):
    check_levels(rising(torch.tensor(values)))
    check_levels(rising(torch.tensor(values * 4).sort().values))


def test_importance_moves_the_grid_to_what_matters():
    weight = torch.tensor([[3.0] + [0.1, -0.2, 0.3, 0.15] * 4 + [0.0] * 15])
    small = torch.ones(32)
    small[0] = 0.001
    low = clipped_grid(weight, TensorFormat(3, 0), small)
    plain = clipped_grid(weight, TensorFormat(3, 0))
    assert error(weight, low, small) < error(weight, plain, small)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_all_zero_stay_zero(symmetric):
    weight = torch.zeros(2, 32)
    grid = clipped_grid(weight, TensorFormat(4, 32, symmetric))
    assert torch.equal(grid.values(grid.codes(weight)), weight)
    assert torch.isfinite(grid.scales).all() and (grid.scales != 0).all()


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="group of 32 does not divide the 48 inputs"):
        clipped_grid(torch.randn(2, 48), TensorFormat(4, 32))
