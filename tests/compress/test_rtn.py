"""Round to nearest against its definition in float64, one group at a time."""

import numpy as np
import pytest
import torch

from compress.quantizing.rtn import round_to_nearest
from models.network.quantized import TensorFormat
from runtime.errors import UserError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest_on_the_fp16_grid(bits, group, symmetric):
    weight = np.random.default_rng(bits).normal(size=(16, 64)).astype(np.float32)
    weight[3] += 2.0                      # a group with no value below zero
    tensor = round_to_nearest(torch.from_numpy(weight), TensorFormat(bits, group, symmetric))
    width, top = group or 64, 2**bits - 1
    for n in range(16):
        for g in range(64 // width):
            values = weight[n, g * width:(g + 1) * width].astype(np.float64)
            if symmetric:
                ideal, zero = np.abs(values).max() / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
                assert tensor.zeros is None
            else:
                ideal, zero = (max(values.max(), 0) - min(values.min(), 0)) / top, int(tensor.zeros[n, g])
            scale = float(tensor.scales[n, g])
            assert scale == pytest.approx(ideal, rel=2**-11)                # fp16's half step
            grid = (np.arange(top + 1) - zero) * scale
            best = np.abs(values[:, None] - grid).min(1)
            mine = grid[tensor.codes[n, g * width:(g + 1) * width].numpy()]
            np.testing.assert_allclose(np.abs(values - mine), best, atol=1e-6)
            if not symmetric:                                               # the zero point fits the range
                assert np.abs(values - mine).max() <= 0.5001 * scale * (1 + 2**-7) + scale * 2**-10 * top


def test_a_group_of_zeros_and_a_huge_and_a_tiny_one():
    weight = torch.zeros(1, 96)
    weight[0, 32:64] = 3e5
    weight[0, 64:] = 1e-6
    for symmetric in (True, False):
        values = round_to_nearest(weight, TensorFormat(4, 32, symmetric)).dequantize()
        assert values.isfinite().all() and (values[0, :32] == 0).all()
        torch.testing.assert_close(values[0, 32:64], weight[0, 32:64], rtol=1e-3, atol=0)
        torch.testing.assert_close(values[0, 64:], weight[0, 64:], rtol=0.3, atol=0)     # fp16 is coarse down there


def test_a_group_that_does_not_divide():
    with pytest.raises(UserError, match="group of 32 does not divide the 40 inputs"):
        round_to_nearest(torch.zeros(2, 40), TensorFormat(4, 32))


def test_hqq_keeps_neural_compressors_grid():
    """HQQ's scales as they are; every value within half a step of zero point and half a step of rounding from its own."""
    pytest.importorskip("neural_compressor.torch.quantization")
    from neural_compressor.torch.quantization import HQQConfig, convert, prepare

    from compress.quantizing.neural_compressor import hqq
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    tensor = hqq(weight, TensorFormat(4, 64, False))
    linear = torch.nn.Linear(128, 32, bias=False)
    linear.weight.data = weight.reshape(-1, 64).T.reshape(32, 128).contiguous()
    theirs = convert(prepare(torch.nn.Sequential(linear), HQQConfig(bits=4, group_size=64, quant_zero=False, quant_scale=False)))[0]
    dense = theirs.dequantize_weight().float().reshape(64, -1).T.reshape(32, 128)
    assert torch.equal(tensor.scales.flatten(), theirs.q_weight.scale.flatten())
    steps = (tensor.dequantize() - dense).unflatten(1, (2, 64)) / tensor.scales.float()[:, :, None]
    assert steps.abs().max() <= 1.01
    assert (dense - weight).square().mean() < 0.02 * weight.square().mean()            # the groups are ours
    with pytest.raises(UserError, match="--no-symmetric"):
        hqq(weight, TensorFormat(4, 64))
