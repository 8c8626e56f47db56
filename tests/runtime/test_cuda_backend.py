"""ONNX Runtime on CUDA, over a double of the GPU: against PyTorch, and what is recorded, copied and kept."""

import threading

import numpy as np
import pytest
import test_ort_backend as suite
from cuda_double import Cuda, opened
from test_ort_backend import prompts_of

from models.checkpoint import load_decoder
from models.network.torch_backend import TorchBackend
from runtime import cuda_backend, decode, device_cache, ort_session
from runtime.bundle import open_bundle
from runtime.cuda_backend import CudaBackend
from runtime.errors import DeviceError, Unavailable, UserError
from runtime.sampling import Sampler, SamplingOptions, largest

HALF = 0.05                       # of a logit, in float16


@pytest.fixture
def gpu(tiny_bundle):
    """gpu(family, bits=4, dtype="fp16", **of the double) -> (the backend over the double, the double's onnxruntime)."""
    made = []

    def make(family="smollm2", bits=4, dtype="fp16", **how):
        made.append(opened(open_bundle(tiny_bundle(family, bits, dtype)[1]), **how))
        return made[-1]
    yield make
    for backend, _ in made:
        backend.close()


def fresh(backend, rows=1, capacity=64, length=5):
    cache = backend.new_cache(rows, capacity)
    found = decode.prefill(backend, cache, prompts_of(*[length] * rows))
    return cache, found


def copies(module):
    return len(module.cuda.uploads), len(module.cuda.downloads)


@pytest.mark.parametrize("family, bits, dtype, role", [
    ("smollm2", 4, "fp16", "cuda"), ("qwen3", 8, "fp16", "cuda"), ("mistral", None, "fp16", "cuda"), ("gpt2", None, "fp16", "cuda"),
    ("smollm2", None, "fp16", "fast"), ("smollm2", None, "fp32", "portable"), ("qwen2", None, "fp32", "fast")])
def test_every_way_through_the_cache(gpu, tiny_bundle, monkeypatch, family, bits, dtype, role):
    """Ragged prefill, steps, fork, truncation, a chunk on one row's view, growth: PyTorch's logits, from what a recorded step left."""
    monkeypatch.setattr(suite, "TOLERANCE", HALF if dtype == "fp16" else suite.TOLERANCE)

    def pair(family, role):
        backend, _ = gpu(family, bits, dtype, role=role)
        return backend, TorchBackend(load_decoder(tiny_bundle(family, bits, dtype)[0]))
    suite.test_every_way_through_the_cache(pair, family, role)


def test_which_graph_runs_and_whether_it_is_recorded(gpu, tiny_bundle):
    backend, _ = gpu()
    assert (backend.graph, backend.name, backend.max_chunk_rows) == ("cuda.onnx", "onnxruntime-cuda", 1)
    assert backend.how == "Double, the step recorded"
    backend, _ = gpu(dtype="fp32")
    assert backend.graph == "portable.onnx" and backend.max_chunk_rows is None
    assert "not recorded: only cuda.onnx can be, which `python -m export.ort` writes" in backend.how
    bundle = open_bundle(tiny_bundle("smollm2", 4, "fp16")[1])
    bundle.manifest["graphs"] = [bundle.graph("fast"), bundle.graph("portable")]
    assert opened(bundle)[0].graph == "fast.onnx"
    bundle.manifest["graphs"] = [bundle.graph("portable")]
    assert opened(bundle)[0].graph == "portable.onnx"
    with pytest.raises(Unavailable, match="no cuda graph.*export.ort"):
        opened(bundle, role="cuda")


def test_a_step_is_recorded_once_and_replayed_whatever_it_is_given(gpu):
    """Against a session that records nothing: the same graph, the same inputs."""
    (recorded, module), (plain, _) = gpu(), gpu(refuses=True)
    tokens = []
    for backend in (recorded, plain):
        cache, found = fresh(backend, 2)
        view, tokens_of = cache.view(1, 2), [found.argmax(-1)]
        for step in range(20):
            found = decode.step(backend, cache if step % 3 else view, tokens_of[-1][-(2 if step % 3 else 1):])
            tokens_of.append(found.argmax(-1))
            if len(tokens_of[-1]) == 1:
                tokens_of[-1] = np.concatenate([tokens_of[-2][:1], tokens_of[-1]])
        tokens.append(np.array(tokens_of))
    assert np.array_equal(*tokens)
    assert len(module.recordings) == 3 and module.replays == 20 - 2 * 3    # the one tried first, and each view's third call on
    assert len({thread for thread, _ in module.recordings}) == 1


def test_where_recording_fails_the_step_runs_as_it_is(gpu):
    for how, words in (({"refuses": True}, "cannot use the graph capture feature"), ({"breaks": True}, "operation not permitted when")):
        backend, module = gpu(**how)
        assert words in backend.how and "not recorded" in backend.how
        assert len(module.sessions) == 2 - ("refuses" in how)
        cache, _ = fresh(backend)
        for _ in range(5):
            decode.step(backend, cache, np.array([5]))
        assert not module.recordings


def test_steps_beyond_the_most_recordings_run_as_they_are(gpu, monkeypatch):
    monkeypatch.setattr(cuda_backend, "MOST_RECORDED", 2)
    backend, module = gpu()
    cache, _ = fresh(backend, 3)
    for rows in 4 * (1, 2, 3):
        decode.step(backend, cache.view(0, rows), np.full(rows, 5))
    assert len(module.recordings) == 2


@pytest.mark.parametrize("options, told", [
    ({}, True), ({"temperature": 0.8, "top_k": 40, "seed": 3}, True), ({"temperature": 0.8, "top_k": 63, "top_p": 0.9, "seed": 3}, True),
    ({"suppress_tokens": (5, 7)}, True), ({"temperature": 1.0, "top_k": 64, "seed": 1}, False), ({"temperature": 1.0, "seed": 1}, False),
    ({"repetition_penalty": 1.3}, False), ({"logprobs": 2}, False), ({"logit_bias": {5: 3.0}}, False)], ids=str)
def test_choices_come_as_ids_and_all_logits_only_where_they_are_needed(gpu, options, told):
    """The same tokens as from all logits on the host, and what is brought down for them."""
    backend, module = gpu()
    vocab, prompt = backend.opened.vocab, prompts_of(9)[0]
    asked = {"suppress_tokens": (5,)} | options
    here, there = (decode.Sequence(prompt, Sampler(SamplingOptions(**asked), prompt), 30) for _ in range(2))
    caches = [backend.new_cache(1, 64) for _ in range(2)]
    for sequence, cache in zip((here, there), caches):
        sequence.accept(decode.prefill(backend, cache, [prompt])[0])
    for _ in range(12):
        before = copies(module)
        found, = decode.choices(backend, caches[0], [here])
        here.accept(found)
        assert [now - then for now, then in zip(copies(module), before)] == [1, 1]
        assert isinstance(found, tuple) == told and module.cuda.downloads[-1] == (64 * 4 + 64 * 8 if told else 4 * vocab)
        there.accept(decode.step(backend, caches[1], np.array(there.tokens[-1:]))[0])
        assert here.tokens == there.tokens and here.logprobs == there.logprobs
    assert caches[0].lengths.tolist() == [9 + 12]


def test_rows_of_one_step_may_want_different_things(gpu):
    backend, module = gpu()
    cache, _ = fresh(backend, 3)
    prompt = prompts_of(5)[0]
    samplers = [Sampler(SamplingOptions(**o), prompt) for o in ({}, {"logprobs": 1}, {"temperature": 1.0, "top_k": 7})]
    lengths = cache.lengths.copy()
    greedy, row, among = backend.step_rows(cache, np.array([5, 6, 7]), samplers)
    cache.lengths[:] = lengths
    logits = decode.step(backend, cache, np.array([5, 6, 7]))
    for found, n in ((greedy, 0), (among, 2)):
        assert np.array_equal(found[0], largest(logits[n], len(found[0]))) and np.array_equal(found[1], logits[n][found[0]])
        assert found[0].dtype == np.int32 and found[1].dtype == np.float32
    assert np.array_equal(row, logits[1])


def test_a_cache_is_copied_grown_and_closed_up_on_the_device(gpu, monkeypatch):
    backend, module = gpu()
    cache, _ = fresh(backend, 3)
    cache.lengths[:] = 5, 4, 3
    slots = [cache.read(row, 0, 16) for row in range(3)]
    before = copies(module)
    cache.fork(0, 2)
    cache.grow(700)
    cache.truncate(0, 2)
    live = [decode.Sequence(None, None, 1, finish_reason=reason) for reason in ("stop", None, None)]
    decode._close_gaps(cache, live)
    other = backend.new_cache(2, 64)
    other.adopt(cache, 1, 0)
    assert copies(module) == before and cache.capacity == 700
    assert cache.lengths.tolist() == [5, 4, 5] and other.lengths.tolist() == [4, 0]
    for got, want in ((cache.read(0, 0, 16), 0), (cache.read(1, 0, 16), 1), (cache.read(2, 0, 16), 0), (other.read(0, 0, 16), 1)):
        assert np.array_equal(got, slots[want])
    monkeypatch.setattr(device_cache, "_MOST_BYTES", 3000)        # a buffer at a time, though it is larger
    assert np.array_equal(cache.read(1, 0, 16), slots[1])
    other.write(1, 16, 32, slots[2])
    assert np.array_equal(other.read(1, 16, 32), slots[2]) and not other.read(1, 0, 16).any()


def test_buffers_and_what_was_recorded_over_them_come_again(gpu, monkeypatch):
    backend, module = gpu()
    recorded = len(module.recordings)             # over the buffers of one row, when it was opened
    for _ in range(3):
        cache, _ = fresh(backend, capacity=200)
        assert cache.capacity == 256              # all the context of this model
        for _ in range(5):
            decode.step(backend, cache, np.array([5]))
        del cache
    assert len(module.recordings) == recorded
    caches = [backend.new_cache(1, 64) for _ in range(9)]
    most = len(module.cuda.blocks)
    del caches
    backend.new_cache(1, 64)
    assert len(module.cuda.blocks) < most / 2     # all but a few were freed
    module.cuda.allowed = 0
    cache = backend.new_cache(1, 64)              # there is one
    module.cuda.allowed = len(backend.caches)
    with pytest.raises(DeviceError, match=r"KV cache of 3 x 256 tokens \(\d+ MB\) does not fit the GPU: .*cudaErrorMemoryAllocation"):
        backend.new_cache(2, 64)
        backend.new_cache(3, 64)


def test_sizes_of_caches_are_few(gpu):
    backend, _ = gpu()
    backend._max_context = 1 << 20
    sizes = {backend.capacity_for(n) for n in range(1, 40_000)}
    assert len(sizes) < 28 and all(n <= backend.capacity_for(n) <= max(512, 1.25 * n + 512) for n in range(1, 40_000, 7))
    backend._max_context = 1000
    assert backend.capacity_for(600) == 1024 and backend.cache_bytes(2, 600) == 2 * 1024 * backend.opened.slot_bytes()


def test_threads_take_turns_and_share_what_is_recorded(gpu):
    backend, module = gpu()
    prompts, tokens = prompts_of(*range(3, 9)), {}

    def reply(number):
        prompt = prompts[number]
        sequence = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), 20)
        for _ in decode.run(backend, backend.new_cache(1, 64), [sequence]):
            pass
        tokens[number] = sequence.tokens
    threads = [threading.Thread(target=reply, args=[n]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(tokens)
    for n in range(6):
        reply(n)
    assert tokens == together and len({thread for thread, _ in module.recordings}) == 1


def test_a_burst_of_a_lone_reply_is_handed_over_once(gpu, monkeypatch):
    """And what fails in it is the caller's to hear."""
    backend, module = gpu()
    cache, found = fresh(backend)
    prompt, handed = prompts_of(5)[0], []
    sequence = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), 200)
    sequence.accept(found[0])
    submit = backend._thread.submit
    monkeypatch.setattr(backend._thread, "submit", lambda *a: handed.append(a) or submit(*a))
    monkeypatch.setattr(decode, "BURST_S", 60)
    decode.burst(backend, cache, sequence, 30)
    assert len(handed) == 1 and len(sequence.tokens) == 31 and len({thread for thread, _ in module.recordings}) == 1
    module.fail = "CUDA failure 719"
    with pytest.raises(DeviceError, match="CUDA failure 719"):
        decode.burst(backend, cache, sequence, 30)


def test_a_row_beyond_its_cache_is_refused_and_changes_nothing(gpu):
    backend, _ = gpu()
    cache, _ = fresh(backend)
    cache.lengths[:] = cache.capacity
    with pytest.raises(UserError, match="257 slots are needed, and the KV cache has 256"):
        backend.step_rows(cache, np.array([5]), [Sampler(SamplingOptions(), prompts_of(5)[0])])
    assert cache.lengths.tolist() == [cache.capacity]


def test_recurrent_states_go_up_and_down(gpu, tiny_bundle):
    backend, _ = gpu("lfm2", None, "fp32", role="portable")
    torch = TorchBackend(load_decoder(tiny_bundle("lfm2", None, "fp32")[0]))
    caches = [some.new_cache(2, 64) for some in (backend, torch)]
    for tokens in ((5, 6), (7, 8), (9, 10)):
        found = [decode.prefill(some, cache, [np.array([t, t + 1]) for t in tokens]).copy() for some, cache in zip((backend, torch), caches)]
        assert np.abs(found[0] - found[1]).max() < suite.TOLERANCE
    for cache in caches:
        cache.fork(0, 1)
    found = [decode.step(some, cache, np.array([3, 4])).copy() for some, cache in zip((backend, torch), caches)]
    assert np.abs(found[0] - found[1]).max() < suite.TOLERANCE


def test_a_device_that_fails_is_told(gpu):
    backend, module = gpu()
    cache, _ = fresh(backend)
    module.fail = "CUDA failure 700: an illegal memory access was encountered"
    with pytest.raises(DeviceError, match="ONNX Runtime failed on cuda: CUDA failure 700"):
        decode.step(backend, cache, np.array([5]))
    module.fail, module.cuda.lost = None, True
    with pytest.raises(DeviceError, match="the GPU failed: cudaErrorDevicesUnavailable in cudaMemcpyAsync"):
        decode.step(backend, cache, np.array([5]))
    module.cuda.lost = False
    backend.close()
    for act in (lambda: decode.step(backend, cache, np.array([5])), lambda: backend.new_cache(1, 64)):
        with pytest.raises(DeviceError, match="this backend was closed"):
            act()


def test_a_forked_child_is_told(gpu, monkeypatch):
    """Before it waits for a lock or a thread that is not there."""
    backend, _ = gpu()
    cache, _ = fresh(backend)
    monkeypatch.setattr(ort_session, "_forks", ort_session._forks + 1)
    for act in (lambda: decode.step(backend, cache, np.array([5])), lambda: backend.new_cache(1, 64),
                lambda: backend.step_rows(cache, np.array([5]), [])):
        with pytest.raises(UserError, match="before this process was forked"):
            act()


def test_nothing_is_left_on_the_device(tiny_bundle):
    cuda = Cuda()
    backend, _ = opened(open_bundle(tiny_bundle("smollm2", 4, "fp16")[1]), cuda)
    cache, _ = fresh(backend, 2)
    decode.step(backend, cache, np.array([5, 6]))
    backend.close()
    del cache, backend
    assert not cuda.blocks and not cuda.pinned


@pytest.mark.gpu
@pytest.mark.parametrize("bits, dtype", [(4, "fp16"), (None, "fp16"), (None, "fp32")])
def test_on_a_gpu_every_way_through_the_cache_gives_pytorchs_logits(tiny_bundle, monkeypatch, bits, dtype):
    monkeypatch.setattr(suite, "TOLERANCE", HALF if dtype == "fp16" else 1e-2)         # TF32
    checkpoint, bundle = tiny_bundle("smollm2", bits, dtype)
    try:
        backend = CudaBackend(open_bundle(bundle))
    except Unavailable as error:
        pytest.skip(str(error))
    print(f"{backend.graph}: {backend.how}")
    suite.test_every_way_through_the_cache(lambda *_: (backend, TorchBackend(load_decoder(checkpoint))), "smollm2", None)
    prompt = prompts_of(9)[0]
    sequences = [decode.Sequence(prompt, Sampler(SamplingOptions(temperature=1.0, top_k=20, seed=1), prompt), 60) for _ in range(2)]
    for sequence, role in zip(sequences, (backend.graph.removesuffix(".onnx"), "portable")):
        some = CudaBackend(open_bundle(bundle), role=role)
        for _ in decode.run(some, some.new_cache(1, 64), [sequence]):
            pass
        some.close()
    same = sum(a == b for a, b in zip(*(sequence.tokens for sequence in sequences)))
    assert len(sequences[0].tokens) == 60 and same > 5            # until a near tie falls otherwise
