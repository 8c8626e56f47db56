"""Encoders' TensorRT engines against a double that computes: what they give, their limits, and why one is passed over."""

import functools
import gzip
import json
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")
pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed ([rtx], [gpu])")

import tensorrt_double as double                                    # noqa: E402
from encoder_fixtures import tiny                                   # noqa: E402
from export import bundle as bundles                                # noqa: E402
from export import onnx as export_onnx                              # noqa: E402
from runtime import Encoder, UserError, trt_encoder, verify         # noqa: E402
from runtime.encoder import Encoded                                 # noqa: E402
from runtime.encoder_bundle import open_encoder                     # noqa: E402
from runtime.trt_encoder import TrtEncoder                          # noqa: E402

ROWS, TOKENS = 3, 64
TEXTS = ["abc de f", "x", "the quick brown fox jumps over a lazy dog", "", ("ab", "cd e"), "b c", "a " * 100]


def add_engine(folder, name="engines/e.engine.gz", graph=None, **changes):
    manifest, whole = open_encoder(folder).manifest, {"rows": ROWS, "tokens": TOKENS} | changes
    plan = json.dumps({"onnx": str(graph or folder / "model.onnx"), "largest": [ROWS, TOKENS]}).encode()
    manifest["engines"].append({"file": name, "backend": "rtx", "version": double.VERSION, "bytes": len(plan),
                                "compute_capabilities": ["86", "89"]} | whole)
    bundles.add_file(folder, manifest, name, gzip.compress(plan))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(task): a bundle with an engine, which is its ONNX graph to the double."""
    root = tmp_path_factory.mktemp("trt")

    @functools.cache
    def make(task):
        assert export_onnx.main([str(tiny(root / f"{task}-model", task)), "-o", str(root / task), "--task", task]) == 0
        add_engine(root / task)
        return root / task
    return make


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders("text-classification"), tmp_path / "bundle")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(...) -> (CUDA, TensorRT), doubles that every Encoder finds from now on."""
    def make(compute_capability=89, fail=(), error="cudaErrorMemoryAllocation", **kwargs):
        cuda = double.Cuda(compute_capability, fail, error)
        module = double.TensorRT(cuda, **kwargs)
        monkeypatch.setattr(trt_encoder, "TrtEncoder", functools.partial(TrtEncoder, cuda=cuda, modules={"rtx": module}))
        return cuda, module
    return make


@pytest.mark.parametrize("task", ["text-classification", "question-answering"])
def test_an_engine_gives_what_the_graph_gives(folders, gpu, task):
    """Of one output and of two, of each text and of each token; more texts than its profile takes go through it in parts."""
    cuda, module = gpu()
    with Encoder(folders(task), provider="cpu", role="portable", threads=1) as cpu, Encoder(folders(task), threads=1) as trt:
        assert (trt.provider, trt.device, trt.explain()) == ("tensorrt", "cuda", "engine of the portable graph on tensorrt")
        for expected, found in zip(cpu.outputs(TEXTS), trt.outputs(TEXTS), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert trt.outputs(TEXTS[:1])[0].shape == cpu.outputs(TEXTS[:1])[0].shape and trt.truncated == 1
        shapes = [shapes["input_ids"] for _, shapes, _, _ in module.calls]
        assert max(rows for rows, _ in shapes) == ROWS and max(tokens for _, tokens in shapes) == TOKENS
        assert cuda.blocks and not any(name == "cudaMalloc" for name, _ in cuda.calls[-20:])      # memory is taken once
    del trt
    assert not cuda.blocks and not cuda.pinned


def test_texts_beyond_the_engine_are_refused(folder, gpu):
    gpu()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"][0]["tokens"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Encoder(folder, provider="tensorrt") as encoder:
        one = Encoded(np.full(9, 5), np.zeros(9, np.int64), np.zeros((9, 2), np.int64), False)
        with pytest.raises(UserError, match="takes texts of at most 8 tokens, and one has 9"):
            encoder.run([one])


PASSED_OVER = {
    "another GPU": (dict(compute_capability=120), "is for SM 86, 89, Double is SM 120"),
    "no driver": (dict(fail=["cudaSetDevice"], error="cudaErrorInsufficientDriver"), "no NVIDIA GPU or driver that CUDA can use is here"),
    "another version": (dict(version="1.0"), f"was built by tensorrt_rtx {double.VERSION}, installed is 1.0"),
    "invalid": (dict(invalid=1), "TensorRT refuses the engine"),
    "no memory for a context": (dict(refuse=["context"]), "too little memory"),
    "no memory for a call": (dict(fail=["cudaMalloc"]), "cudaErrorMemoryAllocation in cudaMalloc")}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_an_engine_that_cannot_run_is_passed_over_with_its_reason(folders, gpu, case):
    given, reason = PASSED_OVER[case]
    gpu(**given)
    with Encoder(folders("text-classification"), threads=1) as encoder:
        runs, trt, *_ = encoder.explain().splitlines()
        assert runs == encoder.runs_as == "portable graph on cpu" and trt.startswith("no tensorrt: ") and reason in trt
        encoder.classify(["a"])
    with pytest.raises(UserError, match=re.escape(reason)):
        Encoder(folders("text-classification"), provider="tensorrt")


def test_an_engine_of_a_smaller_profile_than_its_entrys_is_passed_over(folder, gpu):
    gpu()
    add_engine(folder, "engines/larger.engine.gz", rows=ROWS + 1)
    with Encoder(folder, threads=1) as encoder:
        assert "larger.engine.gz: TensorRT refused a shape" in encoder.explain().splitlines()[1]


def test_verify_runs_the_engine_or_says_why_not(folders, gpu, capsys):
    for given, said in (({}, "tensorrt: 1 - cosine to PyTorch's outputs"), ({"compute_capability": 75}, "tensorrt: not run: engines/e.engine.gz")):
        gpu(**given)
        assert verify.main([str(folders("text-classification")), "--threads", "1"]) == 0 and said in capsys.readouterr().out


def test_a_device_that_fails_is_stepped_down_from(folders, gpu):
    cuda, module = gpu()
    folder = folders("text-classification")
    with Encoder(folder, threads=1) as encoder, Encoder(folder, provider="tensorrt") as insisting:
        before = encoder.outputs(TEXTS)
        module.refuse.add("execute")
        np.testing.assert_allclose(encoder.outputs(TEXTS), before, atol=1e-5)
        assert encoder.provider == encoder.device == "cpu" and "TensorRT could not run a step" in encoder.explain().splitlines()[1]
        with pytest.raises(UserError, match="could not run a step"):
            insisting.outputs(TEXTS)


def test_engines_that_are_refused(folder, gpu, tmp_path):
    gpu()
    with pytest.raises(UserError, match="engines are of the portable graph, and the fast one is asked for"):
        Encoder(folder, provider="tensorrt", role="fast")
    path = folder / "engines/e.engine.gz"
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="e.engine.gz: the engine cannot be read"):
        Encoder(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="bytes, but the manifest says"):
        Encoder(folder, provider="cpu")
    path.unlink()
    with pytest.raises(UserError, match="e.engine.gz: missing from the bundle"):
        Encoder(folder, provider="cpu")


def test_no_engine_and_one_of_another_task(folders, folder, gpu):
    gpu()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["engines"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the bundle has no TensorRT engine; `python -m export.trt` adds one"):
        Encoder(folder, provider="tensorrt")
    with Encoder(folder, threads=1) as encoder:
        assert "tensorrt" not in encoder.explain()
    add_engine(folder, "engines/other.engine.gz", folders("question-answering") / "model.onnx")
    with pytest.raises(UserError, match="which is no encoder's with logits; build it again"):
        Encoder(folder)


@pytest.mark.parametrize("change, sentence", [
    ({"file": "../elsewhere"}, "names '../elsewhere', which is not among its files"), ({"rows": "3"}, ".rows should be int, not '3'"),
    ({"rows": 0}, "is for 0 texts of 64 tokens, where the model takes 64"), ({"tokens": 65}, "is for 3 texts of 65 tokens"),
    ({"bytes": None}, ".bytes should be int"), ({"compute_capabilities": [86]}, "should be str, not 86")])
def test_a_broken_entry_is_refused_when_the_bundle_opens(folder, change, sentence):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(sentence)):
        Encoder(folder, provider="cpu")
