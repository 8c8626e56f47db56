"""Quantization-aware distillation: gradients against autograd, codes kept, the student nearer to its teacher."""

import json
import os
import signal

import pytest
import torch
from tokenizers import Tokenizer

import compress.recover
from compress.quantize import main as quantize
from compress.recover import CodedLinear, main, student_of
from compress.quantizing.rtn import round_to_nearest
from models.formats.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。 def add(a, b): return a + b\n" * 60


@pytest.fixture(scope="module")
def world(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recover")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    source = tiny_checkpoint("smollm2")
    assert quantize([str(source), "-o", str(folder / "q"), "--bits", "4", "--group", "64"]) == 0
    return source, folder


def recover(world, out, *options, checkpoint=None, teacher=None):
    source, folder = world
    return main([str(checkpoint or folder / "q"), "--teacher", str(teacher or source), "-o", str(folder / out), "--data",
                 str(folder / "text.txt"), "--cache", str(folder / "cache"), "--teacher-cache", str(folder / "teacher"),
                 "--windows", "16", "--length", "48", *map(str, options)])


def divergence(path, reference):
    tokens = Tokenizer.from_file(str(reference / "tokenizer.json")).encode(TEXT).ids
    ids = torch.tensor(tokens[29:29 + 16 * 48]).view(16, 48)
    with torch.no_grad():
        p, q = (torch.log_softmax(load_decoder(folder)(ids), -1) for folder in (reference, path))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("form", [TensorFormat(3, 32), TensorFormat(4, 0), TensorFormat(4, 32, False)])
def test_gradients_of_scales_are_autograds(form):
    weight, x = torch.randn(6, 64), torch.randn(5, 64)
    tensor = round_to_nearest(weight, form)
    linear = CodedLinear(tensor, None)
    assert torch.allclose(linear(x), x @ tensor.dequantize().T, atol=1e-5)
    target = torch.randn(5, 6)
    ours, = torch.autograd.grad((linear(x) * target).sum(), linear.log_factor)
    factor = torch.zeros_like(linear.scales, requires_grad=True)
    steps = tensor.codes.float().view(linear.codes.shape) - linear.zeros[:, :, None]
    dense = (steps * (linear.scales * factor.exp())[:, :, None]).flatten(1)
    exact, = torch.autograd.grad(((x @ dense.T) * target).sum(), factor)
    assert torch.allclose(ours, exact, atol=1e-4, rtol=1e-4)


def test_latents_pass_gradients_straight_through_within_the_range():
    tensor = round_to_nearest(torch.randn(2, 32), TensorFormat(4, 32))
    linear = CodedLinear(tensor, None)
    linear.free_codes()
    linear.latent.data[0, 0, :2] = torch.tensor([-1.0, 17.0])                # beyond the codes on either side
    linear(torch.ones(1, 32)).sum().backward()
    expected = linear.scales[:, :, None].expand_as(linear.latent).clone()
    expected[0, 0, :2] = 0
    assert torch.allclose(linear.latent.grad, expected)
    assert linear.frozen().codes[0, :2].tolist() == [0, 15]


def test_an_untrained_student_is_the_checkpoint(world):
    source, folder = world
    decoder, coded = student_of(open_checkpoint(folder / "q"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(decoder(ids), load_decoder(folder / "q")(ids), atol=1e-5)
    for name, module in coded.items():
        again, stored = module.frozen(), open_checkpoint(folder / "q").quantized(name)
        assert torch.equal(again.codes, stored.codes) and torch.equal(again.scales, stored.scales)


def test_scales_alone_bring_the_student_nearer(world):
    source, folder = world
    assert recover(world, "scales", "--steps", 40, "--learning-rate", 2e-3) == 0
    assert divergence(folder / "scales", source) < 0.9 * divergence(folder / "q", source)
    before, after = open_checkpoint(folder / "q"), open_checkpoint(folder / "scales")
    assert after.quantization == before.quantization
    for name in before.names():
        same = torch.equal(before.read(name), after.read(name))
        assert same if name.endswith("codes") or "embed" in name else not same, name


def test_codes_change_only_when_asked(world):
    source, folder = world
    assert recover(world, "weights", "--steps", 2, "--weights", 20, "--code-rate", 0.05) == 0
    before, after = open_checkpoint(folder / "q"), open_checkpoint(folder / "weights")
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(before.quantized(name).codes, after.quantized(name).codes)
    assert int(after.quantized(name).codes.max()) <= 15


def test_the_same_seed_gives_the_same_checkpoint(world):
    _, folder = world
    for out in ("one", "two"):
        assert recover(world, out, "--steps", 3) == 0
    one, two = open_checkpoint(folder / "one"), open_checkpoint(folder / "two")
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())


def test_an_interrupted_run_ends_with_the_same_bytes(world, monkeypatch):
    _, folder = world
    options = ("--steps", 5, "--weights", 5, "--batch", 4)
    monkeypatch.setattr("compress.recover.SAVED", 2)
    assert recover(world, "whole", *options) == 0
    step, calls = compress.recover._step, []
    for stop in (4, 6):                                   # in the first phase, then in the second
        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return step(*arguments)
        monkeypatch.setattr("compress.recover._step", interrupted)
        assert recover(world, "parts", *options) == 130 and not (folder / "parts").exists()
        calls.clear()
    monkeypatch.setattr("compress.recover._step", lambda *arguments: calls.append(1) or step(*arguments))
    assert recover(world, "parts", *options) == 0
    assert len(calls) == 3                                # it went on, and did not start again
    assert (folder / "parts/model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()
    assert not list(folder.glob(".*.work"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_after_the_step_and_a_longer_run_goes_on(world, monkeypatch, number, code):
    _, folder = world
    step, calls = compress.recover._step, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(*arguments)
    monkeypatch.setattr("compress.recover._step", signalled)
    try:
        assert recover(world, f"signal{code}", "--steps", 5) == code
    except SystemExit as left:
        assert left.code == code
    assert not (folder / f"signal{code}").exists()
    assert recover(world, f"signal{code}", "--steps", 8) == 0
    assert len(calls) == 8 and not list(folder.glob(".*.work"))          # 3, then 5 more


def test_quantize_recovers_in_the_same_command(world, monkeypatch, capsys):
    """The same bytes as the two stages one by one, also where it was stopped between them; both stand in the lineage."""
    source, folder = world
    assert recover(world, "apart", "--steps", 4, "--learning-rate", 1e-3) == 0

    def both():
        return quantize([str(source), "-o", str(folder / "both"), "--bits", "4", "--group", "64", "--recover", "4",
                         "--recover-rate", "1e-3", "--data", str(folder / "text.txt"), "--cache", str(folder / "cache"),
                         "--teacher-cache", str(folder / "teacher"), "--length", "48"])

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.recover._step", stopped)
        assert both() == 130
    monkeypatch.setattr("compress.quantize.write_checkpoint", None)         # the codes are there, and not made again
    assert both() == 0
    assert (folder / "both/model.safetensors").read_bytes() == (folder / "apart/model.safetensors").read_bytes()
    stages = [stage["stage"] for stage in json.loads((folder / "both/lineage.json").read_text())["stages"]]
    assert stages[-2:] == ["compress.quantize", "compress.recover"]
    assert not list(folder.glob(".both.*"))
    assert quantize([str(source), "-o", str(folder / "none"), "--recover", "4"]) == 2
    assert "--data FILES to train on" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    (["--steps", 0], "--steps is 0"), (["--learning-rate", 0], "--learning-rate"), (["--top", 0], "--top is 0"),
    (["--length", 10**6], "less than one window")])
def test_bad_numbers(world, options, words, capsys):
    if words == "less than one window":
        (world[1] / "short.txt").write_text("few")
        options = ["--data", world[1] / "short.txt"]
    assert recover(world, "bad", *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (world[1] / "bad").exists()


def test_a_dense_student_is_refused(world, capsys):
    source, _ = world
    assert recover(world, "bad", checkpoint=source) == 2
    assert "is not quantized" in capsys.readouterr().err
