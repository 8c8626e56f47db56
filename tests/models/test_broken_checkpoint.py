"""Everything a checkpoint's folder can have wrong with it is refused in a sentence, before memory is taken for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import quantize
from models import checkpoint as module
from models.checkpoint import load_decoder, open_checkpoint
from runtime.errors import UserError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "checkpoint")


@pytest.fixture
def quantized(tiny_checkpoint, tmp_path) -> Path:
    assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / "quantized"), "--no-symmetric"]) == 0
    return tmp_path / "quantized"


# What is refused when reading

def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def only_pickle(name):
    def change(folder):
        (folder / "model.safetensors").rename(folder / name)
    return change


def shard_index(content):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return change


def cut(bytes_left):
    def change(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:bytes_left])
    return change


Q, TABLE = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "weights a FIFO": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "model.safetensors is not a file"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read as JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: holds list"),
    "architecture": (lambda f: edit_config(f, model_type="bert"),
                     "config.json: model_type 'bert' is not supported: supported are llama, mistral"),
    "other quantization": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "'awq'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "pickle": (only_pickle("pytorch_model.bin"), "pytorch_model.bin.*pickles can run code.*save it again"),
    "pt pickle": (only_pickle("weights.pt"), "weights.pt"),
    "empty weights": (cut(0), "model.safetensors is truncated or not a safetensors file"),
    "truncated header": (cut(100), "model.safetensors is truncated or not"),
    "truncated data": (cut(-4), "model.safetensors is truncated or not"),
    "a pickle inside": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000)), "truncated or not"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(Q)), f"lacks {Q}, which config.json asks for"),
    "many missing": (lambda f: edit_config(f, num_hidden_layers=3), "layers.2.*and 6 more tensors"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update({"a.weight": torch.zeros(1)})), "has a.weight, for which"),
    "wrong shape": (lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q][:-1]})),
                    rf"{Q} has shape \[63, 64\], where config.json asks for \[64, 64\]"),
    "wrong rank": (lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q].flatten()})), r"has shape \[4096\]"),
    "absurd vocabulary": (lambda f: edit_config(f, vocab_size=2_000_000_000), r"asks for \[2000000000, 64\]"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q].long()})), f"{Q} is of type I64"),
    "shard outside": (shard_index({"weight_map": {Q: "../part.safetensors"}}), "'../part.safetensors', which leaves"),
    "shard absolute": (shard_index({"weight_map": {Q: "/etc/passwd"}}), "'/etc/passwd', which leaves"),
    "shard missing": (shard_index({"weight_map": {Q: "other.safetensors"}}), "other.safetensors is missing"),
    "shard of a name too long": (shard_index({"weight_map": {Q: "x" * 5000}}), "xxx is missing, and model.safetensors.index"),
    "shard without": (shard_index({"weight_map": {"b.weight": "part.safetensors"}}), "lacks b.weight"),
    "shard with more": (shard_index({"weight_map": {Q: "part.safetensors"}}), "holds model.*index.json does not know of"),
    "another head in a tied model": (lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t[TABLE] + 1})),
                                     "holds lm_head.weight beside .*set tie_word_embeddings to false"),
    "another head of another size": (lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t[TABLE][1:].clone()})),
                                     "holds lm_head.weight beside"),
    "a tensor under two names": (lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": t["model.norm.weight"] * 2})),
                                 "holds model.norm.weight twice: as model.norm.weight and as norm.weight"),
    "no weight map": (shard_index({"metadata": {}}), "has no weight_map"),
    "weight map of numbers": (shard_index({"weight_map": {Q: 1}}), "has no weight_map"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(name, folder):
    change, words = BROKEN[name]
    change(folder)
    with pytest.raises(UserError, match=words) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="python -m models.get"):
        open_checkpoint(tmp_path / "model.gguf")


def test_gpt2_fused_tensor_of_the_wrong_shape(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    with pytest.raises(UserError, match=r"q_proj.weight has shape \[64, 191\]"):
        open_checkpoint(folder)


def edit_quantization(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


M = "model.layers.0.self_attn.q_proj"
FORMAT = {"bits": 4, "group": 32, "symmetric": False}
BROKEN_QUANTIZED = {
    "version": (lambda f: edit_quantization(f, version=0), "version 0 is not supported"),
    "stray module": (lambda f: edit_quantization(f, tensors={"model.norm": FORMAT}), "names model.norm"),
    "group": (lambda f: edit_quantization(f, tensors={M: FORMAT | {"group": 48}}), "48 does not divide the 64"),
    "not all described": (lambda f: edit_quantization(f, tensors={M: FORMAT}), "k_proj.weight"),
    "other bits": (lambda f: edit_config(f, quantization_config=described(f, M, bits=3)), r"codes has shape \[64, 32\]"),
    "codes missing": (lambda f: edit_tensors(f, lambda t: t.pop(f"{M}.codes")), f"lacks {M}.codes"),
    "zeros unasked": (lambda f: edit_config(f, quantization_config=described(f, M, symmetric=True)), f"has {M}.zeros"),
    "scales of float32": (lambda f: edit_tensors(f, lambda t: t.update({f"{M}.scales": t[f"{M}.scales"].float()})),
                          f"{M}.scales is of type F32, which should be F16"),
    "codes too short": (lambda f: edit_tensors(f, lambda t: t.update({f"{M}.codes": t[f"{M}.codes"][:, 1:].clone()})),
                        f"{M}.codes has shape"),
}


def described(folder, name, **changes):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["tensors"][name] |= changes
    return config


@pytest.mark.parametrize("name", BROKEN_QUANTIZED)
def test_a_broken_quantized_folder_is_refused(name, quantized):
    change, words = BROKEN_QUANTIZED[name]
    change(quantized)
    with pytest.raises(UserError, match=words):
        open_checkpoint(quantized)


@pytest.mark.parametrize("suffix, value, words", [
    ("scales", float("nan"), "not finite"), ("scales", float("inf"), "not finite"), ("zeros", 16, "holds 16, which 4 bits")])
def test_corrupt_scales_and_zeros_are_refused(suffix, value, words, quantized):
    edit_tensors(quantized, lambda t: t[f"{M}.{suffix}"].view(-1)[7:8].fill_(value))
    with pytest.raises(UserError, match=words):
        load_decoder(quantized)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value, folder):
    """PyTorch's fused attention hides a NaN: with one in k_proj the logits were finite."""
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(folder, lambda t: t[name].view(-1)[7:8].fill_(value))
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        load_decoder(folder)


def test_shapes_are_checked_before_anything_is_allocated(folder, monkeypatch):
    """An absurd configuration costs no memory: nothing is read before the shapes agree."""
    edit_config(folder, hidden_size=2**20, intermediate_size=2**22, head_dim=16)
    monkeypatch.setattr(module.Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match="has shape"):
        load_decoder(folder)
