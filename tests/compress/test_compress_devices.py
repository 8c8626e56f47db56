"""Quantizing and pruning on a device write what they write on the CPU, run by their commands: on the GPU where there is one, else on
tests/far.py's. Kernels for other shapes round otherwise, so a code here and there may differ of calibrated methods."""

import pytest
import torch

import compress.prune
import compress.quantize
from compress.layerwise import ROWS, Walk
from compress.quantizing import calibrated
from models.checkpoint import Checkpoint, open_checkpoint
from models.network.mixers.mlp import MLP

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。 def add(a, b): return a + b\n" * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def both(text, tmp_path, request, monkeypatch):
    """both(command, source, *options) -> the checkpoints written on the CPU and on the device."""
    # in bfloat16 or TF32, products of other shapes differ by much
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)

    def run(command, source, *options) -> tuple[Checkpoint, Checkpoint]:
        arguments = [str(source), "--data", str(text), "--cache", str(tmp_path / "cache"), "--windows", "6", "--length", "32", *map(str, options)]
        assert command.main([*arguments, "-o", str(tmp_path / "near"), "--device", "cpu"]) == 0
        device = request.getfixturevalue("device")
        monkeypatch.setattr("models.device.find_device", lambda asked: device)
        monkeypatch.setattr("compress.layerwise.TOKENS", ROWS * 32)                # sums in the same order
        assert command.main([*arguments, "-o", str(tmp_path / "far"), "--device", "cuda"]) == 0
        return open_checkpoint(tmp_path / "near"), open_checkpoint(tmp_path / "far")
    return run


def alike(near: Checkpoint, far: Checkpoint, share: float = 1.0) -> None:
    """All tensors are equal; where a share is given, so much of all codes, and other tensors nearly: what one code that falls the
    other way, in a tie, does to those behind it."""
    assert near.names() == far.names() and near.config == far.config
    same = []
    for name in near.names():
        one, other = near.read(name), far.read(name)
        if share == 1:
            assert torch.equal(one, other), name
        elif name.endswith(".codes"):
            module = name.removesuffix(".codes")
            same.append((near.quantized(module).codes == far.quantized(module).codes).flatten())
        else:
            one, other = (x.float().abs() if name.endswith(".scales") else x.float() for x in (one, other))     # either sign, of a near tie
            assert (one - other).norm() <= 2 * (1 - share) * one.norm(), name
    assert not same or torch.cat(same).float().mean() >= share


@pytest.mark.parametrize("options", (
    ["--bits", 3, "--no-symmetric", "--embedding-bits", 4], ["--bits", 8, "--group", 0, "--activations", 8],
    ["--bits", 8, "--group", 0, "--kind", "e4m3", "--backend", "onnx"]), ids=str)
def test_rounding_gives_the_same_codes(options, both, tiny_checkpoint):
    alike(*both(compress.quantize, tiny_checkpoint("smollm2"), *options))


@pytest.mark.parametrize("family, options", [
    *((family, ["--method", "gptq", "--bits", 5, "--embedding-bits", 0]) for family in ("gpt2", "olmoe", "qwen3_5")),
    ("gemma4", ["--method", "clip", "--bits", 4]),
    ("smollm2", ["--method", "gptq", "--no-symmetric", "--bits", 3, "--embedding-bits", 4, "--sensitivity-windows", 2]),
    ("llama", ["--method", "clip", "--fold", "awq", "--kv-cache", "channel", "--backend", "pytorch"]),
    ("smollm2", ["--method", "gptq", "--bits", 8, "--group", 0, "--embedding-bits", 0, "--fold", "smooth", "values", "--activations", 8,
                 "--activation-scales", "static", "--kv-cache", "tensor", "--backend", "pytorch"]),
], ids=str)
def test_calibration_gives_the_same_codes(family, options, both, tiny_checkpoint, monkeypatch):
    # Of 192 tokens the correction for earlier errors hangs on their last bits: noise of 1e-6 in the weights changes a quarter of the codes
    # on one device too, and one code in a hundred without. It is computed all the same, and added with no weight.
    monkeypatch.setattr(calibrated, "CORRECTION", 0.0)
    alike(*both(compress.quantize, tiny_checkpoint(family), *options), share=0.9)


@pytest.mark.parametrize("family, options", [
    ("smollm2", ["depth", "--layers", 1, "--order", "influence"]),
    ("smollm2", ["depth", "--layers", 1, "--order", "greedy"]),
    *((family, ["mlp", "--keep", 0.9, "--step", 16]) for family in ("smollm2", "gpt2")),
    ("qwen3", ["heads", "--groups", 1]),
    ("llama", ["hidden", "--hidden", 32]),
    ("smollm2", ["vocabulary", "--tokens", 300]),
    ("smollm2", ["sparse", "--score", "wanda"]),
    *((family, ["sparse", "--score", "sparsegpt"]) for family in ("olmoe", "qwen3_5")),
    ("smollm2", ["sparse", "--sparsity", "2:4", "--score", "magnitude"]),
    ("llama", ["sparse", "--ratios", "sensitivity", "--sparsity", 0.4]),
], ids=str)
def test_pruning_gives_the_same_model(family, options, both, tiny_checkpoint):
    alike(*both(compress.prune, tiny_checkpoint(family), "--what", *options), share=0.99)


def test_a_device_lost_in_the_middle(tiny_checkpoint, text, tmp_path, monkeypatch, capsys):
    """One sentence; the same command goes on where it stopped, to the same bytes."""
    def run(out: str) -> int:
        return compress.quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path / out), "--data", str(text), "--windows", "4",
                                       "--length", "32", "--method", "clip", "--cache", str(tmp_path / "cache")])
    assert run("whole") == 0
    layer, done = calibrated._layer, []

    def lost(walk, loaded, number, *rest):
        done.append(number)
        if done == [0, 1]:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return layer(walk, loaded, number, *rest)
    monkeypatch.setattr(calibrated, "_layer", lost)
    assert run("resumed") != 0
    told = capsys.readouterr().err
    assert "run the same command again" in told.splitlines()[-1] and "Traceback" not in told
    assert run("resumed") == 0 and done == [0, 1, 1]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "resumed/model.safetensors").read_bytes()


def test_fewer_windows_at_once_where_memory_is_short(tiny_checkpoint, device, monkeypatch):
    """They are tried before anything is done, and what comes out is what fewer would have given."""
    forward, most = MLP.forward, []

    def short(mlp, x, *rest):
        most.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(mlp, x, *rest)
    monkeypatch.setattr(MLP, "forward", short)
    checkpoint, ids = open_checkpoint(tiny_checkpoint("smollm2")).on(device), torch.arange(8 * 16).view(8, 16)
    walk, few = Walk(checkpoint, ids), Walk(checkpoint, ids, rows=2)
    assert walk.rows == 2 and most[:3] == [8, 4, 2]
    for one in (walk, few):
        for _, layer in one.layers("test"):
            one.step(layer)
    assert torch.equal(walk.x.home.cpu(), few.x.home.cpu())
