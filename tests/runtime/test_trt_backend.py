"""The TensorRT backend against a double that computes: what it gives, the calls it makes, every way it steps down."""

import inspect
import json
import re
import shutil

import numpy as np
import pytest

real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")
real_cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed ([rtx], [gpu])")

import tensorrt_double as double                                    # noqa: E402
from export import bundle as bundles                                # noqa: E402
from export import onnx as export_onnx                              # noqa: E402
from runtime import Engine, backends, decode                        # noqa: E402
from runtime.bundle import open_bundle                              # noqa: E402
from runtime.errors import DeviceError, UserError                   # noqa: E402
from runtime.ort_backend import OrtBackend                          # noqa: E402
from runtime.sampling import Sampler, SamplingOptions               # noqa: E402
from runtime.trt_backend import TrtBackend                          # noqa: E402
from runtime.trt_engine import read_plan                              # noqa: E402

ROWS, TOKENS, LOGITS = 2, 8, 4


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    """A tiny bundle with engines of 64 and 128 slots, which are its ONNX graph to the double."""
    folder = tmp_path_factory.mktemp("trt") / "bundle"
    assert export_onnx.main([str(tiny_checkpoint("smollm2")), "-o", str(folder)]) == 0
    for capacity in (64, 128):
        add_engine(folder, f"engines/c{capacity}.engine", capacity)
    return open_bundle(folder)


def add_engine(folder, name, capacity, profiles=("decode", "prefill"), **changes):
    manifest = open_bundle(folder).manifest
    high = {"input_ids": [ROWS, TOKENS], "logits_positions": [ROWS, LOGITS]}
    profiles = [{"name": name, "shapes": {k: [None, None, v] for k, v in high.items()}} for name in profiles]
    manifest["engines"].append({"file": name, "backend": "rtx", "version": double.VERSION, "capacity": capacity,
                                "compute_capabilities": ["86", "89"], "profiles": profiles, "bytes": 1} | changes)
    plan = json.dumps({"onnx": str(folder / "portable.onnx"), "capacity": capacity})
    bundles.add_file(folder, manifest, name, plan.encode())


def opened(bundle, cuda=None, **kwargs):
    cuda = cuda or double.Cuda()
    module = double.TensorRT(cuda, **kwargs)
    return TrtBackend(bundle, cuda=cuda, modules={"rtx": module}), cuda, module


def feed(backend, cache, ids, lengths, positions):
    ids, start = np.asarray(ids, np.int64), np.asarray(lengths, np.int64)
    return backend.forward(ids, start[:, None] + np.arange(ids.shape[1]), start, np.asarray(positions, np.int64), cache)


def parameters(function):
    """Names of a double's parameters, self left out."""
    return [p for p in inspect.signature(function).parameters if p != "self"]


def documented(function):
    """Names of the parameters in the first line of a compiled function's documentation."""
    inside = re.search(r"\((.*)\)", function.__doc__.strip().splitlines()[0]).group(1)
    # pybind11 writes "name: type", Cython "type name" or "name: type"
    names = [part.split(":")[0].split("=")[0].split()[-1] for part in re.sub(r"\[[^\]]*\]", "", inside).split(",") if part.strip()]
    return [name for name in names if name != "self"]


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "granite4_h"])
def test_states_go_up_and_down(family, tiny_checkpoint, tmp_path):
    """Prompts longer than an engine's chunk, steps, fork, a place that is come back to and one step taken back, as ONNX Runtime does it."""
    assert export_onnx.main([str(tiny_checkpoint(family)), "-o", str(tmp_path / "b")]) == 0
    add_engine(tmp_path / "b", "engines/c64.engine", 64)
    add_engine(tmp_path / "b", "engines/c128.engine", 128)
    (trt, _, _), ort, found = opened(open_bundle(tmp_path / "b")), OrtBackend(open_bundle(tmp_path / "b")), []
    assert (trt.chunk, ort.chunk) == (TOKENS, 64) and trt.cache_bytes(3, 64) == ort.cache_bytes(3, 64)
    for backend in (trt, ort):
        rng, rows = np.random.default_rng(0), []
        cache = backend.new_cache(3, 64)
        rows.append(decode.prefill(backend, cache, [rng.integers(3, 380, n) for n in (5, 21, 8)]).copy())
        places = [cache.snapshot(row) for row in range(3)]
        for _ in range(3):
            rows.append(decode.step(backend, cache, rng.integers(3, 380, 3)).copy())
        cache.fork(1, 0)
        cache.truncate(2, 10)
        rows.append(decode.step(backend, cache, rng.integers(3, 380, 3)).copy())
        cache.restore(1, places[1])
        other = backend.new_cache(2, 64)
        other.write(1, 0, 32, cache.read(1, 0, 32))
        other.lengths[1] = places[1].length
        other.restore(1, places[1])
        rows.append(decode.logits(backend, rng.integers(3, 380, 4), 2, other.view(1, 2)).copy())
        cache.grow(128)
        rows.append(decode.logits(backend, rng.integers(3, 380, 30), 2, cache.view(1, 2)).copy())
        found.append(np.concatenate(rows))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    with pytest.raises(UserError, match="takes at most 8 tokens of a row in one call, not 9"):
        feed(trt, trt.new_cache(1, 64), [[1] * 9], [0], [[0]])


@pytest.mark.parametrize("owner", ["Runtime", "Engine", "Context"])
def test_the_doubles_methods_are_those_of_tensorrt(owner):
    real_class = {"Runtime": real.Runtime, "Engine": real.ICudaEngine, "Context": real.IExecutionContext}[owner]
    methods = {n: f for n, f in vars(getattr(double, owner)).items() if inspect.isfunction(f) and n[0] != "_"}
    assert methods
    for name, method in methods.items():
        overloads = getattr(real_class, name).__doc__
        names = parameters(method)
        if "Overloaded function" in overloads:
            lines = [line for line in overloads.splitlines() if re.match(rf"\d+\. {name}\(", line)]
            found = [documented(type("F", (), {"__doc__": line})) for line in lines]
            assert any(got[:len(names)] == names for got in found), (name, found)
        else:
            assert documented(getattr(real_class, name))[:len(names)] == names, name
    if owner == "Engine":
        assert hasattr(real.ICudaEngine, "num_io_tensors")


def test_the_doubles_functions_are_those_of_cuda():
    functions = {n: f for n, f in vars(double.Cuda).items() if inspect.isfunction(f) and n.startswith("cuda")}
    assert len(functions) > 15
    for name, function in functions.items():
        assert len(parameters(function)) == len(documented(getattr(real_cuda, name))), name


def test_logits_equal_onnx_runtime_over_ragged_prefill_and_decode(bundle):
    """Ragged rows, more rows, tokens and logits than a profile takes, forks, then decode steps: the reference's numbers."""
    trt, cuda, _ = opened(bundle)
    ort = OrtBackend(bundle, role="portable")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 384, (3, 20))
    positions = np.stack([np.arange(0, 20, 3), np.arange(1, 20, 3), np.arange(7)])        # 7 each, in three chunks
    caches = [trt.new_cache(3, 64), ort.new_cache(3, 64)]
    got, expected = (feed(b, c, ids, [0, 0, 0], positions) for b, c in zip((trt, ort), caches))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for cache in caches:
        cache.lengths[:] = [20, 13, 5]
        cache.fork(2, 0)
        assert cache.lengths.tolist() == [5, 13, 5]
    for step in range(4):
        token, lengths = rng.integers(0, 384, (3, 1)), caches[0].lengths.copy()
        got, expected = (feed(b, c, token, lengths, np.zeros((3, 1))).copy() for b, c in zip((trt, ort), caches))
        np.testing.assert_allclose(got, expected, atol=1e-4)
        for cache in caches:
            cache.lengths += 1


def test_the_decode_loop_gives_the_same_greedy_tokens_and_grows_the_cache(bundle):
    prompts = [np.arange(5, 35), np.arange(40, 52), np.arange(7, 17)]
    def tokens(backend, capacity):
        sequences = [decode.Sequence(p, Sampler(SamplingOptions(temperature=0.0), p, 0), 50) for p in prompts]
        list(decode.run(backend, backend.new_cache(3, capacity), list(sequences)))
        return [s.tokens for s in sequences]
    trt, cuda, _ = opened(bundle)
    assert tokens(trt, 64) == tokens(OrtBackend(bundle, role="portable"), 128)


def test_a_decode_step_is_recorded_once_and_then_launched(bundle):
    trt, cuda, module = opened(bundle)
    cache = trt.new_cache(2, 64)
    for step in range(4):
        feed(trt, cache, [[step], [step]], [step, step], [[0], [0]])
    assert [(profile, recorded) for profile, _, _, recorded in module.calls] == [(0, False), (0, True)]
    assert sum(name == "cudaGraphLaunch" for name, _ in cuda.calls) == 3
    trt_plain, cuda, module = opened(bundle, refuse=["capture"])
    for step in range(2):
        feed(trt_plain, trt_plain.new_cache(1, 64), [[step]], [0], [[0]])
    assert not any(name == "cudaStreamBeginCapture" for name, _ in cuda.calls)


def test_profiles_shapes_and_addresses_of_a_call(bundle):
    trt, cuda, module = opened(bundle)
    cache = trt.new_cache(4, 64)
    feed(trt, cache.view(1, 3), [[1, 2, 3]] * 2, [0, 0], [[2], [2]])
    (profile, shapes, addresses, _), = module.calls
    assert profile == 1 and shapes["input_ids"] == (2, 3) and shapes["past_key.0"] == (2, 2, 64, 16)
    row = 2 * 64 * 16 * 4
    assert addresses["past_key.0"] == addresses["present_key.0"] == cache.address(0) + row
    assert cache.nbytes == trt.cache_bytes(4, 64) == 4 * 4 * row and cache.view(1, 3).nbytes == 2 * 4 * row
    order = [name for name, _ in cuda.calls]
    upload, download = (i for i, n in enumerate(order) if n == "cudaMemcpyAsync")
    assert upload < download < len(order) - 1 - order[::-1].index("cudaStreamSynchronize")


def test_an_engine_of_one_profile_runs_steps_in_it(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    bundles.write_manifest(folder, bundle.manifest | {"engines": []})
    add_engine(folder, "engines/one.engine", 64, profiles=("prefill",))
    (two, *_), (one, cuda, module) = opened(bundle), opened(open_bundle(folder))
    caches = two.new_cache(1, 64), one.new_cache(1, 64)
    for ids, start in (([[5, 6, 7]], 0), ([[8]], 3), ([[9]], 4)):
        expected, found = (feed(trt, cache, ids, [start], [[len(ids[0]) - 1]]).copy() for trt, cache in zip((two, one), caches))
        np.testing.assert_array_equal(found, expected)
    assert {profile for profile, *_ in module.calls} == {0}
    assert sum(name == "cudaGraphLaunch" for name, _ in cuda.calls) == 1


def test_capacities(bundle):
    trt, *_ = opened(bundle)
    assert trt.new_cache(1, 10).capacity == 64 and trt.new_cache(1, 65).capacity == 128
    with pytest.raises(UserError, match="hold at most 128 tokens, and 129 are needed.*--capacity 129"):
        trt.new_cache(1, 129)
    with pytest.raises(DeviceError, match="and 256 are needed"):         # the model's context, however much is asked
        trt.cache_bytes(1, 9999)


def test_a_closed_backend_and_a_step_that_fails_are_device_errors(bundle):
    """Both are what makes `Engine` hand a reply to the next backend."""
    trt, cuda, module = opened(bundle)
    cache = trt.new_cache(1, 64)
    feed(trt, cache, [[1, 2]], [0], [[1]])
    module.refuse.add("execute")
    with pytest.raises(DeviceError, match="could not run a step"):
        feed(trt, cache, [[1, 2]], [0], [[1]])
    module.refuse.clear()
    cuda.fail.add("cudaStreamSynchronize")
    with pytest.raises(DeviceError, match="cudaErrorMemoryAllocation in cudaStreamSynchronize"):
        feed(trt, cache, [[1, 2]], [0], [[1]])
    cuda.fail.clear()
    trt.close()
    with pytest.raises(DeviceError, match="was closed"):
        feed(trt, cache, [[1, 2]], [0], [[1]])


def test_a_reply_goes_on_where_the_device_fails(bundle, monkeypatch):
    """An engine over the double, then over ONNX Runtime: the tokens are those of the device that never failed."""
    def engine(**kwargs):
        made = opened(bundle)[0]
        fallen = lambda *_, **__: OrtBackend(bundle, role="portable")      # noqa: E731
        monkeypatch.setattr(backends, "_OPEN", {"tensorrt": lambda *_, **__: made, "cuda": fallen, "native": fallen, "cpu": fallen})
        return Engine(bundle.folder, **kwargs), made
    whole, _ = engine()
    expected = [r.tokens for r in whole.generate(["The answer", "Once"], max_new_tokens=40, ignore_model_stop=True)]
    assert whole.backend.name == "tensorrt"
    failing, made = engine()
    run, calls = made.forward, []

    def forward(*args):
        calls.append(1)
        if len(calls) > 9:
            raise DeviceError("the GPU failed: cudaErrorMemoryAllocation")
        return run(*args)
    made.forward = forward
    got = [r.tokens for r in failing.generate(["The answer", "Once"], max_new_tokens=40, ignore_model_stop=True)]
    assert got == expected and failing.backend.name == "onnxruntime-cpu"
    assert failing.explain().splitlines()[1:] == ["no tensorrt: the GPU failed: cudaErrorMemoryAllocation"]
    long, _ = engine()
    assert len(long.generate("Once", max_new_tokens=200, ignore_model_stop=True)[0].tokens) == 200
    assert "hold at most 128 tokens" in long.explain()
    insisting, _ = engine(provider="tensorrt")
    with pytest.raises(UserError, match="hold at most 128 tokens"):
        insisting.generate("Once", max_new_tokens=200)


def test_device_memory_is_given_back(bundle):
    trt, cuda, _ = opened(bundle)
    cache = trt.new_cache(2, 64)
    feed(trt, cache, [[1], [2]], [0, 0], [[0], [0]])
    cache.grow(128)
    del cache
    trt.close()
    assert not cuda.blocks and not cuda.pinned


STEPS_DOWN = {
    "no driver": (dict(fail=["cudaSetDevice"], error="cudaErrorInsufficientDriver"), {}, "cudaErrorInsufficientDriver"),
    "another GPU": (dict(compute_capability=120), {}, "is for SM 86, 89, Double is SM 120"),
    "another version": ({}, dict(version="1.0"), f"was built by tensorrt_rtx {double.VERSION}, installed is 1.0"),
    "driver found late": ({}, dict(driver=False), "no usable GPU or driver"),
    "invalid": ({}, dict(invalid=int(real.EngineInvalidityDiagnostics.UNSUPPORTED_CC)), "refuses the engine: UNSUPPORTED_CC"),
    "corrupt": ({}, dict(refuse=["deserialize"]), "could not load the engine"),
    "no memory for a context": ({}, dict(refuse=["context"]), "too little memory"),
    "profile": ({}, dict(refuse=["profile"]), "profile decode cannot be set"),
}


@pytest.mark.parametrize("case", STEPS_DOWN)
def test_opening_fails_with_the_reason(bundle, case):
    cuda, module, reason = STEPS_DOWN[case]
    with pytest.raises(UserError, match=re.escape(reason)):
        opened(bundle, double.Cuda(**cuda), **module)


def test_a_cache_too_large_for_the_device_is_refused_and_leaves_nothing(bundle):
    trt, cuda, _ = opened(bundle)
    before = set(cuda.blocks)
    cuda.allowed = 2                                     # the third buffer fails
    with pytest.raises(UserError, match="KV cache of 2 x 64 tokens .* does not fit the GPU: .*cudaErrorMemoryAllocation"):
        trt.new_cache(2, 64)
    assert set(cuda.blocks) == before


def test_a_bundle_without_engines(tiny_checkpoint, tmp_path):
    assert export_onnx.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "b")]) == 0
    with pytest.raises(UserError, match="has no TensorRT engine"):
        TrtBackend(open_bundle(tmp_path / "b"))


def test_a_compressed_engine_and_a_broken_one(bundle, tmp_path):
    import gzip
    (tmp_path / "x.engine.gz").write_bytes(gzip.compress(b"plan"))
    assert read_plan(tmp_path / "x.engine.gz") == b"plan"
    (tmp_path / "y.engine.gz").write_bytes(gzip.compress(b"plan" * 999)[:20])
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "y.engine.gz")


def test_an_engine_unpacks_to_no_more_than_the_manifest_says(tmp_path):
    """A megabyte that unpacks to a gigabyte is read as far as the limit, whatever the manifest says."""
    import gzip
    import tracemalloc
    path, plan = tmp_path / "x.engine.gz", np.random.default_rng(0).bytes(100_000)
    path.write_bytes(gzip.compress(plan))
    assert read_plan(path, len(plan)) == read_plan(path) == plan
    for wrong in (len(plan) - 1, len(plan) + 1, 0, -1, 1 << 60):
        with pytest.raises(UserError, match="does not unpack to"):
            read_plan(path, wrong)
    with gzip.open(path, "wb", 9) as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    for said in (None, 1 << 30, 1000):
        with pytest.raises(UserError, match="does not unpack to"):
            read_plan(path, said)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("change, sentence", [
    ({"file": "../elsewhere"}, "engines[0].file is '../elsewhere', which is not among its files"),
    ({"capacity": "64"}, "engines[0].capacity should be int, not '64'"),
    ({"compute_capabilities": [86]}, "engines[0].compute_capabilities[0] should be str, not 86"),
])
def test_a_broken_engine_entry_is_refused_when_the_bundle_opens(bundle, tmp_path, change, sentence):
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_bundle(folder)
