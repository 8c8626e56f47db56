"""The quantized format against its own definition, written out in Python integers and float64."""

import numpy as np
import pytest
import torch

from models.network.quantized import BITS, Quantization, QuantizedTensor, TensorFormat, pack, unpack
from runtime.errors import UserError


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 5, 8, 32, 577])
def test_packing_is_a_little_endian_bit_stream(bits, columns):
    codes = torch.randint(2**bits, (3, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    for row, stream in zip(codes.tolist(), packed):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(stream.tolist()) == number.to_bytes(-(-columns * bits // 8), "little")
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16])
def test_values_of_codes(bits, symmetric, group):
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (4, 48), dtype=np.uint8)
    scales = random.normal(size=(4, 48 // group if group else 1)).astype(np.float16)
    zeros = None if symmetric else random.integers(0, 2**bits, scales.shape, dtype=np.uint8)
    tensor = QuantizedTensor(torch.from_numpy(codes), torch.from_numpy(scales),
                             None if symmetric else torch.from_numpy(zeros), bits, group, symmetric)
    expected = np.empty((4, 48))
    for n in range(4):
        for k in range(48):
            g = k // group if group else 0
            zero = 2 ** (bits - 1) if symmetric else int(zeros[n, g])
            expected[n, k] = (int(codes[n, k]) - zero) * np.float64(scales[n, g])
    np.testing.assert_allclose(tensor.dequantize().numpy(), expected, rtol=1e-7)
    np.testing.assert_array_equal(tensor.signed().numpy(), codes.astype(int) - 2 ** (bits - 1))
    shapes = tensor.format.stored_shapes(4, 48)
    stored = tensor.tensors("m")
    assert {f"m.{k}": v for k, v in shapes.items()} == {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()}


def test_description_round_trips():
    description = Quantization({"a": TensorFormat(4, 32), "b": TensorFormat(8, 0, False)}, kv_cache={"bits": 8, "per": "channel"})
    assert Quantization.from_dict(description.to_dict()) == description


GOOD = {"quant_method": "edgewright", "version": 1, "tensors": {"m": {"bits": 4, "group": 32, "symmetric": True}},
        "activations": {}, "kv_cache": None}


@pytest.mark.parametrize("change, words", [
    ({"version": 2}, "version 2 is not supported.*version 1"),
    ({"version": None}, "version None"),
    ({"quant_method": "gptq"}, "'gptq'"),
    ({"tensors": None}, "tensors None"),
    ({"activations": 3}, "activations 3"),
    ({"kv_cache": "int8"}, "kv_cache 'int8'"),
    ({"tensors": {"m": {"bits": 9, "group": 32}}}, "of m .*bits is 9"),
    ({"tensors": {"m": {"bits": 4.0, "group": 32}}}, "bits is 4.0"),
    ({"tensors": {"m": {"bits": 4, "group": -1}}}, "group is -1"),
    ({"tensors": {"m": {"bits": 4, "group": 32, "symmetric": 1}}}, "symmetric is 1"),
    ({"tensors": {"m": {"bits": 4}}}, "of m cannot be used"),
    ({"tensors": {"m": {"bits": 4, "group": 32, "colour": 1}}}, "colour"),
    ({"tensors": {"m": None}}, "of m cannot be used"),
])
def test_bad_descriptions_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        Quantization.from_dict(GOOD | change)
