"""Rounding to nearest on a device gives the CPU's codes and scales to the bit, of weights of every bit pattern."""

import pytest
import torch

from compress.quantizing.rtn import round_to_nearest
from models.network.quantized import TensorFormat


@pytest.mark.parametrize("form", (TensorFormat(4, 32), TensorFormat(3, 64), TensorFormat(8, 0), TensorFormat(4, 32, False), TensorFormat(6, 128, False),
                                  TensorFormat(8, 32, kind="e4m3")), ids=str)
def test_the_same_to_the_bit(form, device):
    weight = torch.randn(16384, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    wanted, found = round_to_nearest(weight, form), round_to_nearest(weight.to(device), form)
    for one, other in zip(wanted.tensors("m").values(), found.tensors("m").values(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.cpu().view(torch.uint8))
