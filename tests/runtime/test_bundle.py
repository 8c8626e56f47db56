"""Opening bundles: what is there, and every way in which it can be broken or hostile."""

import json
import os

import numpy as np
import pytest
from make_bundle import write_bundle, write_manifest

from runtime.bundle import changed_files, open_bundle
from runtime.errors import CheckFailed, UserError


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


def edit(folder, change):
    """Apply `change` to the manifest, keeping the sizes and hashes it has."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder, manifest)


def test_what_a_bundle_says(folder):
    bundle = open_bundle(folder, verify=True)
    assert (bundle.name, bundle.max_context, bundle.weights_bytes) == ("fake", 512, 256)
    assert bundle.graph("fast")["file"] == "fast.onnx" and bundle.graph("portable") is None
    assert bundle.path("weights.bin") == folder / "weights.bin"
    assert np.array_equal(bundle.tensor("a"), np.arange(32, dtype=np.float32).reshape(4, 8))
    packed = (folder / "weights.bin").read_bytes()
    assert bundle.tensor("b.codes").tobytes() == packed[128:136] and bundle.tensor("c.codes").tobytes() == packed[192:196]
    with pytest.raises(UserError, match="no tensor 'd'"):
        bundle.tensor("d")
    with pytest.raises(ValueError):
        bundle.tensor("a")[0] = 1                           # mapped read-only


def test_a_relative_folder_stays_where_it_was(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    bundle = open_bundle("bundle")
    monkeypatch.chdir("/")
    assert bundle.path("weights.bin").exists()


def test_no_bundle(tmp_path):
    with pytest.raises(UserError, match="nothing: no such folder"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(UserError, match="no manifest.json in it"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: no such folder"):
        open_bundle(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_no_manifest(folder, content):
    (folder / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="manifest.json"):
        open_bundle(folder)


@pytest.mark.parametrize("version", [0, 3, 99, "1", None, 1.5, True])
def test_another_version_is_refused_by_number(folder, version):
    edit(folder, lambda m: m.update(version=version))
    with pytest.raises(UserError, match=f"version {version!r}.*reads versions 1 and 2"):
        open_bundle(folder)


def test_another_format_is_refused(folder):
    edit(folder, lambda m: m.update(format="other"))
    with pytest.raises(UserError, match="no bundle of this project"):
        open_bundle(folder)


def remove(path):
    keys = path.split(".")

    def change(manifest):
        owner = manifest
        for key in keys[:-1]:
            owner = owner[int(key)] if isinstance(owner, list) else owner[key]
        del owner[keys[-1]]
    return change


@pytest.mark.parametrize("path", [
    "name", "model", "graphs", "weights", "tokenizer", "model.config", "model.max_context", "model.eos_token_ids",
    "model.config.vocab_size", "weights.file", "weights.bytes", "weights.tensors", "weights.tensors.0.offset",
    "weights.tensors.0.shape", "weights.tensors.0.dtype", "weights.tensors.0.name", "graphs.0.role", "graphs.0.file"])
def test_a_field_that_is_missing_is_named(folder, path):
    edit(folder, remove(path))
    with pytest.raises(UserError, match=f"{path.split('.')[-1]} should be .* not missing"):
        open_bundle(folder)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.update(files=[]), "files should be dict"),
    (lambda m: m["files"]["weights.bin"].update(bytes="256"), "files.weights.bin.bytes should be int, not '256'"),
    (lambda m: m["files"]["weights.bin"].update(bytes=True), "bytes should be int, not True"),
    (lambda m: m["files"]["weights.bin"].pop("sha256"), "sha256 should be str"),
    (lambda m: m["model"].update(eos_token_ids=[2, "x"]), r"eos_token_ids\[1\] should be int"),
    (lambda m: m["model"].update(bos_token_id="1"), "bos_token_id should be int or null"),
    (lambda m: m["model"].update(max_context=0), "max_context is 0"),
    (lambda m: m.update(graphs=["fast.onnx"]), r"graphs\[0\] should be dict"),
    (lambda m: m["graphs"][0].update(role="best"), "role is 'best'; known: portable, fast"),
    (lambda m: m["graphs"][0].update(file="other.onnx"), "'other.onnx', which is not among its files"),
    (lambda m: m.update(tokenizer="other.json"), "tokenizer is 'other.json', which is not among its files"),
    (lambda m: m.update(golden="golden.json"), "golden is 'golden.json', which is not among"),
    (lambda m: m["weights"].update(bytes=255), "weights.bytes and the size of weights.bin"),
    (lambda m: m["weights"]["tensors"][0].update(dtype="complex64"), "unknown dtype 'complex64'"),
    (lambda m: m["weights"]["tensors"][0].update(offset=200), "does not fit weights.bin"),
    (lambda m: m["weights"]["tensors"][0].update(offset=-4), "does not fit"),
    (lambda m: m["weights"]["tensors"][0].update(bytes=64), "does not fit"),
    (lambda m: m["weights"]["tensors"][0].update(shape=[-4, -8]), "does not fit"),
    (lambda m: m["weights"]["tensors"][0].update(shape=[4, 8.0]), r"shape\[1\] should be int"),
    (lambda m: m["weights"]["tensors"][0].update(shape=[2**62, 2**62], bytes=2**126), "does not fit")])
def test_fields_that_contradict(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        open_bundle(folder)


def test_a_pad_of_minus_one_is_none(folder):
    edit(folder, lambda m: m["model"].update(pad_token_id=-1))
    assert open_bundle(folder).model["pad_token_id"] is None


@pytest.mark.parametrize("name", ["weights.bin", "fast.onnx", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_or_shortened_file_is_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name}: {len(content) - 1} bytes, but the manifest says {len(content)}"):
        open_bundle(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: missing from the bundle"):
        open_bundle(folder)
    path.mkdir()
    with pytest.raises(UserError, match=f"{name}: is not a file"):
        open_bundle(folder)


def test_a_changed_byte_is_found_by_its_hash(folder):
    path = folder / "fast.onnx"
    path.write_bytes(b"nor a graph")
    open_bundle(folder)                                      # sizes alone do not show it
    assert changed_files(open_bundle(folder)) == ["fast.onnx"]
    with pytest.raises(CheckFailed, match="changed .*: fast.onnx$"):
        open_bundle(folder, verify=True)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", ".", "", "..\\secret", "C:\\secret",
                                  "C:secret", "bad\0name"])
def test_a_path_that_leaves_the_folder_is_refused(folder, name):
    (folder.parent / "secret").write_text("secret")

    def change(manifest):
        manifest["files"][name] = {"bytes": 6, "sha256": ""}
        manifest["tokenizer"] = name
    edit(folder, change)
    with pytest.raises(UserError, match="leaves the bundle's folder|is not a file"):
        open_bundle(folder)


def test_a_symlink_may_not_lead_out(folder):
    (folder.parent / "secret").write_text("secret")
    (folder / "tokenizer.json").rename(folder / "real.json")
    (folder / "tokenizer.json").symlink_to("real.json")
    open_bundle(folder)                                      # inside the folder: fine
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(UserError, match="leaves the bundle's folder"):
        open_bundle(folder)
    os.symlink(folder.parent, folder / "up")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("real.json")
    edit(folder, lambda m: m["files"].update({"up/secret": {"bytes": 6, "sha256": ""}}))
    with pytest.raises(UserError, match="leaves the bundle's folder"):
        open_bundle(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json: missing from the bundle"):
        open_bundle(folder)


def test_the_bundle_itself_may_be_a_symlink(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert open_bundle(tmp_path / "link", verify=True).name == "fake"


@pytest.mark.parametrize("key", ["chat_template", "golden"])
def test_what_a_bundle_need_not_have_may_be_left_out(folder, key):
    edit(folder, lambda m: m.pop(key) and None)
    assert open_bundle(folder).manifest[key] is None
