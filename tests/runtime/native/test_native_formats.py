"""Tables of levels and 8-bit scales in the native core, from the real writer: against PyTorch from the same codes, on every
instruction set of this CPU; and what of them is refused by name."""

import json

import numpy as np
import pytest
import torch
from checkpoints import small_config, write_bundle

from models.network.quantized import TensorFormat
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.native import backend as module
from runtime.native import library
from runtime.native.backend import NativeBackend

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

AMX = library.load().ew_isa(None) == b"avx512-amx"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")
LEVELS = [TensorFormat(bits, group, kind="levels", scale_bits=scale_bits) for bits in (2, 3, 4)
          for group, scale_bits in ((32, 8), (64, 8), (0, 16))]
NARROW = [TensorFormat(bits, 32, symmetric, scale_bits=8) for bits, symmetric in
          ((4, True), (4, False), (8, True), (8, False), (2, False), (3, True), (5, False), (6, True), (4, True))]


def each(forms):
    """formats() for `write_bundle`: every linear one of its own, the second layer's turned by one."""
    def chosen(name):
        at = LINEARS.index(name.rpartition(".")[2])
        return forms[(at + ("layers.1." in name)) % len(forms)]
    return chosen


def config():
    return small_config(hidden_size=64, layers=[(4, 2, 192)] * 2, tied_embeddings=False, attention_bias=True, output_bias=True)


def everything(backend, ids):
    cache = backend.new_cache(len(ids), 64)
    return backend.forward(ids, None, np.zeros(len(ids), np.int64), np.tile(np.arange(ids.shape[1]), (len(ids), 1)), cache).copy()


@pytest.mark.parametrize("forms", [LEVELS, NARROW, NARROW[:1], LEVELS[3:4]], ids=["levels", "8-bit scales", "one format", "levels everywhere"])
def test_agrees_with_pytorch_and_with_itself(tmp_path, forms):
    bundle, decoder = write_bundle(tmp_path, config(), each(forms))
    ids = np.random.default_rng(0).integers(0, 384, (2, 45))
    with torch.no_grad():
        expected = decoder(torch.tensor(ids)).numpy()
    for isa in ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "plain"):
        try:
            exact, backend = (NativeBackend(bundle, threads=2, exact=exact, isa=isa, cache_dtype="float32") for exact in (True, False))
        except UserError:
            continue
        assert np.abs(everything(exact, ids) - expected).max() < 1e-4, isa
        found = everything(backend, ids)
        assert 0 < np.sqrt(((found - expected) ** 2).mean()) < 0.05 * expected.std(), isa
        cache = backend.new_cache(1, 64)                 # one token at a time, the same bits
        for at in range(6):
            logits = backend.forward(ids[:1, at:at + 1], None, np.array([at]), np.zeros((1, 1), np.int64), cache)
            assert np.array_equal(logits[0, 0], found[0, at]), isa
    if AMX:
        assert np.sqrt(((everything(NativeBackend(bundle, threads=2), ids) - expected) ** 2).mean()) < 0.05 * expected.std()


def test_what_is_damaged_is_named(tmp_path, monkeypatch):
    bundle, _ = write_bundle(tmp_path, config(), each([TensorFormat(3, 32, kind="levels", scale_bits=8)]))
    weights, tensors = bundle.path("weights.bin"), {t["name"]: t for t in bundle.manifest["weights"]["tensors"]}
    whole, name = weights.read_bytes(), "layers.1.down"
    levels = list(np.frombuffer(whole, np.int8, 8, tensors[f"{name}.levels"]["offset"]))
    half = [np.float16(value).tobytes() for value in (0, -1, np.inf, np.nan)]
    for suffix, values, words in [
            ("levels", [bytes(np.int8([*levels[:3], levels[2], *levels[4:]])), bytes(np.int8(levels[::-1])), bytes(np.int8([-128, *levels[1:]]))],
             "down.levels should hold the int8 levels of 3 bits, strictly rising"),
            ("scales", [b"\0", b"\x80"], "down.codes holds a scale of 0 or -128"), ("row_scales", half, "down.codes.*not a positive finite number")]:
        for value in values:
            at = tensors[f"{name}.{suffix}"]["offset"]
            weights.write_bytes(whole[:at] + value + whole[at + len(value):])
            with pytest.raises(UserError, match=words):
                NativeBackend(bundle)
    weights.write_bytes(whole)
    NativeBackend(bundle).close()

    def without(suffix):
        manifest = json.loads(json.dumps(bundle.manifest))
        manifest["weights"]["tensors"] = [t for t in manifest["weights"]["tensors"] if t["name"] != f"{name}.{suffix}"]
        return Bundle(bundle.folder, manifest)

    for suffix in ("row_scales", "levels", "scales"):
        with pytest.raises(UserError, match=f"lack {name}.{suffix}"):
            NativeBackend(without(suffix))
    monkeypatch.setattr(module, "check_tensors", lambda bundle: {"tensors": {}, "activations": {}, "kv_cache": None})
    with pytest.raises(UserError, match=f"{name}.row_scales is missing"):      # and the core, by itself
        NativeBackend(without("row_scales"))
