"""Quantization-aware distillation: gradients against autograd, codes kept, the student nearer to its teacher."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from compress.quantize import main as quantize
from compress.recover import CodedLinear, _tensors, main, student_of
from compress.quantizing.rtn import round_to_nearest
from models.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat
from models.training.trainer import Trainer

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
                 "--windows", "16", "--length", "48", "--eval-rows", "4", *map(str, options)])


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


@pytest.mark.parametrize("family", ("smollm2", "gemma4", "qwen3_5", "granite4_tiny"))
def test_an_untrained_student_is_the_checkpoint(family, tiny_checkpoint, tmp_path):
    """And what is saved of it are the same codes, scales and all else."""
    assert quantize([str(tiny_checkpoint(family)), "-o", str(tmp_path / "q"), "--bits", "4", "--group", "32"]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    decoder, ids = student_of(checkpoint), torch.arange(40)[None]
    torch.testing.assert_close(decoder(ids), load_decoder(tmp_path / "q")(ids), atol=1e-4, rtol=1e-4)
    saved = dict(_tensors(checkpoint, decoder))
    assert set(saved) == set(checkpoint.names()) and all(torch.equal(saved[name], checkpoint.read(name)) for name in saved)
    coded = {name for name, module in decoder.named_modules() if isinstance(module, CodedLinear)}
    assert coded == {name for name in checkpoint.quantization.tensors if name.startswith("model.layers.")}


def test_scales_alone_bring_the_student_nearer(world):
    source, folder = world
    assert recover(world, "scales", "--steps", 40, "--learning-rate", 2e-3) == 0
    assert divergence(folder / "scales/last", source) < 0.9 * divergence(folder / "q", source)
    before, after = open_checkpoint(folder / "q"), open_checkpoint(folder / "scales/last")
    assert after.quantization == before.quantization
    for name in before.names():
        same = torch.equal(before.read(name), after.read(name))
        assert same if name.endswith("codes") or "embed" in name else not same, name


def test_codes_change_only_when_asked(world):
    source, folder = world
    assert recover(world, "weights", "--steps", 20, "--codes", "--code-rate", 0.05) == 0
    before, after = open_checkpoint(folder / "q"), open_checkpoint(folder / "weights/last")
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(before.quantized(name).codes, after.quantized(name).codes)
    assert int(after.quantized(name).codes.max()) <= 15


def test_layer_norms_and_their_biases_are_trained_and_kept(tiny_checkpoint, world, tmp_path):
    assert quantize([str(tiny_checkpoint("gpt2")), "-o", str(tmp_path / "q"), "--bits", "4", "--group", "64"]) == 0
    assert recover(world, "gpt2", "--steps", 4, checkpoint=tmp_path / "q", teacher=tiny_checkpoint("gpt2")) == 0
    before, after = open_checkpoint(tmp_path / "q"), open_checkpoint(world[1] / "gpt2/last")
    for name in before.names():
        if "norm" in name:
            assert not torch.equal(before.read(name), after.read(name)), name


@pytest.mark.parametrize("codes", [[], ["--codes"]])
def test_the_same_seed_gives_the_same_bytes_interrupted_or_not(world, monkeypatch, codes):
    _, folder = world
    whole, parts = f"whole{len(codes)}", f"parts{len(codes)}"
    options = ("--steps", 5, "--batch", 4, "--eval-every", 2, *codes)
    assert recover(world, whole, *options) == 0
    step, calls = Trainer.train_step, []

    def interrupted(trainer):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(trainer)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert recover(world, parts, *options) == 130
    assert json.loads((folder / parts / "last/training_state/state.json").read_text())["step"] == 2
    assert recover(world, parts, *options, "--resume") == 0
    assert len(calls) == 4 + 3                            # it went on, and did not start again
    assert recover(world, parts, *options) == 2           # a finished run is not written over
    weights = [(folder / out / "last/model.safetensors").read_bytes() for out in (whole, parts)]
    assert weights[0] == weights[1]
    stages = [stage["stage"] for stage in json.loads((folder / parts / "last/lineage.json").read_text())["stages"]]
    assert stages[-2:] == ["compress.quantize", "compress.recover"]


@pytest.mark.parametrize("options, words", [
    (["--steps", 0], "--steps is 0"), (["--learning-rate", 0], "--learning-rate"), (["--top", 0], "--top is 0"),
    (["--length", 10**6], "less than one window"),
    (["--length", 250], "too few tokens to learn from and to judge on")])
def test_bad_numbers(world, options, words, capsys):
    if "--length" in options:
        (world[1] / "short.txt").write_text("few" if "one window" in words else "Once upon a time. " * 60)
        options = [*options, "--data", world[1] / "short.txt"]
    assert recover(world, "bad", *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (world[1] / "bad").exists()


def test_a_dense_student_is_refused(world, capsys):
    source, _ = world
    assert recover(world, "bad", checkpoint=source) == 2
    assert "is not quantized" in capsys.readouterr().err
