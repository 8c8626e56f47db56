"""The trail that is shipped with a model."""

import json

from compress.quantize import main as quantize
from export.onnx import main as export
from models.formats import lineage


def test_no_path_of_this_machine_is_shipped(tiny_checkpoint, tmp_path, monkeypatch):
    """As absolute paths, as paths from here, and under ~."""
    source, text = tiny_checkpoint("smollm2"), tmp_path / "somewhere" / "text.txt"
    text.parent.mkdir()
    text.write_text("Words and more words. " * 200)
    monkeypatch.chdir(text.parent)
    assert quantize([str(source), "-o", "../codes", "--data", str(text), "--cache", "../cache", "--length", "64",
                     "--sensitivity", "~/kept.safetensors"]) == 0
    assert export([str(tmp_path / "codes"), "-o", str(tmp_path / "bundle")]) == 0
    shipped = (tmp_path / "bundle/manifest.json").read_text()
    assert str(tmp_path) not in shipped and "~" not in shipped and "../" not in shipped and str(source.parent) not in shipped
    options = json.loads(shipped)["lineage"][-2]["options"]
    assert options["checkpoint"] == source.name and options["data"] == ["text.txt"] and options["out"] == "codes"


def test_inputs_of_one_name_are_all_kept(tmp_path):
    stage = lineage.stage("train", {"data": ("/a/text.txt", "owner/name", "hf:NAME@train")}, {"/a/text.txt": "1", "/b/text.txt": "2"})
    assert stage["inputs"] == {"text.txt": "1", "text.txt (2)": "2"}
    assert stage["options"] == {"data": ["text.txt", "owner/name", "hf:NAME@train"]}
