"""The quantized format against its own definition, written out in Python integers and float64."""

import numpy as np
import pytest
import torch

from models.network.quantized import BITS, Quantization, QuantizedTensor, TensorFormat, byte_scales, pack, unpack
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


@pytest.mark.parametrize("kind, bits, symmetric", [("levels", 2, True), ("levels", 3, True), ("levels", 4, True), ("int", 4, True),
                                                   ("int", 6, False), ("int", 8, False)])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_values_of_levels_and_of_scales_in_a_byte(kind, bits, symmetric, scale_bits):
    """By the format's definition, from the bytes that are stored."""
    form, random = TensorFormat(bits, 16, symmetric, kind, scale_bits), np.random.default_rng(bits)
    parts = {"codes": random.integers(0, 256, (4, 48 * bits // 8), dtype=np.uint8)}
    wide = {"scales": random.normal(size=(4, 3)).astype(np.float16)}
    small = {"scales": random.integers(1, 128, (4, 3)).astype(np.int8) * random.choice([-1, 1], (4, 3)).astype(np.int8),
             "row_scales": random.uniform(1e-7, 1e-2, (4, 1)).astype(np.float16)}
    small["scales"][:, 1] = [127, -127, 127, 127]
    parts |= small if scale_bits == 8 else wide
    if kind == "levels":
        parts["levels"] = np.sort(random.choice(np.arange(-127, 128), 2**bits, replace=False)).astype(np.int8)
    if not symmetric:
        parts["zeros"] = random.integers(0, 2**bits, (4, 3), dtype=np.uint8)
    tensor = QuantizedTensor.stored(form, 48, {suffix: torch.from_numpy(part.copy()) for suffix, part in parts.items()})
    for n in range(4):
        stream = int.from_bytes(parts["codes"][n].tobytes(), "little")
        for k in range(48):
            code, g = stream >> (k * bits) & (2**bits - 1), k // 16
            step = int(parts["levels"][code]) if kind == "levels" else code - (2 ** (bits - 1) if symmetric else int(parts["zeros"][n, g]))
            scale = np.float64(parts["scales"][n, g]) * (np.float64(parts["row_scales"][n, 0]) if scale_bits == 8 else 1)
            assert tensor.dequantize()[n, k] == np.float32(step * scale)
    assert tensor.format == form
    again = tensor.tensors("m")
    assert list(again) == [f"m.{suffix}" for suffix in form.stored_shapes(4, 48)] and set(again) == {f"m.{suffix}" for suffix in parts}
    assert all(np.array_equal(again[f"m.{suffix}"].numpy(), part) for suffix, part in parts.items())
    assert {f"m.{k}": v for k, v in form.stored_shapes(4, 48).items()} == {k: (v.dtype, tuple(v.shape)) for k, v in again.items()}


def test_scales_in_a_byte_are_near_and_stay_the_same():
    """Of every magnitude that weights have, of groups without any, and of one that is far larger than the others."""
    scales = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(64.0)[:, None].div(10)
    scales[3], scales[4, 1:], scales[5, 0] = 0, 0, 1e30
    codes, rows = byte_scales(scales)
    stands_for = codes.float() * rows.float()
    assert (codes.int().abs().amax(1) == 127).all() and codes.int().abs().min() >= 1 and rows.min() > 0 and rows.isfinite().all()
    usual = torch.tensor([n for n in range(64) if n not in (3, 4, 5) and scales[n].abs().amax() > 1e-3])
    most = scales.abs().amax(1, keepdim=True)
    assert len(usual) > 25 and ((stands_for - scales).abs() <= (0.5 + 0.005 * 127) / 127 * most)[usual].all()
    assert (stands_for.sign() == scales.sign())[usual].all()
    twice = byte_scales(stands_for)
    assert torch.equal(twice[0], codes) and torch.equal(twice[1], rows)


@pytest.mark.parametrize("change, words", [
    ({"levels": [-5, -5, 1, 9]}, "levels holds -5, -5, 1, 9, which should rise strictly"),
    ({"levels": [-5, -6, 1, 9]}, "rise strictly"), ({"levels": [-128, -6, 1, 9]}, "within -127"),
    ({"scales": [[3, 0]]}, "scales holds 0 or -128"), ({"scales": [[3, -128]]}, "scales holds 0 or -128"),
    ({"row_scales": [[0.0]]}, "row_scales holds 0, which should be positive"), ({"row_scales": [[-1.0]]}, "row_scales holds -1")])
def test_levels_and_scales_that_cannot_be_are_refused(change, words):
    parts = {"codes": [[1] * 16], "scales": [[3, -4]], "row_scales": [[1.0]], "levels": [-9, -1, 2, 5]} | change
    form = TensorFormat(2, 32, kind="levels", scale_bits=8)
    dtypes = {suffix: dtype for suffix, (dtype, _) in form.stored_shapes(1, 64).items()}
    with pytest.raises(UserError, match=words):
        QuantizedTensor.stored(form, 64, {suffix: torch.tensor(part, dtype=dtypes[suffix]) for suffix, part in parts.items()})


@pytest.mark.parametrize("form, version", [(TensorFormat(8, 0, False), 1), (TensorFormat(3, 32, kind="levels"), 2),
                                           (TensorFormat(5, 32, scale_bits=8), 2)])
def test_description_round_trips(form, version):
    description = Quantization({"a": TensorFormat(4, 32), "b": form}, kv_cache={"bits": 8, "per": "channel"})
    assert Quantization.from_dict(description.to_dict()) == description
    assert description.to_dict()["version"] == version and description.to_dict()["tensors"]["a"] == {"bits": 4, "group": 32, "symmetric": True}
    if version == 2:
        with pytest.raises(UserError, match="of b has levels or 8-bit scales, which version 1 does not know"):
            Quantization.from_dict(description.to_dict() | {"version": 1})


GOOD = {"quant_method": "edgewright", "version": 1, "tensors": {"m": {"bits": 4, "group": 32, "symmetric": True}},
        "activations": {}, "kv_cache": None}


@pytest.mark.parametrize("change, words", [
    ({"version": 3}, "version 3 is not supported.*versions 1 and 2"),
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
    ({"version": 2, "tensors": {"m": {"bits": 5, "group": 32, "kind": "levels"}}}, "levels with 2 to 4 bits"),
    ({"version": 2, "tensors": {"m": {"bits": 4, "group": 32, "kind": "levels", "symmetric": False}}}, "without zero points"),
    ({"version": 2, "tensors": {"m": {"bits": 4, "group": 0, "scale_bits": 8}}}, "scale_bits is 8"),
    ({"version": 2, "tensors": {"m": {"bits": 4, "group": 32, "scale_bits": 4}}}, "scale_bits is 4"),
])
def test_bad_descriptions_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        Quantization.from_dict(GOOD | change)
