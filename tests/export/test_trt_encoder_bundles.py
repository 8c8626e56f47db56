"""`python -m export.trt` of an encoder's bundle, with real builds."""

import gzip
import json
import shutil

import pytest

tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")

from encoder_fixtures import tiny                                   # noqa: E402
from export import onnx as export_onnx                              # noqa: E402
from export import trt                                              # noqa: E402
from runtime import Encoder, UserError                              # noqa: E402
from runtime.encoder_bundle import open_encoder                     # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    assert export_onnx.main([str(tiny(root / "model", "token-classification")), "-o", str(root / "bundle")]) == 0
    return root / "bundle"


@pytest.fixture
def folder(exported, tmp_path):
    """A bundle of token-classification, of 64 tokens."""
    return shutil.copytree(exported, tmp_path / "bundle")


def test_an_encoders_bundle_gains_an_engine(folder, capsys):
    before = open_encoder(folder).manifest
    for _ in range(2):                                   # the second takes the first's place
        assert trt.main([str(folder), "--sm", "86,89", "--rows", "5"]) == 0
    bundle = open_encoder(folder, verify=True)
    (engine,) = bundle.manifest["engines"]
    assert (engine["file"], engine["backend"], engine["version"]) == ("engines/rtx-sm86-89.engine.gz", "rtx", tensorrt.__version__)
    assert (engine["compute_capabilities"], engine["rows"], engine["tokens"]) == (["86", "89"], 5, 64)
    assert len(gzip.decompress(bundle.path(engine["file"]).read_bytes())) == engine["bytes"]
    record = json.loads(bundle.path(engine["record"]).read_text())
    assert record["profiles"] == [{"name": "shapes", "shapes": dict.fromkeys(
        ["input_ids", "attention_mask", "token_type_ids"], [[1, 1], [1, 64], [5, 64]])}]
    assert record["source"]["model.onnx"] == before["files"]["model.onnx"]["sha256"]
    assert bundle.manifest["on_device"] == "python -m export.trt . --backend trt --rows 5"
    assert bundle.manifest | {"engines": [], "files": before["files"], "on_device": None} == before | {"on_device": None}
    with Encoder(folder, provider="cpu") as encoder:
        assert len(encoder.entities(["a b"])) == 1
    assert trt.main([str(folder), "--capacity", "64"]) == 2 and "--capacity is for the decoder of a bundle" in capsys.readouterr().err


def test_shapes_and_places_of_ones_own(folder, tmp_path):
    shapes = [f"{name}:1x1,1x8,2x16" for name in ("input_ids", "attention_mask", "token_type_ids")]
    assert trt.main([str(folder), "--sm", "89", "--shapes", *shapes, "-o", str(tmp_path / "a.engine")]) == 0
    assert trt.main([str(folder), "--sm", "89", "--rows", "2", "-o", str(tmp_path / "b.engine")]) == 0
    found = [json.loads((tmp_path / f"{name}.engine.json").read_text())["profiles"][0]["shapes"]["input_ids"][2] for name in "ab"]
    assert found == [[2, 16], [2, 64]] and not open_encoder(folder).manifest["engines"]


def test_a_build_that_fails_leaves_the_bundle_as_it_was(folder, monkeypatch):
    def fails(*_):
        raise UserError("no")
    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before = files()
    monkeypatch.setattr(trt, "build", fails)
    assert trt.main([str(folder), "--sm", "89"]) == 2
    assert files() == before
