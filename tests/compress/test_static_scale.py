"""The static scale of int8 activations against a search over every scale."""

import pytest
import torch

from compress.quantizing.calibrated import SAMPLE, static_scale
from models.network.activations import fake_int8


def error(x, scale, importance):
    return float(((fake_int8(x, scale) - x).square() @ importance).sum())


@pytest.mark.parametrize("tail", [1.0, 30.0])
def test_a_long_tail_is_clipped_and_a_short_one_is_not(tail):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, SAMPLE // 4, 64, generator=generator).clamp(-3, 3)
    x[0, 0, 0] = 3 * tail                                            # one value among 131,072
    importance = torch.rand(64, generator=generator)
    rows, scale = x.flatten(0, 1), static_scale(list(x.split(1)), importance)
    best = min(error(rows, torch.tensor([3 * tail / 127 * ratio]), importance) for ratio in torch.linspace(0.05, 1, 96))
    assert error(rows, scale, importance) < 1.5 * best
    assert scale == x.max() / 127 if tail == 1 else scale < 0.8 * x.max() / 127


def test_what_matters_is_what_the_weights_behind_make_of_it():
    """An outlier in an input that nothing reads is clipped; in one that all depends on, it is kept."""
    x = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    read, unread = torch.ones(8), torch.ones(8)
    read[3], unread[3] = 100.0, 0.0
    assert static_scale([x], read) == x.abs().max() / 127 and static_scale([x], unread) < 0.2 * x.abs().max() / 127


def test_silence_has_a_scale():
    assert static_scale([torch.zeros(1, 5, 4)], torch.ones(4)) == 1
