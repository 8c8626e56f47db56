"""Writing bundles: what is stored, what interruption leaves, and every bad input in one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import everywhere, small_config, write_random
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from export import bundle as bundles
from export import onnx as export_onnx
from export import ort
from models.checkpoint import open_checkpoint
from models.network.rope import frequencies
from runtime.bundle import open_bundle


def export(checkpoint, out, *options) -> int:
    return export_onnx.main([str(checkpoint), "-o", str(out), *map(str, options)])


def unpacked(packed: np.ndarray, shape) -> np.ndarray:
    """Signed int4, two a byte, by the definition: the low half first, two's complement."""
    nibbles = [half for byte in packed.tolist() for half in (byte & 15, byte >> 4)][:int(np.prod(shape))]
    return np.array([n - 16 if n > 7 else n for n in nibbles], np.int8).reshape(shape)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_written_value_for_value(symmetric, tmp_path):
    checkpoint = write_random(tmp_path / "c", small_config(), everywhere(4, 32, symmetric))
    assert export(checkpoint, tmp_path / "b") == 0
    source, bundle = open_checkpoint(checkpoint), open_bundle(tmp_path / "b", verify=True)
    parts = [source.quantized(f"model.layers.1.self_attn.{name}_proj") for name in "qkv"]
    codes = torch.cat([part.codes for part in parts]).T.numpy().astype(int) - 8
    assert np.array_equal(unpacked(bundle.tensor("layers.1.qkv.codes"), codes.shape), codes)
    assert np.array_equal(bundle.tensor("layers.1.qkv.scales"), torch.cat([part.scales for part in parts]).T.numpy())
    if not symmetric:
        zeros = torch.cat([part.zeros for part in parts]).T.numpy().astype(int) - 8
        assert np.array_equal(unpacked(bundle.tensor("layers.1.qkv.zeros"), zeros.shape), zeros)
    table = source.quantized("model.embed_tokens")
    assert np.array_equal(bundle.tensor("embed.codes"), table.codes.numpy().astype(int) - 128)
    assert np.array_equal(bundle.tensor("embed.scales"), table.scales[:, 0].numpy())
    assert all(tensor["offset"] % 64 == 0 for tensor in bundle.manifest["weights"]["tensors"])


def test_dense_weights_and_rope_tables(tiny_checkpoint, tmp_path):
    """What is not quantized is the checkpoint's, linears transposed; the RoPE tables are the Decoder's, Llama-3 scaled."""
    assert export(tiny_checkpoint("llama"), tmp_path / "b", "--max-context", 100) == 0
    source, bundle = open_checkpoint(tiny_checkpoint("llama")), open_bundle(tmp_path / "b")
    gate_up = [source.read(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up")]
    assert np.array_equal(bundle.tensor("layers.0.gate_up.weight"), torch.cat(gate_up).T.numpy())
    assert np.array_equal(bundle.tensor("head.weight"), source.read("lm_head.weight").T.numpy())
    angles = np.arange(100)[:, None] * frequencies(source.config.rope(source.config.layers[0]), 16, 100).numpy().astype(np.float64)
    assert np.abs(bundle.tensor("rope.cos") - np.cos(angles)).max() < 1e-5
    assert bundle.max_context == 100 and bundle.tensor("rope.sin").shape == (100, 8)


def test_manifest_tells_what_the_model_is(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "c")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "pad_token_id": -1, "temperature": 0.7}))
    assert export(checkpoint, tmp_path / "b") == 0 and ort.main([str(tmp_path / "b")]) == 0
    manifest = open_bundle(tmp_path / "b", verify=True).manifest
    assert manifest["model"]["eos_token_ids"] == [0, 2] and manifest["model"]["generation"]["temperature"] == 0.7
    assert manifest["model"]["config"] == open_checkpoint(checkpoint).config.to_dict()
    assert [stage["stage"] for stage in manifest["lineage"]] == ["export.onnx", "export.ort"]
    assert {graph["source_checkpoint"] for graph in manifest["graphs"]} == {open_checkpoint(checkpoint).sha256()}
    assert manifest["chat_template"] == "chat_template.jinja"
    assert set(manifest["files"]) == set(os.listdir(tmp_path / "b")) - {"manifest.json"}


@pytest.mark.parametrize("generation, field", [
    ({"eos_token_id": "2"}, "eos_token_id is '2'"), ({"eos_token_id": [2, [0]]}, "eos_token_id"), ({"eos_token_id": [2, "x"]}, "eos_token_id"),
    ({"eos_token_id": -1}, "eos_token_id is -1"), ({"eos_token_id": [384]}, "from 0 to 383"), ({"eos_token_id": 2.0}, "eos_token_id"),
    ({"eos_token_id": True}, "eos_token_id is True"), ({"eos_token_id": {"id": 2}}, "eos_token_id"), ({"eos_token_id": [None]}, "eos_token_id"),
    ({"bos_token_id": "1"}, "bos_token_id is '1'"), ({"bos_token_id": [1]}, "bos_token_id"), ({"pad_token_id": 10**90}, "pad_token_id"),
    ({"pad_token_id": -2}, "pad_token_id is -2"), ({"bos_token_id": 1.5}, "bos_token_id is 1.5"), ({"pad_token_id": False}, "pad_token_id"),
    ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"), ({"do_sample": True, "top_p": [0.9]}, "top_p"),
    ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5"), ({"repetition_penalty": -1}, "repetition_penalty is -1"),
    ({"do_sample": 1}, "do_sample is 1"), ({"do_sample": True, "min_p": True}, "min_p is True")])
def test_a_generation_config_that_no_engine_opens_is_refused(tiny_checkpoint, tmp_path, capsys, generation, field):
    checkpoint = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "c")
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    assert export(checkpoint, tmp_path / "b") == 2 and not (tmp_path / "b").exists()
    error = capsys.readouterr().err.splitlines()[-1]          # after the progress of what made the checkpoint
    assert error.startswith("error: ") and "generation_config.json: " in error and field in error


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_odd_ids_in_the_configuration_are_refused(tiny_checkpoint, tmp_path, capsys, key):
    checkpoint = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "c")
    config = json.loads((checkpoint / "config.json").read_text())
    for value in (-2, 384, 10**90, 1.5, True, "2", [[2]], {}):
        (checkpoint / "config.json").write_text(json.dumps(config | {key: value}))
        assert export(checkpoint, tmp_path / "b") == 2 and not (tmp_path / "b").exists()
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"{key} is " in error and "token id" in error
    (checkpoint / "generation_config.json").unlink()          # which has it too
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    assert export(checkpoint, tmp_path / "b") == 0
    manifest = open_bundle(tmp_path / "b").manifest["model"]
    assert manifest.get(key) is None and (key != "eos_token_id" or manifest["eos_token_ids"] == [])


def test_the_bundles_tokenizer_is_smaller_and_the_same(tiny_checkpoint, tmp_path):
    """Its merges are strings, as long as every one can be said so; the library reads both files as one tokenizer."""
    checkpoint = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "c")
    assert export(checkpoint, tmp_path / "b") == 0
    ours, source = tmp_path / "b" / "tokenizer.json", checkpoint / "tokenizer.json"
    assert Tokenizer.from_file(str(ours)).to_str() == Tokenizer.from_file(str(source)).to_str()
    assert os.path.getsize(ours) < 0.6 * os.path.getsize(source)
    for tokens in (["a", " ", "a "], ["#version", "x", "#versionx"]):                # which strings cannot say
        data = json.loads(source.read_text("utf-8"))
        data["model"].update(vocab={token: i for i, token in enumerate(tokens)}, merges=[tokens[:2]])
        assert bundles.compact_tokenizer(data) == data


def test_widths_that_onnx_lacks_give_a_bundle_without_graphs(tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", small_config(), everywhere(3, 32))
    assert export(checkpoint, tmp_path / "b") == 0
    assert "ONNX has no weights of 3 bits" in capsys.readouterr().out
    bundle, source = open_bundle(tmp_path / "b", verify=True), open_checkpoint(checkpoint)
    assert bundle.manifest["graphs"] == []
    packed = torch.cat([source.read(f"model.layers.0.mlp.{name}_proj.codes") for name in ("gate", "up")])
    assert np.array_equal(bundle.tensor("layers.0.gate_up.codes"), packed.numpy().ravel())
    assert ort.main([str(tmp_path / "b")]) == 2
    assert "no portable graph" in capsys.readouterr().err


def test_an_interrupted_export_leaves_the_older_bundle(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    assert export(tiny_checkpoint("smollm2"), tmp_path / "b") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    written = bundles.WeightsWriter._write

    def full(self, data):
        if self.size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, data)

    monkeypatch.setattr(bundles.WeightsWriter, "_write", full)
    assert export(tiny_checkpoint("qwen2"), tmp_path / "b") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()} == before
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("at", range(4))
def test_a_bundle_opens_wherever_adding_a_graph_is_interrupted(at, tiny_checkpoint, tmp_path, monkeypatch):
    """Replacing a fast graph by another takes three renames; stop before each of them, and after all."""
    assert export(tiny_checkpoint("smollm2"), tmp_path / "b") == 0 and ort.main([str(tmp_path / "b")]) == 0
    renames, replace = [], os.replace

    def stop(*paths):
        if len(renames) == at:
            raise KeyboardInterrupt
        renames.append(paths)
        replace(*paths)

    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        try:
            bundles.add_file(tmp_path / "b", manifest, "fast.onnx", b"another graph")
            finished = True
        except KeyboardInterrupt:
            finished = False
    bundle = open_bundle(tmp_path / "b", verify=True)         # every file has the manifest's sha256
    assert finished == (at == 3)
    assert (bundle.graph("fast") is not None) == (at in (0, 3))
    assert not list((tmp_path / "b").glob(".fast.onnx*"))


def broken(checkpoint, change) -> str:
    """Copy a checkpoint and change its tensors."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return str(checkpoint)


@pytest.mark.parametrize("case", ["folder", "tokenizer", "broken tokenizer", "long context", "no context", "occupied", "nan", "too large",
                                  "generation"])
def test_bad_input(case, tiny_checkpoint, tmp_path, capsys):
    checkpoint, out, options = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "c"), tmp_path / "b", []
    name = "model.layers.1.mlp.down_proj.weight"
    if case == "folder":
        shutil.rmtree(checkpoint)
        sentence = "does not exist"
    elif case == "tokenizer":
        (checkpoint / "tokenizer.json").unlink()
        sentence = "has no tokenizer.json"
    elif case == "broken tokenizer":
        (checkpoint / "tokenizer.json").write_text('{"model": {"type": "BPE", "merges": [7]}}')
        sentence = "is no tokenizer that"
    elif case in ("long context", "no context"):
        options = ["--max-context", "257" if case == "long context" else "0"]
        sentence = "the model's context is 256 tokens"
    elif case == "occupied":
        out.mkdir()
        (out / "letter.txt").write_text("dear")
        sentence = "exists and is not a bundle"
    elif case == "nan":
        broken(checkpoint, lambda tensors: tensors[name].view(-1)[7].fill_(float("nan")))
        sentence = "layers.1.mlp.down_proj.weight holds values that are not finite"
    elif case == "too large":
        broken(checkpoint, lambda tensors: tensors[name].view(-1)[7].fill_(1e6))
        options, sentence = ["--dtype", "fp16"], "export with --dtype fp32"
    else:
        (checkpoint / "generation_config.json").write_text("{")
        sentence = "generation_config.json cannot be read as JSON"
    assert export(checkpoint, out, *options) == 2
    assert sentence in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob("*b*")] == (["b"] if case == "occupied" else [])
    assert ort.main([str(out)]) == 2


@pytest.mark.real
def test_the_real_model_is_exported_in_little_memory(smollm2, tmp_path):
    """Peak memory of the process, imports and mapped pages included: the largest tensor (113 MB) plus 300 MB."""
    code = ("import sys; from export import onnx; from runtime.machine import peak_rss_mb; "
            "assert onnx.main(sys.argv[1:]) == 0; print(peak_rss_mb())")
    run = subprocess.run([sys.executable, "-c", code, str(smollm2), "-o", str(tmp_path / "b")], check=True,
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak_mb = float(run.stdout.splitlines()[-1]) * 2**20 / 1e6
    assert peak_mb < 49152 * 576 * 4 / 1e6 + 300
    assert open_bundle(tmp_path / "b").weights_bytes > 530e6
