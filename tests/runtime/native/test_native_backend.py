"""The native backend against PyTorch from the same codes, and its promises: the same bits whatever the batch, the
chunking and the number of threads (with AMX: among passes of 32 tokens and more, and among smaller ones); two engines,
fork, Ctrl-C."""

import ctypes
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from checkpoints import everywhere, small_config, write_bundle

from models.network import decoder as decoder_module
from runtime import backends, decode, machine
from runtime.errors import UserError
from runtime.native import backend as module
from runtime.native import library, profile
from runtime.native.backend import NativeBackend
from runtime.sampling import Sampler, SamplingOptions

warnings.simplefilter("ignore", RuntimeWarning)
try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

TOKENS = 150
AMX = library.load().ew_isa(None) == b"avx512-amx"
ONE_KIND = "avx512-vnni" if AMX else None              # the best kernels that treat every pass alike


def config(family="llama", **fields):
    return small_config(family, **{"context_length": 320, **fields})


ARCHITECTURES = {
    "llama": config(),
    "qwen3-like, sliding window, untied": config("qwen3", tied_embeddings=False, qk_norm=True, attention_bias=True,
                                                  output_bias=True, sliding_window=40),
    "gpt2-like": config("gpt2", layers=[(4, 4, 96)] * 2, norm="layer", positions="learned", activation="gelu_tanh", gated_mlp=False,
                        attention_bias=True, output_bias=True, mlp_bias=True),
    "layers of different shapes": config(layers=[(4, 2, 96), (2, 1, 64), (6, 3, 160)], activation="gelu"),
    "head dimension of 8": config(head_dim=8, layers=[(4, 2, 96), (8, 2, 64)]),
}


@pytest.fixture(autouse=True)
def plenty_of_cpus(monkeypatch):
    monkeypatch.setattr(machine, "available_cpus", lambda: 4)


def everything(backend, ids):
    """Logits of every token of ids [b, s] in one call."""
    rows, width = ids.shape
    cache = backend.new_cache(rows, -(-width // 16) * 16)
    return backend.forward(ids, None, np.zeros(rows, np.int64), np.tile(np.arange(width), (rows, 1)), cache).copy()


def ids_for(config, rows=2, width=TOKENS, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, width))


def oracle(decoder, ids):
    with torch.no_grad():
        return decoder(torch.tensor(ids)).numpy()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_with_pytorch_to_1e_4(tmp_path, name):
    bundle, decoder = write_bundle(tmp_path, ARCHITECTURES[name])
    ids = ids_for(decoder.config)
    assert np.abs(everything(NativeBackend(bundle, threads=2, exact=True), ids) - oracle(decoder, ids)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_agree_with_pytorch_from_the_same_halves(tmp_path, dtype, monkeypatch):
    """What is not quantized, RoPE's tables too, in the export's type: norms, biases, table, head and linears."""
    kind, turns = getattr(torch, dtype), decoder_module.rotations
    bundle, decoder = write_bundle(tmp_path, config(tied_embeddings=False, attention_bias=True, output_bias=True), lambda module: None,
                                   "--dtype", {"float16": "fp16", "bfloat16": "bf16"}[dtype])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.data = parameter.data.to(kind).float()
    monkeypatch.setattr(decoder_module, "rotations", lambda *args: tuple(part.to(kind).float() for part in turns(*args)))
    ids = ids_for(decoder.config)
    assert np.abs(everything(NativeBackend(bundle, threads=2, exact=True), ids) - oracle(decoder, ids)).max() < 1e-4


def test_int8_activations_stay_close(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config())
    ids = ids_for(decoder.config)
    expected = oracle(decoder, ids)
    for dtype in module.CACHE_DTYPES:
        error = np.abs(everything(NativeBackend(bundle, threads=2, cache_dtype=dtype), ids) - expected)
        assert 0 < np.sqrt((error ** 2).mean()) < 0.05 * expected.std()


@pytest.mark.parametrize("exact", [True, False])
def test_same_bits_whatever_batch_chunks_and_threads(tmp_path, exact):
    bundle, decoder = write_bundle(tmp_path, config("mistral", layers=[(6, 2, 96)] * 2, sliding_window=140))
    ids = ids_for(decoder.config, rows=3, width=300)
    isa = None if exact else ONE_KIND
    expected = everything(NativeBackend(bundle, threads=1, exact=exact, isa=isa), ids)
    for threads in (2, 3, 4):
        assert np.array_equal(everything(NativeBackend(bundle, threads=threads, exact=exact, isa=isa), ids), expected)
    backend = NativeBackend(bundle, threads=2, exact=exact, isa=isa)
    assert np.array_equal(everything(backend, ids[1:2])[0], expected[1])
    cache, at = backend.new_cache(1, 304), 0
    for step in (1, 1, 7, 100, 1, 3, 16, 120, 1, 50):
        logits = backend.forward(ids[:1, at:at + step], None, np.array([at]), np.arange(step)[None], cache)
        assert np.array_equal(logits[0], expected[0, at:at + step])
        at += step
    assert at == 300


@pytest.mark.skipif(not AMX, reason="this CPU or system has no AMX for bfloat16")
def test_with_amx_the_same_bits_among_passes_of_32_tokens_and_more(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config("mistral", layers=[(6, 2, 96)] * 2, head_dim=32, sliding_window=140))
    ids = ids_for(decoder.config, rows=2, width=320)
    expected, plain = (everything(NativeBackend(bundle, threads=1, isa=isa), ids) for isa in (None, ONE_KIND))
    assert not np.array_equal(expected, plain)                # it is the tile registers that are tested
    for threads in (2, 3):
        assert np.array_equal(everything(NativeBackend(bundle, threads=threads), ids), expected)
    backend = NativeBackend(bundle, threads=2)
    for steps, target in [((32, 33, 48, 100, 64, 43), expected), ((31, 1, 7, 30, 31, 16), plain)]:
        cache, at = backend.new_cache(1, 320), 0
        for step in steps:
            logits = backend.forward(ids[:1, at:at + step], None, np.array([at]), np.arange(step)[None], cache)
            assert np.array_equal(logits[0], target[0, at:at + step])
            at += step
    assert np.abs(expected - oracle(decoder, ids)).mean() < np.abs(plain - oracle(decoder, ids)).mean()


def test_cache_views_forks_truncates_and_grows(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config())
    backend = NativeBackend(bundle, threads=2, cache_dtype="int8", isa=ONE_KIND)
    ids = ids_for(decoder.config, rows=1, width=60)
    expected = everything(backend, ids)[0]
    cache = backend.new_cache(3, 32)
    assert cache.nbytes == backend.cache_bytes(3, 32)
    backend.forward(ids[:, :20], None, np.zeros(1, np.int64), np.zeros((1, 0), np.int64), cache.view(2, 3))
    cache.lengths[2] = 20
    cache.fork(2, 0)
    assert cache.lengths.tolist() == [20, 0, 20]
    cache.grow(64)
    assert cache.capacity == 64
    view = cache.view(0, 1)
    logits = backend.forward(ids[:, 20:], None, np.array([20]), np.arange(40)[None], view)
    assert np.array_equal(logits[0], expected[20:])
    view.lengths[0] = 60
    cache.truncate(0, 30)
    logits = backend.forward(ids[:, 30:40], None, np.array([30]), np.arange(10)[None], cache.view(0, 1))
    assert np.array_equal(logits[0], expected[30:40])


@pytest.mark.parametrize("options", [
    {}, {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}, {"temperature": 0.9, "top_k": 40, "seed": 3},
    {"temperature": 1.5, "top_k": 60, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 4}], ids=str)
def test_what_the_core_finds_likely_is_what_the_sampler_chooses(tmp_path, monkeypatch, options):
    bundle, decoder = write_bundle(tmp_path, config())
    backend = NativeBackend(bundle, threads=2)
    prompt = ids_for(decoder.config, width=9)[0]

    def tokens(stop_tokens=frozenset()):
        sequence = decode.Sequence(prompt, Sampler(SamplingOptions(**options), prompt), 90, stop_tokens)
        list(decode.run(backend, backend.new_cache(1, 64), [sequence]))
        assert len(sequence.times) == len(sequence.tokens) and sequence.times == sorted(sequence.times)
        return sequence.tokens

    looped, stopped = tokens(), tokens(frozenset([tokens()[50]]))
    monkeypatch.setattr(Sampler, "candidates", 0)             # every logit to Python
    assert looped == tokens() and len(looped) == 90 and stopped == looped[:looped.index(looped[50])]


def test_candidates_are_the_largest(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config(vocab_size=331))
    backend = NativeBackend(bundle, threads=2)
    logits = backend.forward(np.array([[7]]), None, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), backend.new_cache(1, 16))[0, 0].copy()
    (ids, values), = backend.step_rows(backend.new_cache(1, 16), np.array([7]), [Sampler(SamplingOptions(temperature=1.0, top_k=50), np.array([7]))])
    assert np.array_equal(ids, np.argsort(-logits, kind="stable")[:50]) and np.array_equal(values, logits[ids])


KINDS_OF_SAMPLING = [{}, {"logit_bias": {3: 2.0}}, {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
                     {"temperature": 0.9, "top_k": 40, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}, {"suppress_tokens": [1, 4]},
                     {"temperature": 1.5, "top_k": 60, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 4}]


@pytest.mark.parametrize("first", [0, 2])
def test_steps_of_rows_find_what_each_sampler_seeks(tmp_path, first):
    """Against every logit and numpy: rows of all lengths and samplers, from a view's first row on, down to a full cache."""
    bundle, decoder = write_bundle(tmp_path, config(vocab_size=331))
    backend, ids = NativeBackend(bundle, threads=3), ids_for(decoder.config, rows=9, width=12)
    caches, samplers = [backend.new_cache(9, 32).view(first, first + 7) for _ in range(2)], [[], []]
    for cache, some in zip(caches, samplers):
        for row, options in enumerate(KINDS_OF_SAMPLING):
            prompt = ids[row, :5 + row]
            decode.prefill(backend, cache.view(row, row + 1), [prompt])
            some.append(Sampler(SamplingOptions(**options), prompt))
    tokens, expected = ([decode.Sequence(ids[row], sampler, 99) for row, sampler in enumerate(some)] for some in samplers)
    last = ids[:7, 20 % 12]
    for _ in range(32 - 11):
        found = backend.step_rows(caches[0], last, samplers[0])
        logits = decode.step(backend, caches[1], last)
        for row, (sequence, other) in enumerate(zip(tokens, expected)):
            if n := sequence.sampler.candidates:
                assert len(found[row][0]) == n and (np.diff(found[row][1]) <= 0).all()
                sequence.accept(found[row])
            else:
                assert np.array_equal(found[row], logits[row])
                sequence.accept(found[row])
            other.accept(logits[row])
        last = np.array([sequence.tokens[-1] for sequence in tokens])
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
    assert [sequence.tokens for sequence in tokens] == [sequence.tokens for sequence in expected] and caches[0].lengths.max() == 32
    with pytest.raises(UserError, match="outside the cache"):
        backend.step_rows(caches[0], last, samplers[0])
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist()


def test_a_step_takes_more_rows_than_a_pass_and_no_position_beyond_the_context(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config())
    backend, tokens = NativeBackend(bundle, threads=2), np.arange(130) % 50
    cache, samplers = backend.new_cache(130, 352), [Sampler(SamplingOptions(), np.array([1]))] * 130
    found = backend.step_rows(cache, tokens, samplers)
    assert len(found) == 130 and (cache.lengths == 1).all()
    assert all(found[row][0] == found[row % 50][0] and found[row][1] == found[row % 50][1] for row in range(130))
    cache.lengths[7] = 320
    with pytest.raises(UserError, match="beyond the context of 320"):
        backend.step_rows(cache.view(0, 9), tokens[:9], samplers[:9])


def test_two_engines_work_side_by_side(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config())
    ids = ids_for(decoder.config)
    backends = [NativeBackend(bundle, threads=2) for _ in range(2)]
    expected, results = everything(backends[0], ids), {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: everything(backends[i], ids)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[i], expected) for i in range(2))


def test_works_in_the_child_after_fork(tmp_path):
    bundle, decoder = write_bundle(tmp_path, config())
    backend = NativeBackend(bundle, threads=3)
    ids = ids_for(decoder.config)
    expected = everything(backend, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")               # Python warns of forking with threads: that is the point
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if np.array_equal(everything(backend, ids), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(everything(backend, ids), expected)


@pytest.fixture
def listening():
    """SIGINT raises KeyboardInterrupt, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_heard_within_a_long_prompt(tmp_path, listening):
    bundle, decoder = write_bundle(tmp_path, config(context_length=60_000), everywhere(4, 32), "--max-context", "60000")
    backend = NativeBackend(bundle, threads=1)
    cache, ids = backend.new_cache(1, 50_000), ids_for(decoder.config, rows=1, width=50_000)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        backend.forward(ids, None, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), cache)


def test_the_same_bits_while_the_pool_gives_way(tmp_path):
    """More threads than CPUs are put off all the time, so the pool drops and tries threads as it goes."""
    bundle, decoder = write_bundle(tmp_path, config(layers=[(4, 2, 512)] * 4, hidden_size=256))
    ids = ids_for(decoder.config, rows=1, width=40)
    expected, backend = everything(NativeBackend(bundle, threads=1), ids), NativeBackend(bundle, threads=4)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert np.array_equal(everything(backend, ids), expected)


def test_the_profile_counts_every_weight(tmp_path, monkeypatch, capsys):
    bundle, _ = write_bundle(tmp_path, config(tied_embeddings=False, layers=[(4, 2, 96)]))
    monkeypatch.setattr(profile, "open_bundle", lambda folder: bundle)
    monkeypatch.setattr(profile, "bandwidth", lambda: 2.0)
    assert profile.main([str(bundle.folder), "--threads", "1", "--steps", "4", "--context", "16", "--rows", "2"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:] if line}
    # int4 in groups of 32: 0.5625 bytes a weight. qkv 128 x 64, o 64 x 64, gate and up 192 x 64, down 64 x 96, head 384 x 64
    sizes = {"qkv": 128 * 64, "output": 64 * 64, "gate_up": 192 * 64, "down": 64 * 96, "head": 384 * 64}
    assert {part: float(lines[part][2]) for part in sizes} == {part: round(n * 0.5625 / 1e6, 2) for part, n in sizes.items()}


def test_the_interface_matches_the_header():
    header = (module.__file__.rsplit("/", 1)[0]) + "/native.h"
    text = open(header).read()
    assert f"EW_PASS {library.PASS} " in text
    kinds = text[text.index("enum { EW_FLOAT32"):].split("}")[0].lower()
    assert [f"ew_{name}" in kinds for name in library.DTYPES] == [True] * len(library.DTYPES)
    assert ctypes.sizeof(library.Tensor) == 48
