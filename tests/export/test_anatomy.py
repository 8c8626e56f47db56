"""Every kind of layer and every way to attend: both graphs against PyTorch, ragged, in chunks, and through a cache that goes back."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import everywhere, small_config, write_random
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, rel_entr

from compress import quantize
from export import onnx as export_onnx
from export import ort, verify
from models.checkpoint import load_decoder
from models.formats.weight_names import OWN_FORM
from models.network.config import LayerConfig, ModelConfig, Rope
from models.network.torch_backend import TorchBackend
from runtime import decode
from runtime.bundle import Bundle, open_bundle
from runtime.errors import UserError
from runtime.ort_backend import OrtBackend
from runtime.tensors import check_tensors

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "attention_factor": 1.1, "llama_4_scaling_beta": 0.1}
FULL, NEAR = LayerConfig(4, 2, 96, head_dim=32, sliding_window=0), LayerConfig(4, 1, 96, rope=1)
CONV, DELTA = LayerConfig(0, 0, 96, "conv", kernel=3), LayerConfig(4, 2, 96, "delta", head_dim=16, kernel=4, state_dim=24)
MAMBA = LayerConfig(6, 2, 96, "mamba", head_dim=16, kernel=4, state_dim=24)
PLAIN = LayerConfig(4, 2, 96)


def model(*layers, **fields) -> ModelConfig:
    return replace(small_config(context_length=256, norm_eps=1e-6, **fields), layers=layers)


MODELS = {
    "windows, sizes, tables": model(NEAR, FULL, replace(PLAIN, rope=-1), sliding_window=16, ropes=(Rope(500.0),), rope_share=0.5,
                                    attention_scale=0.2),
    "norms on both sides, caps": model(PLAIN, PLAIN, norm_order="both", attention_softcap=5.0, logits_softcap=8.0, tied_embeddings=False,
                                       sliding_window=16),
    "norms after, over all heads": model(PLAIN, PLAIN, norm_order="post", qk_norm=True, qk_norm_over="all"),
    "norms of heads after rotation": model(PLAIN, PLAIN, qk_norm=True, qk_norm_last=True),
    "gate, norm of values, biases": model(PLAIN, PLAIN, attention_gate=True, v_norm=True, qk_norm=True, attention_bias=True, output_bias=True,
                                          mlp_bias=True),
    "query factors": model(PLAIN, PLAIN, rope_scaling=YARN),
    "another layer's cache": model(NEAR, FULL, replace(NEAR, cache_source=0), replace(FULL, cache_source=1), sliding_window=16, qk_norm=True,
                                   v_norm=True, ropes=(Rope(500.0),), attention_scale=1.0),
    "convolution": model(CONV, PLAIN, replace(CONV, kernel=7), qk_norm=True, conv_bias=True),
    "delta": model(DELTA, PLAIN, replace(DELTA, kv_heads=4), attention_gate=True, qk_norm=True),
    "mamba": model(MAMBA, replace(PLAIN, rope=-1), replace(MAMBA, kv_heads=1), conv_bias=True),
    "experts": model(replace(PLAIN, experts=5, experts_per_token=2), replace(PLAIN, mlp_size=64), replace(PLAIN, experts=3, experts_per_token=1),
                     router_normalized=True),
    "experts, chosen, shared": model(replace(PLAIN, experts=4, experts_per_token=2, shared_size=64), router="chosen", mlp_bias=True),
    "experts, sigmoid": model(replace(PLAIN, experts=4, experts_per_token=3), replace(CONV, experts=4, experts_per_token=2), router="sigmoid",
                              router_bias=True, router_normalized=True),
    "inputs of every layer": model(NEAR, FULL, replace(NEAR, cache_source=0), sliding_window=16, ropes=(Rope(500.0),), per_layer_size=32,
                                   layer_scalar=True, norm_order="both", activation="gelu_tanh"),
}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def any_shape(monkeypatch):
    """Checkpoints of shapes that no family has."""
    monkeypatch.setattr(ModelConfig, "to_hf", lambda self: {"model_type": "llama", "anatomy": self.to_dict()} | OWN_FORM)
    monkeypatch.setattr(ModelConfig, "from_hf", classmethod(lambda cls, hf: cls.from_dict(hf["anatomy"])))


def bundle_of(checkpoint, out, *options):
    assert export_onnx.main([str(checkpoint), "-o", str(out), *options]) == 0 and ort.main([str(out)]) == 0
    return open_bundle(out, verify=True)


def journey(backend, seed: int = 0) -> np.ndarray:
    """Logits [n, vocab] on every way through a cache: ragged prompts that straddle chunks, steps, a chunk on one row's view, a fork, a
    place that is come back to, a step that is taken back, growth."""
    rng, found = np.random.default_rng(seed), []
    cache = backend.new_cache(4, 192)

    def keep(logits):
        found.append(logits.reshape(-1, logits.shape[-1]).copy())

    def tokens(*lengths):
        return [rng.integers(3, 380, length) for length in lengths]
    keep(decode.prefill(backend, cache.view(0, 3), tokens(23, 9, 64)))
    keep(decode.prefill(backend, cache.view(3, 4), tokens(130)))
    for step in tokens(*[4] * 3):
        keep(decode.step(backend, cache, step))
    keep(decode.logits(backend, *tokens(70), 65, cache.view(1, 2)))
    cache.fork(1, 0)
    keep(decode.step(backend, cache, *tokens(4)))
    places = [cache.snapshot(row) for row in range(4)]
    keep(decode.prefill(backend, cache, tokens(5, 3, 1, 8)))
    keep(decode.step(backend, cache, *tokens(4)))
    for row in (0, 2):
        cache.truncate(row, int(cache.lengths[row]) - 1)
    keep(decode.step(backend, cache, *tokens(4)))
    for row in (0, 1, 3):
        cache.restore(row, places[row])
    keep(decode.step(backend, cache.view(1, 4), *tokens(3)))
    cache.grow(256)
    keep(decode.prefill(backend, cache, tokens(2, 9, 1, 3)))
    cache.truncate(2, 0)
    keep(decode.prefill(backend, cache.view(2, 3), tokens(40)))
    return np.concatenate(found)


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


def coded(module: str):
    return None if module.endswith(".conv") else everywhere(4, 32)(module)


@pytest.mark.parametrize("name", ["another layer's cache", "convolution", "delta", "mamba", "experts, sigmoid", "inputs of every layer"])
def test_a_quantized_checkpoint_is_verified_on_every_runner(name, tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", MODELS[name], coded)
    bundle_of(checkpoint, tmp_path / "b")
    assert verify.main([str(checkpoint), str(tmp_path / "b"), "--threads", "1"]) == 0
    assert capsys.readouterr().out.count(": mean KL at most") == 3


@pytest.mark.parametrize("name", ["windows, sizes, tables", "convolution", "delta", "mamba", "experts", "inputs of every layer"])
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


@pytest.mark.parametrize("name", ["windows, sizes, tables", "another layer's cache", "convolution", "delta", "mamba", "experts, sigmoid",
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
