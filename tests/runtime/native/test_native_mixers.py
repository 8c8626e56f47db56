"""Every kind of layer in the native core against PyTorch: ragged, in chunks, through a cache that goes back; the same bits whatever the
threads, the batch and the chunks; what is refused."""

import json
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from anatomies import DELTA, FULL, NATIVE as MODELS, NEAR, PLAIN, any_shape, coded, journey, model    # noqa: F401
from checkpoints import everywhere, write_bundle, write_random
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, rel_entr

from export import onnx as export_onnx
from models.checkpoint import load_decoder
from models.network.config import LayerConfig
from models.network.torch_backend import TorchBackend
from runtime import decode, machine
from runtime.bundle import Bundle, open_bundle
from runtime.errors import Unavailable, UserError
from runtime.native import backend as module
from runtime.native import library, profile
from runtime.native.backend import NativeBackend
from runtime.sampling import Sampler, SamplingOptions

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("any_shape")
AMX = library.load().ew_isa(None) == b"avx512-amx"
ONE_KIND = "avx512-vnni" if AMX else None
QWEN = model(DELTA, PLAIN, replace(DELTA, heads=2, kv_heads=2, head_dim=64, state_dim=64, kernel=2), qk_norm=True)


@pytest.fixture(autouse=True)
def plenty_of_cpus(monkeypatch):
    monkeypatch.setattr(machine, "available_cpus", lambda: 4)


def isas() -> list[str]:
    names = ("avx512-amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "plain")
    return [name for name in names if library.load().ew_isa(None).decode() == name or name in ("avx2", "plain", "avx512-vnni")]


def logs(logits: np.ndarray) -> np.ndarray:
    return log_softmax(logits.astype(np.float64), axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_agrees_with_pytorch_to_1e_4(tmp_path, name):
    bundle, decoder = write_bundle(tmp_path, MODELS[name], coded)
    wanted = logs(journey(TorchBackend(decoder)))
    for isa in isas():
        try:
            backend = NativeBackend(bundle, threads=2, exact=True, isa=isa)
        except UserError as error:
            assert "cannot run" in str(error)
            continue
        assert np.abs(logs(journey(backend)) - wanted).max() < 1e-4, isa


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_with_any_number_of_threads_and_codes_stay_close(tmp_path, name):
    bundle, decoder = write_bundle(tmp_path, MODELS[name], coded)
    found = [journey(NativeBackend(bundle, threads=threads, isa=ONE_KIND)) for threads in (1, 3)]
    assert np.array_equal(*found)
    wanted = np.exp(logs(journey(TorchBackend(decoder))))
    assert 0 < np.median(rel_entr(wanted, np.exp(logs(found[0]))).sum(axis=1)) < 0.005


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_in_any_chunks_beside_any_rows_and_for_any_logits(tmp_path, name):
    bundle, decoder = write_bundle(tmp_path, MODELS[name], coded)
    backend, ids = NativeBackend(bundle, threads=2, isa=ONE_KIND), np.random.default_rng(0).integers(3, 380, (3, 200))
    every = np.tile(np.arange(200), (3, 1))
    expected = backend.forward(ids, None, np.zeros(3, np.int64), every, backend.new_cache(3, 224)).copy()
    cache, at = backend.new_cache(1, 224), 0
    for step in (1, 1, 2, 60, 1, 3, 16, 110, 1, 5):
        logits = backend.forward(ids[:1, at:at + step], None, np.array([at]), np.arange(step)[None], cache)
        assert np.array_equal(logits[0], expected[0, at:at + step])
        at += step
    assert at == 200
    counts = np.array([150, 1, 77])                           # padded; the last logits alone
    cache = backend.new_cache(3, 224)
    logits = backend.forward(ids[:, :150], None, np.zeros(3, np.int64), counts[:, None] - 1, cache, counts)
    assert all(np.array_equal(logits[row, 0], expected[row, count - 1]) for row, count in enumerate(counts))
    rest = np.stack([ids[row, count:count + 9] for row, count in enumerate(counts)])
    logits = backend.forward(rest, None, counts, np.full((3, 2), 8), cache)
    assert all(np.array_equal(logits[row, 1], expected[row, count + 8]) for row, count in enumerate(counts))


def test_keys_that_repeat_lose_nothing(tmp_path):
    checkpoint = write_random(tmp_path / "c", model(DELTA, PLAIN))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.linear_attn.dt_bias"] -= 20
    tensors["model.layers.0.linear_attn.b_proj.weight"] *= 50
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "b")]) == 0
    wanted = decode.logits(TorchBackend(load_decoder(checkpoint)), np.full(200, 7))
    assert np.abs(decode.logits(NativeBackend(open_bundle(tmp_path / "b"), exact=True), np.full(200, 7)) - wanted).max() < 1e-4


def test_the_loop_in_the_core_goes_on_from_states_and_leaves_them(tmp_path, monkeypatch):
    bundle, decoder = write_bundle(tmp_path, QWEN, coded)
    backend, prompt = NativeBackend(bundle, threads=2), np.arange(5, 20)

    def tokens():
        sequence, cache = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), 60), backend.new_cache(1, 32)
        list(decode.run(backend, cache, [sequence]))
        assert cache.states.held[0] == cache.lengths[0] == len(prompt) + 59
        return sequence.tokens

    looped = tokens()
    monkeypatch.setattr(Sampler, "candidates", 0)             # every logit to Python
    assert looped == tokens() and len(looped) == 60


def test_steps_of_rows_go_on_from_their_own_states(tmp_path):
    bundle, decoder = write_bundle(tmp_path, QWEN, coded)
    backend, samplers = NativeBackend(bundle, threads=2, isa=ONE_KIND), [Sampler(SamplingOptions(), np.array([1])) for _ in range(3)]
    whole = backend.new_cache(5, 32)
    cache, others = whole.view(1, 4), [backend.new_cache(1, 32) for _ in range(3)]
    for row, other in enumerate(others):
        for some in (cache.view(row, row + 1), other):
            decode.prefill(backend, some, [np.arange(5, 8 + 3 * row)])
    tokens = np.array([9, 8, 7])
    for _ in range(6):
        found = backend.step_rows(cache, tokens, samplers)
        alone = [decode.step(backend, other, tokens[row:row + 1])[0] for row, other in enumerate(others)]
        assert [(int(i[0]), v[0]) for i, v in found] == [(int(logits.argmax()), logits.max()) for logits in alone]
        tokens = np.array([ids[0] for ids, _ in found])
    assert cache.lengths.tolist() == cache.states.held.tolist() == [9, 12, 15] and whole.lengths.tolist() == [0, 9, 12, 15, 0]


def test_an_interrupted_call_leaves_the_state_before_it(tmp_path, monkeypatch):
    bundle, _ = write_bundle(tmp_path, QWEN, coded)
    backend, ids = NativeBackend(bundle, threads=1), np.random.default_rng(0).integers(3, 380, (1, 200))
    cache, zero = backend.new_cache(1, 224), np.zeros((1, 1), np.int64)
    backend.forward(ids[:, :9], None, np.zeros(1, np.int64), zero, cache)
    one_pass, calls = backend._pass, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        one_pass(*arguments)

    monkeypatch.setattr(backend, "_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.forward(ids[:, 9:190], None, np.array([9]), zero, cache)
    monkeypatch.undo()
    cache.lengths[0] = 9
    again = backend.forward(ids[:, 9:200], None, np.array([9]), zero + 190, cache).copy()
    assert np.array_equal(again, backend.forward(ids, None, np.zeros(1, np.int64), zero + 199, backend.new_cache(1, 224)))


def test_the_cache_counts_its_states_and_refuses_what_they_do_not_stand_for(tmp_path):
    bundle, _ = write_bundle(tmp_path, QWEN, coded)
    backend = NativeBackend(bundle, threads=1)
    slots = backend.new_cache(2, 64).nbytes - backend.new_cache(2, 32).nbytes
    least = sum(int(np.prod(shape)) for layer in QWEN.layers for shape in QWEN.state_shapes(layer).values()) * 4 * 2 * 2
    assert least <= backend.cache_bytes(2, 32) - slots < 2 * least and backend.new_cache(2, 32).nbytes == backend.cache_bytes(2, 32)
    cache, one = backend.new_cache(2, 64), np.array([[3], [4]])
    backend.forward(np.tile(one, 8), None, np.zeros(2, np.int64), one * 0, cache)
    with pytest.raises(UserError, match="row 1 cannot go on at slot 5: the state of its recurrent layers stands for 8 tokens"):
        backend.forward(one, None, np.array([8, 5]), one * 0, cache)
    with pytest.raises(UserError, match="asked of padding"):
        backend.forward(np.tile(one, 3), None, np.array([8, 8]), one * 0 + 2, cache, np.array([3, 2]))
    with pytest.raises(UserError, match="position 257 is beyond the context of 256"):
        backend.forward(one, None, np.array([257, 0]), one * 0, cache)
    kind = write_bundle(tmp_path / "attention", model(PLAIN), coded)[0]
    assert NativeBackend(kind, threads=1).new_cache(2, 32).states is None


def test_layers_that_share_keys_have_none_of_their_own_and_run_for_wanted_tokens_alone(tmp_path):
    layers = NEAR, FULL, replace(NEAR, cache_source=0), replace(FULL, cache_source=1)
    alone, shared = (write_bundle(tmp_path / name, model(*some, sliding_window=16, ropes=(MODELS["another layer's cache"].ropes)), coded)[0]
                     for name, some in (("alone", layers[:2]), ("shared", layers)))
    backend = NativeBackend(shared, threads=2)
    assert backend.cache_bytes(3, 64) == NativeBackend(alone, threads=2).cache_bytes(3, 64)
    ids, cache = np.random.default_rng(0).integers(3, 380, (1, 100)), backend.new_cache(1, 128)
    backend.profile(True)
    backend.forward(ids, None, np.zeros(1, np.int64), np.zeros((1, 0), np.int64), cache)     # nothing wanted: the tail is left out
    cache.lengths[0] = 100
    logits = decode.logits(backend, ids[0, :5], 0, cache).copy()
    whole = decode.logits(backend, np.concatenate([ids[0], ids[0, :5]]), 0, backend.new_cache(1, 128))
    assert np.array_equal(logits, whole[100:])


@pytest.mark.parametrize("bits, group", [(8, 0), (4, 32), (3, 32), (5, 32), (6, 0), (None, 0)])
def test_own_inputs_are_read_from_the_file_in_every_format(tmp_path, bits, group):
    form = everywhere(bits or 8, group)("") if bits else None
    config = model(NEAR, FULL, replace(NEAR, cache_source=0), sliding_window=16, ropes=MODELS["inputs of every layer"].ropes,
                   per_layer_size=32, layer_scalar=True, norm_order="both")
    bundle, decoder = write_bundle(tmp_path, config, lambda name: form if name == "model.per_layer_embed" else coded(name))
    ids = np.random.default_rng(0).integers(3, 380, (2, 40))
    with torch.no_grad():
        wanted = decoder(torch.tensor(ids)).numpy()
    backend = NativeBackend(bundle, threads=2, exact=True)
    every = np.tile(np.arange(40), (2, 1))
    assert np.abs(backend.forward(ids, None, np.zeros(2, np.int64), every, backend.new_cache(2, 64)) - wanted).max() < 1e-4


def test_own_inputs_that_are_no_numbers_are_refused_where_they_are_met(tmp_path):
    bundle, _ = write_bundle(tmp_path, MODELS["inputs of every layer"], lambda module: None)
    entry = next(t for t in bundle.manifest["weights"]["tensors"] if t["name"] == "per_layer_embed.weight")
    with open(bundle.path("weights.bin"), "r+b") as file:
        file.seek(entry["offset"] + 7 * entry["shape"][1] * 4 + 40)
        file.write(struct.pack("f", np.nan))
    backend = NativeBackend(bundle, threads=2)
    decode.logits(backend, np.array([5, 6, 8]))
    with pytest.raises(UserError, match="own inputs of token 7 hold a value that is not a finite number"):
        decode.logits(backend, np.array([5, 7, 8]))
    decode.logits(backend, np.array([5, 6, 8]))


def test_unknown_kinds_and_values_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "check_tensors", lambda bundle: {"tensors": {}, "activations": {}, "kv_cache": None})
    bundle, _ = write_bundle(tmp_path, MODELS["experts, sigmoid"], coded)

    def changed(layer=None, **fields):
        manifest = json.loads(json.dumps(bundle.manifest))
        manifest["model"]["config"] |= fields
        manifest["model"]["config"]["layers"][1] |= layer or {}
        return Bundle(bundle.folder, manifest)

    for there, words in [(changed({"mixer": "rwkv"}), "mixer 'rwkv' is none of the native core's"), (changed(router="best"), "router 'best'"),
                         (changed(norm_order="around"), "norm_order"), (changed(qk_norm_over="some"), "qk_norm_over"),
                         (changed({"experts_per_token": 5}), "a value that the native core does not have"),
                         (changed({"kernel": 0}), "a value that"), (changed({"sliding_window": -1, "mixer": "attention"}), "a value that"),
                         (changed(attention_softcap=-1.0), "a value that"), (changed(per_layer_size=8), "a value that"),
                         (changed({"experts": 9}), "4\\] where the model needs 64 inputs and 9"), (changed({"shared_size": 32}), "shared"),
                         (changed(norm_order="both"), "attn_post_norm")]:
        with pytest.raises(UserError, match=words) as error:
            NativeBackend(there, threads=1)
        assert isinstance(error.value, Unavailable) == bool(re.search("is none of|does not have", str(error.value)))


def test_fuzzed_layers_are_refused_and_never_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "check_tensors", lambda bundle: {"tensors": {}, "activations": {}, "kv_cache": None})
    bundles = [write_bundle(tmp_path / str(i), MODELS[name], coded)[0] for i, name in enumerate(MODELS)]
    random, opened = np.random.default_rng(0), 0
    values = [0, -1, 1, 2, 3, 15, 17, 64, 4096, 2**20, 2**31 - 1, -2**31]
    names = [name for name in LayerConfig.__dataclass_fields__ if name != "mixer"]
    for _ in range(300):
        manifest = json.loads(json.dumps(bundles[random.integers(len(bundles))].manifest))
        config = manifest["model"]["config"]
        if random.random() < 0.8:
            config["layers"][random.integers(len(config["layers"]))][str(random.choice(names))] = int(random.choice(values))
        else:
            config[str(random.choice(["per_layer_size", "head_dim", "attention_scale", "sliding_window"]))] = int(random.choice(values))
        try:
            backend = NativeBackend(Bundle(bundles[0].folder.parent.parent / bundles[0].folder.name, manifest), threads=1)
        except UserError:
            continue
        opened += 1
        try:
            decode.logits(backend, np.array([5, 6, 7, 8, 9]))
        except UserError:
            pass
    assert opened < 150


def test_the_profile_counts_states_and_chosen_experts(tmp_path, monkeypatch, capsys):
    bundle, _ = write_bundle(tmp_path, model(DELTA, replace(PLAIN, experts=4, experts_per_token=2)), coded)
    monkeypatch.setattr(profile, "open_bundle", lambda folder: bundle)
    monkeypatch.setattr(profile, "bandwidth", lambda: 2.0)
    assert profile.main([str(bundle.folder), "--threads", "1", "--steps", "4", "--context", "16", "--rows", "2"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:] if line}
    assert float(lines["down"][2]) == round(64 * 96 * 0.5625 * (1 + 2) / 1e6, 2)            # int4 in groups of 32: 0.5625 bytes a weight
    assert float(lines["gate_up"][2]) == round((192 * 64 * (1 + 2) + 4 * 64) * 0.5625 / 1e6, 2)
