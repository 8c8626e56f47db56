"""Every kind of layer and every way to attend: both graphs against PyTorch, ragged, in chunks, and through a cache that goes back."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
from anatomies import DELTA, MODELS, PLAIN, any_shape, coded, journey, model    # noqa: F401
from checkpoints import write_random
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, rel_entr

from compress import quantize
from export import onnx as export_onnx
from export import ort, verify
from models.checkpoint import load_decoder
from models.network.torch_backend import TorchBackend
from runtime import decode
from runtime.bundle import Bundle, open_bundle
from runtime.errors import UserError
from runtime.ort_backend import OrtBackend
from runtime.tensors import check_tensors

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("any_shape")


def bundle_of(checkpoint, out, *options):
    assert export_onnx.main([str(checkpoint), "-o", str(out), *options]) == 0 and ort.main([str(out)]) == 0
    return open_bundle(out, verify=True)


def difference(checkpoint, bundle, **how) -> float:
    backends = TorchBackend(load_decoder(checkpoint)), OrtBackend(bundle, **how)
    wanted, got = (log_softmax(journey(backend).astype(np.float64), axis=1) for backend in backends)
    return np.abs(wanted - got).max()


@pytest.mark.parametrize("name", MODELS)
def test_both_graphs_compute_what_pytorch_does(name, tmp_path):
    checkpoint = write_random(tmp_path / "c", MODELS[name])
    bundle = bundle_of(checkpoint, tmp_path / "b")
    for role in ("portable", "fast"):
        assert difference(checkpoint, bundle, role=role) < TOLERANCE, role


@pytest.mark.parametrize("name", ["another layer's cache", "convolution", "delta", "mamba", "experts, sigmoid", "inputs of every layer"])
def test_a_quantized_checkpoint_is_verified_on_every_runner(name, tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", MODELS[name], coded)
    bundle_of(checkpoint, tmp_path / "b")
    assert verify.main([str(checkpoint), str(tmp_path / "b"), "--threads", "1"]) == 0
    assert capsys.readouterr().out.count(": mean KL at most") == 3


@pytest.mark.parametrize("name", ["windows, sizes, tables", "convolution", "delta", "mamba", "lstm", "experts", "inputs of every layer"])
def test_float16_stays_close_and_states_stay_in_float32(name, tmp_path):
    checkpoint = write_random(tmp_path / "c", MODELS[name])
    bundle = bundle_of(checkpoint, tmp_path / "b", "--dtype", "fp16")
    p = log_softmax(journey(TorchBackend(load_decoder(checkpoint))).astype(np.float64), axis=1)
    for role in ("portable", "fast"):
        backend = OrtBackend(bundle, role=role)
        q = log_softmax(journey(backend).astype(np.float64), axis=1)
        assert np.median(rel_entr(np.exp(p), np.exp(q)).sum(axis=1)) < 1e-5         # a router's choice may fall otherwise here and there
        assert all(array.dtype == np.float32 for array in backend.new_cache(1, 64).states.arrays) if MODELS[name].recurrent else True


def test_keys_that_repeat_lose_nothing(tmp_path):
    """A row of one token: every key of a chunk is the same, nearly all is written anew, and nothing is forgotten. The product of the
    powers of such a matrix, the textbook's inverse, is of no use in float32."""
    checkpoint = write_random(tmp_path / "c", model(DELTA, PLAIN))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.linear_attn.dt_bias"] -= 20
    tensors["model.layers.0.linear_attn.b_proj.weight"] *= 50
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    tokens = np.full(200, 7)
    wanted = decode.logits(TorchBackend(load_decoder(checkpoint)), tokens)
    for role in ("portable", "fast"):
        assert np.abs(decode.logits(OrtBackend(bundle_of(checkpoint, tmp_path / "b"), role=role), tokens) - wanted).max() < TOLERANCE


def test_what_the_backend_allots_and_takes(tmp_path):
    bundle = bundle_of(write_random(tmp_path / "c", MODELS["delta"]), tmp_path / "b")
    backend = OrtBackend(bundle)
    cache = backend.new_cache(2, 64)
    assert cache.nbytes == sum(buffer.nbytes for buffer in cache.storage) + sum(array.nbytes for array in cache.states.arrays)
    assert backend.chunk == 64 and cache.view(1, 2).nbytes == backend.cache_bytes(1, 64)
    ids = np.zeros((2, 65), np.int64)
    with pytest.raises(UserError, match="fast.onnx takes at most 64 tokens of a row in one call, not 65"):
        backend.forward(ids, ids, np.zeros(2, np.int64), ids[:, :1], backend.new_cache(2, 128))
    decode.prefill(backend, cache, [np.arange(3, 12), np.arange(3, 8)])
    decode.step(backend, cache, np.array([5, 6]))
    with pytest.raises(UserError, match="row 1 cannot go back to 2 tokens"):
        cache.truncate(1, 2)


def test_a_table_for_heads_of_two_sizes_is_refused_by_name(tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", model(PLAIN, replace(PLAIN, head_dim=32)))
    assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "b")]) == 2
    assert "RoPE 0 is for heads of 16 and of 32" in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["windows, sizes, tables", "another layer's cache", "convolution", "delta", "mamba", "lstm", "experts, sigmoid",
                                  "inputs of every layer"])
def test_each_missing_tensor_is_named(name, tmp_path):
    bundle = bundle_of(write_random(tmp_path / "c", MODELS[name], coded), tmp_path / "b")
    for number, tensor in enumerate(bundle.manifest["weights"]["tensors"]):
        manifest = copy.deepcopy(bundle.manifest)
        del manifest["weights"]["tensors"][number]
        with pytest.raises(UserError, match=re.escape(tensor["name"])):
            check_tensors(Bundle(bundle.folder, manifest))
    for key, value in (("mixer", "odd"), ("experts", 10**12), ("experts", "4"), ("rope", 9)):
        manifest = copy.deepcopy(bundle.manifest)
        for layer in manifest["model"]["config"]["layers"]:
            layer[key] = value
        with pytest.raises(UserError, match="export the bundle again"):
            check_tensors(Bundle(bundle.folder, manifest))


def test_int8_caches_that_another_layer_reads(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "text.txt").write_text("The capital of France is Paris, and the capital of Italy is Rome. " * 60)
    assert quantize.main([str(tiny_checkpoint("gemma4")), "-o", str(tmp_path / "q"), "--method", "clip", "--data", str(tmp_path / "text.txt"),
                          "--windows", "2", "--length", "32", "--kv-cache", "channel", "--backend", "onnx"]) == 0
    assert export_onnx.main([str(tmp_path / "q"), "-o", str(tmp_path / "b")]) == 0
    assert ort.main([str(tmp_path / "b")]) == 2
    assert "layers that read another's keys and values cannot read them in int8" in capsys.readouterr().err
    backends = TorchBackend(load_decoder(tmp_path / "q"), 256), OrtBackend(open_bundle(tmp_path / "b"), exact=True)
    wanted, got = (log_softmax(journey(backend).astype(np.float64), axis=1) for backend in backends)
    assert np.median(rel_entr(np.exp(wanted), np.exp(got)).sum(axis=1)) < 1e-6         # a code may fall otherwise here and there
