"""What only an NVIDIA GPU can show of the TensorRT backend. Skipped, with what is missing, where there is none."""

import json

import numpy as np
import pytest

from compress import quantize
from export import onnx as export_onnx
from export import ort, trt, verify
from export.tensorrt import build as trt_build
from runtime import Engine, bench, trt_backend
from runtime import verify as runtime_verify
from runtime.backends import open_backend
from runtime.bundle import open_bundle
from runtime.errors import DeviceError, UserError
from runtime.golden import read_golden
from runtime.ort_backend import OrtBackend
from runtime.trt_backend import TrtBackend
from runtime.cuda_device import present_gpu

pytestmark = pytest.mark.gpu
CAPACITY = 128


@pytest.fixture(scope="module")
def gpu():
    """(compute capability, backend that builds for it) of this machine."""
    try:
        capability = present_gpu().compute_capability
        for backend in ("rtx", "trt"):
            try:
                targets = trt_build.targets(trt_build.load_backend(backend))
            except UserError as error:
                reason = error
                continue
            if backend == "trt" or capability in targets:
                return capability, backend
            reason = f"TensorRT-RTX has no target SM{capability}"
    except DeviceError as error:
        reason = error
    pytest.skip(str(reason))


def with_engine(gpu, checkpoint, folder, capacity):
    """A proved fp16 bundle of a checkpoint, with an engine for this GPU."""
    capability, backend = gpu
    assert export_onnx.main([str(checkpoint), "-o", str(folder), "--dtype", "fp16"]) == 0
    assert ort.main([str(folder)]) == 0 and verify.main([str(checkpoint), str(folder)]) == 0
    assert trt.main([str(folder), "--backend", backend, "--sm", str(capability), "--capacity", str(capacity), "--rows", "2"]) == 0
    return open_bundle(folder)


@pytest.fixture(scope="module")
def bundle(gpu, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(folder / "q"), "--bits", "4", "--group", "32"]) == 0
    return with_engine(gpu, folder / "q", folder / "b", CAPACITY)


@pytest.fixture
def backend(bundle):
    backend = TrtBackend(bundle)
    yield backend
    backend.close()


def feed(backend, cache, ids):
    """Append ids [rows, s] to every row; logits [rows, s, vocab]."""
    ids, start = np.asarray(ids, np.int64), cache.lengths.copy()
    columns = np.arange(ids.shape[1])
    logits = backend.forward(ids, start[:, None] + columns, start, np.broadcast_to(columns, ids.shape), cache).copy()
    cache.lengths += ids.shape[1]
    return logits


def device_cache(backend, cache):
    """float32 arrays [rows, kv_heads, capacity, head_dim], read back from the device."""
    for index, (_, heads, size) in enumerate(backend.caches):
        host = backend.device.pinned((cache.rows, heads, cache.capacity, size), np.float16)
        backend.device.download(host, cache.address(index))
        backend.device.synchronize()
        yield host.astype(np.float32)
        backend.device.unpin(host)


def tokens(rows, count, seed=0):
    return np.random.default_rng(seed).integers(3, 384, (rows, count))


def test_golden_outputs(bundle, backend, capsys):
    short = [p for p in read_golden(bundle)[1] if len(p.fed) < CAPACITY]
    assert len(short) >= 3
    comparisons = [runtime_verify.replay(backend, p) for p in short]
    assert np.concatenate([c.kl for c in comparisons]).mean() < 1e-3
    assert not any((c.differs & ~c.near_tie).any() for c in comparisons)


def test_the_cache_is_updated_in_place(bundle, backend):
    """What the engine wrote into its buffers is what ONNX Runtime's CPU writes, and no slot beyond it is touched."""
    reference = OrtBackend(bundle, role="portable", exact=True)
    caches = [b.new_cache(2, CAPACITY) for b in (backend, reference)]
    addresses = [caches[0].address(i) for i in range(len(backend.caches))]
    for count in (9, 1, 1, 4):
        ids = tokens(2, count, seed=count)
        for b, cache in zip((backend, reference), caches):
            feed(b, cache, ids)
    assert [caches[0].address(i) for i in range(len(backend.caches))] == addresses
    for got, expected in zip(device_cache(backend, caches[0]), caches[1].storage, strict=True):
        np.testing.assert_allclose(got[:, :, :15], expected[:, :, :15].astype(np.float32), atol=0.02, rtol=0.02)
        assert not got[:, :, 15:].any() and got[:, :, :15].any()


def test_a_cuda_graph_changes_nothing(bundle, backend, monkeypatch):
    """Decode steps launched from a recorded graph against steps that are not: equal to the bit."""
    monkeypatch.setattr(trt_backend._Engine, "_capturable", lambda self, context: False)
    plain = TrtBackend(bundle)
    steps = tokens(1, 12)[0]
    unrecorded = plain.new_cache(1, CAPACITY)
    expected = [feed(plain, unrecorded, [[t]]) for t in steps]
    assert not unrecorded.storage.kept
    plain.close()
    monkeypatch.undo()
    cache = backend.new_cache(1, CAPACITY)
    got = [feed(backend, cache, [[t]]) for t in steps]
    assert cache.storage.kept, "no decode step was recorded"
    np.testing.assert_array_equal(got, expected)


def test_rows_of_a_batch_do_not_see_each_other(backend):
    """Five rows (the engine takes two at once): each gives what it gives alone, whatever its neighbours are."""
    ids = tokens(5, 20)
    cache = backend.new_cache(5, CAPACITY)
    together = [feed(backend, cache, ids), feed(backend, cache, ids[:, :1])]
    for row in range(5):
        alone = backend.new_cache(1, CAPACITY)
        for got, part in zip(together, (ids[row:row + 1], ids[row:row + 1, :1])):
            np.testing.assert_allclose(got[row:row + 1], feed(backend, alone, part), atol=0.05, rtol=0.01)


def test_steps_down_where_no_engine_is_for_this_gpu(bundle):
    bundle = open_bundle(bundle.folder)
    for entry in bundle.manifest["engines"]:
        entry["compute_capabilities"] = ["10"]
    opened, lines = open_backend(bundle, None, 1)
    assert opened.name in ("onnxruntime-cuda", "native", "onnxruntime-cpu") and "is for SM 10" in lines[1]
    opened.close()


def test_steps_down_where_the_device_has_no_memory_for_a_cache(bundle, monkeypatch):
    """2**31 rows fit no GPU; then, in the middle of a reply, an allocation that fails."""
    backend = TrtBackend(bundle)
    with pytest.raises(DeviceError, match="does not fit the GPU"):
        backend.new_cache(2**31, CAPACITY)
    feed(backend, backend.new_cache(1, CAPACITY), [[5, 6, 7]])         # the device is none the worse
    backend.close()
    expected = Engine(bundle.folder, provider="tensorrt").generate("The answer", max_new_tokens=20)[0].tokens
    engine = Engine(bundle.folder)
    assert engine.backend.name == "tensorrt"
    stream = engine.stream("The answer", max_new_tokens=20)
    next(stream)

    def fail(*args):
        raise DeviceError("out of memory")
    monkeypatch.setattr(engine.backend, "forward", fail)
    said = len(stream.reply.tokens)
    for _ in stream:
        pass
    assert stream.reply.tokens[:said] == expected[:said] and len(stream.reply.tokens) > said
    assert engine.backend.name != "tensorrt" and "no tensorrt: out of memory" in engine.explain()


@pytest.mark.real
def test_benchmark_against_cuda(gpu, smollm2, tmp_path, capsys):
    """Three rounds in turns on the real model; prints the ratio of the medians."""
    try:
        import onnxruntime
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("the installed onnxruntime has no CUDA provider")
    except ImportError as error:
        pytest.skip(str(error))
    assert quantize.main([str(smollm2), "-o", str(tmp_path / "q"), "--bits", "4", "--group", "32"]) == 0
    folder = with_engine(gpu, tmp_path / "q", tmp_path / "b", 512).folder
    figures = {"tensorrt": [], "cuda": []}
    for _ in range(3):
        for provider, found in figures.items():
            assert bench.main([str(folder), "--provider", provider, "--json", str(tmp_path / "bench.json")]) == 0
            found.append(json.loads((tmp_path / "bench.json").read_text()))
            assert found[-1]["engine"].startswith("tensorrt" if provider == "tensorrt" else "onnxruntime-cuda")
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        mine, theirs = (np.median([f[key] for f in figures[p]]) for p in figures)
        with capsys.disabled():
            print(f"\n{key}: TensorRT {mine:.0f}, CUDA {theirs:.0f}, ratio {mine / theirs:.2f}")
        assert mine > theirs, f"TensorRT is slower than CUDA in {key}"
