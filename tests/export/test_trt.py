"""`python -m export.trt` with real builds: bundles, other models, every bad input, and builds that are interrupted."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto as T

tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")

from export import onnx as export_onnx                              # noqa: E402
from export import trt
from export.tensorrt import build as trt_build                                   # noqa: E402
from compress import quantize  # noqa: E402
from runtime.bundle import open_bundle                              # noqa: E402
from runtime.errors import CheckFailed                              # noqa: E402
from runtime.cuda_device import Gpu                                  # noqa: E402
from trt_networks import convolution, model, node, product, value   # noqa: E402


@pytest.fixture
def conv(tmp_path):
    onnx.save(convolution(dynamic=True), str(tmp_path / "conv.onnx"))
    return tmp_path / "conv.onnx"


@pytest.fixture
def bundle(tiny_checkpoint, tmp_path):
    """bundle(dtype, bits) -> a fresh tiny bundle; bits None: not quantized."""
    def make(dtype="fp16", bits=4):
        checkpoint = tiny_checkpoint("smollm2")
        if bits:
            quantized = tmp_path / "quantized"
            assert quantize.main([str(checkpoint), "-o", str(quantized), "--bits", str(bits), "--group", "32"]) == 0
            checkpoint = quantized
        assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "bundle"), "--dtype", dtype]) == 0
        return tmp_path / "bundle"
    return make


def fails(capsys, *argv, code=2):
    capsys.readouterr()
    assert trt.main([str(a) for a in argv]) == code
    return capsys.readouterr().err


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if p.name.endswith((".part", ".engine", ".engine.gz", ".engine.json"))]


@pytest.mark.parametrize("dtype, bits", [("fp16", 4), ("fp16", 8), ("fp16", None), ("fp32", 4), ("bf16", 4)])
def test_a_bundle_gains_an_engine_for_each_capacity(bundle, capsys, dtype, bits):
    folder = bundle(dtype, bits)
    before = open_bundle(folder).manifest
    assert trt.main([str(folder), "--sm", "86,120", "--capacity", "64,128", "--rows", "2", "--chunk", "32"]) == 0
    opened = open_bundle(folder, verify=True)
    engines = opened.manifest["engines"]
    assert [e["capacity"] for e in engines] == [64, 128]
    for engine in engines:
        assert (engine["backend"], engine["version"]) == ("rtx", tensorrt.__version__)
        assert engine["compute_capabilities"] == ["86", "120"]
        record = json.loads(opened.path(engine["record"]).read_text())
        assert record["native_layers"] == {"RotaryEmbedding": 4, "TensorScatter": 4, "Attention": 2}
        assert record["source"]["portable.onnx"] == before["files"]["portable.onnx"]["sha256"]
        assert record["source"]["weights.bin"] == before["files"]["weights.bin"]["sha256"]
        decode, prefill = record["profiles"]
        assert decode["shapes"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
        assert prefill["shapes"]["input_ids"] == [[1, 1], [1, 32], [2, 32]]
        assert prefill["shapes"]["past_key.0"][2] == [2, 2, engine["capacity"], 16]
        plan = gzip.decompress(opened.path(engine["file"]).read_bytes())
        assert len(plan) == engine["bytes"] and record["build_s"] > 0
    assert opened.manifest["on_device"] == "python -m export.trt . --backend trt --capacity 64,128 --rows 2"
    assert opened.manifest | {"engines": [], "files": before["files"], "on_device": None} == before | {"on_device": None}


def test_one_profile_makes_a_smaller_engine(bundle):
    folder, sizes = bundle(), []
    for more in ([], ["--one-profile"]):
        assert trt.main([str(folder), "--sm", "89", "--capacity", "64", "--chunk", "32", *more]) == 0
        manifest = open_bundle(folder, verify=True).manifest
        (engine,) = manifest["engines"]
        sizes.append(engine["bytes"])
    assert [p["name"] for p in engine["profiles"]] == ["prefill"] and sizes[1] < 0.8 * sizes[0]
    assert "--one-profile" in manifest["on_device"]


def test_a_second_build_replaces_the_first_and_stays_inspectable(bundle, capsys):
    folder = bundle()
    for _ in range(2):
        assert trt.main([str(folder / "portable.onnx"), "--sm", "89", "--capacity", "64"]) == 0
    (engine,) = open_bundle(folder, verify=True).manifest["engines"]
    capsys.readouterr()
    assert trt.main(["inspect", str(folder / engine["file"])]) == 0
    shown = capsys.readouterr().out
    assert 'compute_capabilities: ["89"]' in shown
    if "layer information: needs a GPU" in shown:
        assert "no NVIDIA GPU or driver" in shown and "[TRT]" not in shown
    assert "portable.onnx.json cannot be read (No such file or directory)" in fails(capsys, "inspect", folder / "portable.onnx")
    assert "no such file" in fails(capsys, "inspect", folder / "nothing.engine")


def test_any_other_model_is_built_beside_itself(conv, tmp_path):
    assert trt.main([str(conv), "--sm", "89", "--shapes", "image:1x3x16x16,2x3x16x16,4x3x16x16"]) == 0
    record = json.loads((tmp_path / "conv.engine.json").read_text())
    assert (tmp_path / "conv.engine").stat().st_size == record["bytes"]
    assert record["profiles"][0]["shapes"] == {"image": [[1, 3, 16, 16], [2, 3, 16, 16], [4, 3, 16, 16]]}
    assert record["capacity"] is None and record["outputs"][0]["name"] == "scores"


def test_a_model_of_fixed_shapes_needs_none_and_gz_compresses(tmp_path):
    onnx.save(convolution(), str(tmp_path / "fixed.onnx"))
    assert trt.main([str(tmp_path / "fixed.onnx"), "--sm", "89", "-o", str(tmp_path / "deep" / "x.engine.gz")]) == 0
    record = json.loads((tmp_path / "deep" / "x.engine.json").read_text())
    assert len(gzip.decompress((tmp_path / "deep" / "x.engine.gz").read_bytes())) == record["bytes"]


def test_listing(capsys):
    assert trt.main(["--list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[3:]}
    assert set(rows) == {f"SM{t}" for t in trt_build.targets(tensorrt)}
    assert "fp32" not in rows["SM75"] and "fp8" in rows["SM89"] and "fp8" not in rows["SM86"]


def test_devices_that_are_no_rtx_targets_get_the_command(bundle, capsys):
    folder = bundle()
    assert trt.main([str(folder), "--sm", "87"]) == 0
    out = capsys.readouterr().out
    assert f"SM87 (Jetson Orin): built on the device only, by: python -m export.trt {folder} --backend trt" in out
    manifest = open_bundle(folder, verify=True).manifest
    assert manifest["on_device"] == "python -m export.trt . --backend trt" and manifest["engines"] == []


def test_plain_tensorrt_says_what_is_missing(conv, capsys):
    try:
        import tensorrt                                             # noqa: F401
    except ImportError:
        assert fails(capsys, conv, "--backend", "trt").startswith(
            "error: --backend trt: tensorrt cannot be loaded (No module named 'tensorrt'); pip install")
    else:
        pytest.skip("plain tensorrt is installed here")


class PlainTensorRT:
    """Plain tensorrt, played by TensorRT-RTX: it records what is set on a configuration, has no compute capabilities to
    set, and its GPU is an SM89. A name that the real module lacks is an AttributeError."""

    def __init__(self):
        self.seen = seen = []

        class Configuration:
            def __init__(self, real):
                super().__setattr__("real", real)

            def __getattr__(self, name):
                assert "compute_capabilit" not in name, f"plain tensorrt has no {name}"
                method = getattr(self.real, name)
                return lambda *args: seen.append((name, *args)) or method(*args)

            def __setattr__(self, name, value):
                assert hasattr(type(self.real), name) and "compute_capabilit" not in name
                seen.append((name, value))
                setattr(self.real, name, value)

        class Builder(tensorrt.Builder):
            def create_builder_config(self):
                real = super().create_builder_config()
                real.num_compute_capabilities = 1
                real.set_compute_capability(tensorrt.ComputeCapability.SM89, 0)
                return Configuration(real)

            def build_serialized_network(self, network, config):
                return super().build_serialized_network(network, config.real)
        self.Builder = Builder

    def __getattr__(self, name):
        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(tensorrt, name)


def test_plain_tensorrt_takes_the_same_way_to_an_engine(bundle, conv, tmp_path, capsys, monkeypatch):
    plain, load = PlainTensorRT(), trt_build.importlib.import_module
    monkeypatch.setattr(trt_build.importlib, "import_module", lambda name: plain if name == "tensorrt" else load(name))
    monkeypatch.setattr("runtime.cuda_device.present_gpu", lambda: Gpu("Double", 89))
    folder, timings = bundle(), tmp_path / "timings"
    argv = [str(folder), "--capacity", "64", "--workspace-mb", "64", "--timing-cache", str(timings),
            "--hardware-compatibility", "same_compute_capability"]
    assert trt.main(argv) == 0                                      # the default where plain tensorrt finds a GPU
    (engine,) = open_bundle(folder, verify=True).manifest["engines"]
    assert (engine["file"], engine["backend"], engine["compute_capabilities"]) == ("engines/trt-sm89-c64.engine.gz", "trt", ["89"])
    first, kept = dict((name, args) for name, *args in plain.seen), timings.read_bytes()
    assert first["set_memory_pool_limit"] == [tensorrt.MemoryPoolType.WORKSPACE, 64 << 20]
    assert first["hardware_compatibility_level"] == [tensorrt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY]
    assert first["create_timing_cache"] == [b""] and first["set_timing_cache"][1] is False and kept
    assert [name for name, *_ in plain.seen].count("add_optimization_profile") == 2
    plain.seen.clear()
    assert trt.main(argv) == 0
    assert ("create_timing_cache", kept) in plain.seen              # what the first build learned
    assert "builds for the GPU of this machine, SM89" in fails(capsys, folder, "--sm", "86")
    assert trt.main(["--list"]) == 0 and "builds for the GPU of this machine only" in capsys.readouterr().out


def test_plain_tensorrt_without_a_gpu(conv, capsys, monkeypatch):
    class NoDriver(PlainTensorRT):
        def Builder(self, log):
            raise TypeError("pybind11::init(): factory function returned nullptr")
    load = trt_build.importlib.import_module
    monkeypatch.setattr(trt_build.importlib, "import_module", lambda name: object.__new__(NoDriver) if name == "tensorrt" else load(name))
    assert "--backend trt: TensorRT found no NVIDIA GPU or driver here (pybind11" in fails(capsys, conv, "--backend", "trt")


BAD_SHAPES = {
    (): "the model has dynamic inputs without shapes: image [batch, 3, 16, 16]; add for example --shapes "
        "image:1x3x16x16,1x3x16x16,4x3x16x16",
    ("image:4x3x16x16,2x3x16x16,8x3x16x16",): "every size must rise: min <= opt <= max",
    ("image:1x3x16",): "1x3x16 has 3 dimensions, but image is [batch, 3, 16, 16]",
    ("image:1x4x16x16",): "1x4x16x16 does not fit image, which is [batch, 3, 16, 16]",
    ("image:0x3x16x16",): "0x3x16x16 does not fit image",
    ("picture:1x3x16x16",): "the model has no input 'picture'; it has image",
    ("image:1xax16x16",): "shapes are numbers with x between them, as in 1x128",
    ("image:1x3x16x16,2x3x16x16",): "give one shape, or three: min,opt,max",
    ("1x3x16x16",): "write it as name:min,opt,max",
}


@pytest.mark.parametrize("shapes", BAD_SHAPES)
def test_bad_shapes(conv, tmp_path, capsys, shapes):
    assert BAD_SHAPES[shapes] in fails(capsys, conv, *(["--shapes", *shapes] if shapes else []))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("sm, sentence", [
    ("99", "--sm 99: no such target; TensorRT-RTX builds for 75, 80, 86, 89, 120, 121, and 72, 87, 90"),
    ("fast", "--sm fast: give compute capabilities with commas between, as in 86,89"),
    ("75", "SM75 has no float32 matrix products in TensorRT-RTX"),
])
def test_bad_targets(conv, tmp_path, capsys, sm, sentence):
    assert sentence in fails(capsys, conv, "--sm", sm, "--shapes", "image:1x3x16x16")
    assert not leftovers(tmp_path)


def test_files_that_are_no_model(tmp_path, capsys):
    (tmp_path / "text.onnx").write_text("hello, this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, sentence in (("text.onnx", "not an ONNX model"), ("empty.onnx", "not an ONNX model"),
                           ("none.onnx", "no such file or folder")):
        assert sentence in fails(capsys, tmp_path / name)
    assert "2 ONNX models in it and no manifest.json; give one of them, for example" in fails(capsys, tmp_path)


def test_external_data_missing_or_short(tmp_path, capsys):
    onnx.save(product("fp32", "dense"), str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=0)
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:100])
    assert "m.bin: the weights of m.onnx are missing or too short (the tensor w ends at byte 32768)" in fails(capsys, tmp_path / "m.onnx")
    (tmp_path / "m.bin").unlink()
    assert "missing or too short" in fails(capsys, tmp_path / "m.onnx")
    assert not leftovers(tmp_path)


def test_an_operator_no_one_supports(tmp_path, capsys):
    onnx.save(model([node("Nonsense", ["x"])], [value("x", T.FLOAT, [4])], [value("y", T.FLOAT, [4])]), str(tmp_path / "m.onnx"))
    assert "nonsense (Nonsense): not valid ONNX (No Op registered for Nonsense with domain_version of 24)" in fails(capsys, tmp_path / "m.onnx")


def test_an_output_that_cannot_be_written(conv, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    err = fails(capsys, conv, "--shapes", "image:1x3x16x16", "-o", tmp_path / "file" / "x.engine")
    assert "x.engine could not be written (" in err and "choose another place with -o" in err
    assert not leftovers(tmp_path)


def test_options_that_do_not_apply(conv, bundle, capsys):
    folder = bundle()
    for argv, sentence in (
            ([conv, "--capacity", "64"], "--capacity is for the decoder of a bundle"),
            ([folder, "--shapes", "input_ids:1x1"], "--shapes is for other models"),
            ([folder, "--capacity", "512"], "--capacity 512: the cache must have 1 to 256 slots"),
            ([folder, "--capacity", "many"], "give numbers with commas between, as in 1024,4096"),
            ([folder, "--rows", "0"], "--rows is 0, which should be at least 1"),
            ([folder, "--workspace-mb", "-5"], "--workspace-mb is -5, which should be at least 1"),
            ([conv, "--timing-cache", "t"], "--timing-cache is for --backend trt"),
            ([conv, "--hardware-compatibility", "ampere_plus"], "--hardware-compatibility is for --backend trt"),
            ([], "give a bundle or an ONNX model")):
        assert sentence in fails(capsys, *argv)
    assert not leftovers(folder)


def test_too_little_memory_is_refused_before_the_build(conv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trt, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(trt, "build", lambda *a: pytest.fail("built"))
    assert "building it will take about" in fails(capsys, conv, "--shapes", "image:1x3x16x16")
    assert not leftovers(tmp_path)


def test_ctrl_c_while_building_leaves_nothing(bundle, capsys):
    folder = bundle("fp32", None)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code = ("import sys, export.tensorrt.build as b; from export import trt; original = b._interruptible\n"
            "def enter(tensorrt): print('building', flush=True); return original(tensorrt)\n"
            "b._interruptible = enter; raise SystemExit(trt.main(sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=Path(__file__).parents[2])
    assert process.stdout.readline() == "building\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle, capsys, monkeypatch):
    folder = bundle()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    original = Path.write_bytes

    def full(self, data):
        if ".engine.gz" in self.name:
            original(self, data[:10])
            raise OSError(28, os.strerror(28))
        return original(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "could not be written (No space left on device)" in fails(capsys, folder, "--sm", "89", "--capacity", "64")
    monkeypatch.undo()
    opened = open_bundle(folder, verify=True)
    assert opened.manifest["engines"] == [] and not [n for n in leftovers(folder) if not n.endswith(".json")]
    assert {p: d for p, d in before.items() if p.name != "manifest.json"}.items() <= {
        p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.items()


def parsed(network):
    log = tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR)
    builder = tensorrt.Builder(log)
    result = builder.create_network(0)
    parser = tensorrt.OnnxParser(result, log)
    assert parser.parse(network.SerializeToString())
    return builder, parser, result


SHAPES = {"image": (1, 3, 16, 16)}


def test_the_network_is_held_against_the_model():
    """Each kind of difference, made by comparing a network with a model that is not its own."""
    def half(m):
        m.graph.node[-1].output[0] = "before"
        m.graph.node.append(node("Cast", ["before"], ["scores"], to=T.FLOAT16))
        m.graph.output[0].type.tensor_type.elem_type = T.FLOAT16
    network = convolution(dynamic=True)
    keep = parsed(network)
    assert trt_build.check_network(network, keep[2], Path("m.onnx"), SHAPES) == {}
    for change, sentence in (
            (lambda m: setattr(m.graph.input[0], "name", "picture"), "the inputs are ['image'], not ['picture']"),
            (half, "the output scores from cast (Cast) is FLOAT, not HALF"),
            (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 4), "the input image is (-1, 3, 16, 16), not ('batch', 4, 16, 16)"),
            (lambda m: setattr(m.graph.node[0], "op_type", "Attention"), "0 of 1 Attention became ATTENTION_INPUT layers")):
        other = onnx.ModelProto()
        other.CopyFrom(network)
        change(other)
        with pytest.raises(CheckFailed, match="the parsed network is not the model") as failure:
            trt_build.check_network(other, keep[2], Path("m.onnx"), SHAPES)
        assert sentence in str(failure.value)


@pytest.mark.real
def test_smollm2_int4_for_three_targets(smollm2_int4, tmp_path):
    """One engine for SM86, 89 and 120 from the real model: with one profile at most 1.3 times the bundle's weights."""
    assert export_onnx.main([str(smollm2_int4), "-o", str(tmp_path / "b"), "--dtype", "fp16"]) == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # In a process of its own, whose peak memory is the build's.
    subprocess.run([sys.executable, "-m", "export.trt", str(tmp_path / "b"), "--one-profile"], check=True, cwd=Path(trt.__file__).parent.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    opened = open_bundle(tmp_path / "b", verify=True)
    (engine,) = opened.manifest["engines"]
    record = json.loads(opened.path(engine["record"]).read_text())
    assert engine["compute_capabilities"] == ["86", "89", "120"]
    assert record["native_layers"] == {"RotaryEmbedding": 60, "TensorScatter": 60, "Attention": 30}
    assert opened.path(engine["file"]).stat().st_size < opened.weights_bytes           # gzipped
    assert engine["bytes"] < 1.3 * opened.weights_bytes
    assert record["peak_rss_mb"] * 2**20 < trt_build.predicted_bytes(onnx.load(str(opened.path("portable.onnx")), load_external_data=False), opened.folder)
    assert taken < 30                      # CPU seconds, imports to gzip
