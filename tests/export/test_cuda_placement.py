"""cuda.onnx in ONNX Runtime's own CUDA provider, over a CUDA runtime that computes nothing (fake_cuda.c): every node is on the device, a
step is recorded, and its repetition is one call. The numbers are tested elsewhere; no GPU has run it.

onnxruntime-gpu cannot be installed beside onnxruntime, so these tests look for its wheel, unzipped, in build/test-cache.
"""

import shutil
from pathlib import Path

import fake_cuda
import numpy as np
import onnx
import pytest
from anatomies import MODELS, any_shape, coded    # noqa: F401
from checkpoints import everywhere, small_config, write_random
from test_cuda_graph import FORMATS, WITHOUT, bundle_of
from tiny import EVERY_FAMILY

from export import bundle as bundles

UNPACKED = Path(__file__).parents[2] / "build" / "test-cache" / "onnxruntime-gpu"


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    """provider(folders of bundles, rows) -> what ONNX Runtime's CUDA provider did for each."""
    if not (UNPACKED / fake_cuda.PROVIDER).is_file():
        pytest.skip(f"no {UNPACKED}: `pip download --no-deps onnxruntime-gpu==1.31.1`, and unzip it there")
    if missing := [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)}: not on this machine")
    libraries = fake_cuda.build(tmp_path_factory.mktemp("cuda"), UNPACKED)
    return lambda bundles, rows=1, how="session": fake_cuda.steps(bundles, libraries, UNPACKED, rows, how)


def check(found: dict, layers: int) -> None:
    """The prompt is run, the first step recorded with nothing in it that cannot be repeated, and every later one is a replay."""
    assert "error" not in found, found["error"]
    assert found["prompt"]["launch"] > 5 * layers and not any("host" in name or "recording" in name for name in found["prompt"])
    first, *later = found["steps"]
    assert first["recording"] == 1 and first["recorded launch"] > 5 * layers
    assert not {"recorded allocation", "recorded synchronization"} & set(first)
    assert not any("host" in name or name.endswith("copy") for name in first)
    assert all(step == {"replay": 1, "synchronization": 1} for step in later)


@pytest.mark.parametrize("rows", [1, 3])
def test_families(provider, tiny_checkpoint, tmp_path, rows):
    families = [family for family in EVERY_FAMILY if family not in WITHOUT]
    folders = [bundle_of(tiny_checkpoint(family), tmp_path / family).folder for family in families]
    for found in provider(folders, rows):
        check(found, 2)


@pytest.mark.usefixtures("any_shape")
def test_ways_to_attend(provider, tmp_path):
    models = [config for name, config in MODELS.items() if not config.recurrent and "experts" not in name
              and all(layer.cache_source is None for layer in config.layers)]
    folders = [bundle_of(write_random(tmp_path / f"c{i}", config, coded), tmp_path / f"b{i}").folder for i, config in enumerate(models)]
    for found in provider(folders):
        check(found, 2)


def test_weight_formats_and_their_kernels(provider, tmp_path):
    """A step's products are those of one row, of 4 and 8 bits: nothing is dequantized."""
    config = small_config(layers=((4, 2, 192), (8, 1, 320)), vocab_size=390)
    folders = [bundle_of(write_random(tmp_path / f"c{i}", config, formats), tmp_path / f"b{i}").folder
               for i, formats in enumerate(FORMATS.values())]
    for name, found in zip(FORMATS, provider(folders), strict=True):
        check(found, 2)
        kernels = {kernel: calls for kernel, calls in found["steps"][0].items() if kernel.startswith("recorded kernel")}
        counts = [sum(calls for kernel, calls in kernels.items() if part in kernel)
                  for part in ("MatMulFloat4BitsKernelM1", "MatMulFloat8bKernelM1")]
        tied = 0 if name == "table dense" else 1
        fours = 8 * name.startswith(("int4", "table")) + tied * ("table int4" in name)
        assert counts == [fours, 8 + tied - fours if name != "table dense" else 0], (name, kernels)
        assert not any("Dequantize" in kernel for kernel in kernels)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_runtimes_backend(provider, tiny_checkpoint, tmp_path, rows):
    """A step of runtime/cuda_backend.py, once recorded: its tokens go up, the recording is replayed, the choices come down."""
    folders = [bundle_of(tiny_checkpoint(family), tmp_path / family).folder for family in ("smollm2", "gpt2", "ministral3")]
    for found in provider(folders, rows, "backend"):
        assert "error" not in found, found["error"]
        assert found["how"] == "no GPU, the step recorded"
        replayed = {"copy host to device": 1, "replay": 1, "copy device to host": 1, "synchronization": 1}
        assert found["steps"][-1] == found["after"][0] == found["after"][-1] == replayed
        assert "replay" not in found["prompt"] and found["prompt"]["copy device to host"] == 1


def test_a_graph_that_cannot_be_recorded_is_refused(provider, tmp_path):
    """The double can fail: a longest length that is computed in the graph, as the fast one does, is computed on the host."""
    bundle = bundle_of(write_random(tmp_path / "c", small_config(), everywhere(4, 32)), tmp_path / "b")
    model = onnx.load(bundle.path("cuda.onnx"), load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["longest" if name == "total_sequence_length" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int32), "one"))
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["last", "one"], ["longest"]))
    model.graph.node.insert(0, onnx.helper.make_node("ReduceMax", ["seqlens_k"], ["last"], keepdims=0))
    bundles.add_file(bundle.folder, bundle.manifest, "cuda.onnx", model.SerializeToString())
    found, = provider([bundle.folder])
    assert "cannot use the graph capture feature" in found["error"]
