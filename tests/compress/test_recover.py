"""Quantization-aware distillation: gradients against autograd, codes kept or moved, the student nearer to its teacher."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from compress.quantize import main as quantize
from compress.layerwise import Walk
from compress.recover import MOST, _tensors, default_rate, main
from compress.recovering.blocks import _Near
from compress.recovering.coded import CodedLinear, coded
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


LEVELS = TensorFormat(3, 32, kind="levels", scale_bits=8)
FORMS = [TensorFormat(3, 32), TensorFormat(4, 0), TensorFormat(4, 32, False), TensorFormat(3, 32, False, scale_bits=8), LEVELS,
         TensorFormat(2, 32, kind="levels")]


def straight_through(linear, coded):
    """The linear's weight [N, K] by plain autograd, of codes or of latents in mean steps of the format."""
    tensor, table, top, fixed = linear.tensor, linear.tensor.levels, 2**linear.tensor.bits - 1, coded.dtype == torch.uint8
    if table is None:
        low, high = ((bound - linear.zeros.round() - (linear.zeros - linear.zeros.detach()))[:, :, None] for bound in (0, top))
        values = coded.float() + low if fixed else coded + (coded.round() - coded).detach()
        values = torch.where(values < low, low, torch.where(values > high, high, values))             # the zero point moves those
    elif fixed:
        values = table.float()[coded.int()]
    else:
        unit = (float(table[-1]) - float(table[0])) / top
        within = (coded * unit >= table[0] - unit / 2) & (coded * unit <= table[-1] + unit / 2)
        values = table.float()[(coded[..., None] * unit - table).abs().argmin(-1)] + (coded - coded.detach()) * unit * within
    return (values * (linear.scales * linear.log_factor.exp())[:, :, None]).flatten(1)


@pytest.mark.parametrize("weights", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_autograds(form, weights):
    weight, x, target = torch.randn(6, 64), torch.randn(5, 64), torch.randn(5, 6)
    tensor = round_to_nearest(weight, form)
    linear = CodedLinear(tensor, None, weight if weights else None)
    assert torch.allclose(linear(x), x @ tensor.dequantize().T, atol=1e-5)
    if weights:
        linear.latent.data.mul_(1.5)                                          # some beyond the codes, on either side
    asked = [p for p in linear.parameters() if p.requires_grad]
    assert len(asked) == 1 + weights + (weights and not form.symmetric)
    ours = torch.autograd.grad((linear(x) * target).sum(), asked)
    exact = torch.autograd.grad(((x @ straight_through(linear, linear.latent if weights else linear.coded).T) * target).sum(), asked)
    for mine, oracle in zip(ours, exact):
        assert torch.allclose(mine, oracle, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_latent_starts_near_its_code_on_the_side_of_the_original(form):
    weight, tensor = torch.randn(6, 64), round_to_nearest(torch.randn(6, 64), form)
    if form.kind == "levels":                                                 # close together in the middle, as fitted ones are
        tensor = replace(tensor, levels=torch.tensor([-127, -60, -25, -6, 8, 30, 65, 127][::2 if form.bits == 2 else 1], dtype=torch.int8))
    linear = CodedLinear(tensor, None, weight)                                # most codes are not the nearest, as with GPTQ
    assert torch.equal(linear.frozen().codes, linear.tensor.codes) and torch.equal(linear.frozen().scales, linear.tensor.scales)
    unit = linear.scales[:, :, None] * linear.values.unit
    latents, wanted, values = (x.view(linear.latent.shape) / unit for x in (linear.latent.detach() * unit, weight, linear.tensor.dequantize()))
    assert form.kind == "levels" or (latents - values).abs().max() <= 0.4 + 1e-5
    assert ((latents - wanted).abs() <= (values - wanted).abs() + 1e-5).all()
    linear.latent.data[0, 0, :2] = torch.tensor([-99.0, 99.0])
    assert linear.frozen().codes[0, :2].tolist() == [0, 2**form.bits - 1]


BYTES = ("--bits", "3", "--group", "32", "--kind", "levels", "--scale-bits", "8")
ZEROS = ("--bits", "3", "--group", "32", "--no-symmetric")


@pytest.mark.parametrize("family, form", [("smollm2", BYTES), *((family, ("--group", "32")) for family in ("gemma4", "qwen3_5", "granite4_tiny"))])
def test_an_untrained_student_is_the_checkpoint(family, form, tiny_checkpoint, tmp_path):
    """And what is saved of it are the same codes, scales and all else."""
    assert quantize([str(tiny_checkpoint(family)), "-o", str(tmp_path / "q"), *form]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    decoder, ids = load_decoder(tmp_path / "q"), torch.arange(40)[None]
    coded(decoder, checkpoint, "", open_checkpoint(tiny_checkpoint(family)))
    torch.testing.assert_close(decoder(ids), load_decoder(tmp_path / "q")(ids), atol=1e-4, rtol=1e-4)
    saved = dict(_tensors(checkpoint, decoder))
    assert set(saved) == set(checkpoint.names()) and all(torch.equal(saved[name], checkpoint.read(name)) for name in saved)
    learning = {name for name, module in decoder.named_modules() if isinstance(module, CodedLinear)}
    assert learning == {name for name in checkpoint.quantization.tensors if name.startswith("model.layers.")}


def test_scales_alone_bring_the_student_nearer(world):
    source, folder = world
    assert recover(world, "scales", "--steps", 40, "--learning-rate", 2e-3) == 0
    assert divergence(folder / "scales/last", source) < 0.9 * divergence(folder / "q", source)
    before, after = open_checkpoint(folder / "q"), open_checkpoint(folder / "scales/last")
    assert after.quantization == before.quantization
    for name in before.names():
        same = torch.equal(before.read(name), after.read(name))
        assert same if name.endswith("codes") or "embed" in name else not same, name


def test_weights_bring_it_nearer_layer_by_layer_and_again_as_a_whole(world, capfd):
    """On text that neither saw, against scales alone, with as many updates of the whole."""
    source, folder = world
    assert recover(world, "blocks", "--train", "weights", "--steps", 1, "--block-steps", 16, "--block-rate", 0.03) == 0
    before, after = (divergence(folder / name, source) for name in ("q", "blocks/last"))
    assert after < 0.9 * before
    assert recover(world, "both", "--train", "weights", "--steps", 16, "--block-steps", 16, "--block-rate", 0.03, "--weight-rate", 0.03) == 0
    assert divergence(folder / "both/last", source) < 0.9 * after
    one, other = open_checkpoint(folder / "q"), open_checkpoint(folder / "both/last")
    assert one.quantization == other.quantization
    for name, form in one.quantization.tensors.items():
        codes = other.quantized(name).codes
        assert torch.equal(one.quantized(name).codes, codes) == ("embed" in name) and int(codes.max()) < 2**form.bits


def test_the_rate_of_weights_falls_with_the_root_of_the_steps(world):
    """So that as far as noise carries a latent does not depend on how long a run is."""
    assert [default_rate(steps) for steps in (1, 36, 144, 3600)] == pytest.approx([MOST, MOST, MOST / 2, MOST / 10])
    common = ("--train", "weights", "--steps", 4, "--block-steps", 0)
    assert recover(world, "default", *common) == recover(world, "told", *common, "--weight-rate", MOST) == 0
    one, other = (open_checkpoint(world[1] / f"{name}/last") for name in ("default", "told"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


@pytest.mark.parametrize("form", (BYTES, ZEROS))
def test_weights_of_every_kind_of_format_learn(world, form):
    source, folder = world
    assert quantize([str(source), "-o", str(folder / form[-1]), *form]) == 0
    assert recover(world, f"of {form[-1]}", "--train", "weights", "--steps", 12, "--block-steps", 12, "--block-rate", 0.03, "--weight-rate", 0.03,
                   checkpoint=folder / form[-1]) == 0
    assert divergence(folder / f"of {form[-1]}/last", source) < 0.8 * divergence(folder / form[-1], source)
    assert open_checkpoint(folder / f"of {form[-1]}/last").quantization == open_checkpoint(folder / form[-1]).quantization


def test_layer_norms_and_their_biases_are_trained_and_kept(tiny_checkpoint, world, tmp_path):
    assert quantize([str(tiny_checkpoint("gpt2")), "-o", str(tmp_path / "q"), "--bits", "4", "--group", "64"]) == 0
    assert recover(world, "gpt2", "--steps", 4, checkpoint=tmp_path / "q", teacher=tiny_checkpoint("gpt2")) == 0
    before, after = open_checkpoint(tmp_path / "q"), open_checkpoint(world[1] / "gpt2/last")
    for name in before.names():
        if "norm" in name:
            assert not torch.equal(before.read(name), after.read(name)), name


WEIGHTS = ("--train", "weights", "--block-steps", 2)         # two layers of two updates, then those of all


@pytest.mark.parametrize("options, stopped, rest", [((), 4, 3), (WEIGHTS, 4, 2 + 5), (WEIGHTS, 8, 3)])
def test_the_same_seed_gives_the_same_bytes_interrupted_or_not(world, monkeypatch, options, stopped, rest):
    """In the second layer's last update by itself, and in an update of the whole."""
    _, folder = world
    whole, parts = f"whole{len(options)}", f"parts{len(options)}-{stopped}"
    options = ("--steps", 5, "--batch", 4, "--eval-every", 2, *options)
    if not (folder / whole).exists():
        assert recover(world, whole, *options) == 0
    step, calls = Trainer.train_step, []

    def interrupted(trainer):
        calls.append(1)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return step(trainer)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert recover(world, parts, *options) == 130
    if rest < 5:
        assert json.loads((folder / parts / "last/training_state/state.json").read_text())["step"] == 2
    assert recover(world, parts, *options, "--resume") == 0
    assert len(calls) == stopped + rest                   # it went on, and did not start again
    assert recover(world, parts, *options) == 2           # a finished run is not written over
    weights = [(folder / out / "last/model.safetensors").read_bytes() for out in (whole, parts)]
    assert weights[0] == weights[1]
    stages = [stage["stage"] for stage in json.loads((folder / parts / "last/lineage.json").read_text())["stages"]]
    assert stages[-2:] == ["compress.quantize", "compress.recover"]
    assert not list(folder.glob(".*.work"))


@pytest.mark.parametrize("family", ("smollm2", "gemma4", "granite4_tiny"))
def test_a_layer_by_itself_is_told_what_the_walk_tells_it(family, tiny_checkpoint):
    """Windows in another order, of several parts: of the layer's own inputs, keys of earlier layers and experts too."""
    checkpoint, chosen = open_checkpoint(tiny_checkpoint(family)), torch.tensor([4, 0, 3])
    walk = Walk(checkpoint, torch.randint(0, 300, (5, 24)), rows=2)
    for number in range(len(checkpoint.config.layers)):
        layer = walk.load(number)
        made = layer(walk.x.home[chosen], walk.told(layer, chosen)).detach()
        walk.step(layer)
        assert torch.allclose(made, walk.x.home[chosen], atol=2e-2 * float(made.abs().max()))         # which multiplies in bfloat16


def test_a_loss_that_is_no_number_ends_at_the_last_good_layer(world, monkeypatch, capsys):
    """Which is told, and kept: the mended command goes on from there."""
    _, folder = world
    options, loss, seen = ("--steps", 1, *WEIGHTS), _Near.forward, []

    def broken(near, windows):
        seen.append(near.layer.number)
        return loss(near, windows) * (float("nan") if near.layer.number == 1 and torch.is_grad_enabled() else 1)
    monkeypatch.setattr(_Near, "forward", broken)
    assert recover(world, "nan", *options) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(
        "; layers before it are kept. Lower --block-rate and give the same command again") and not (folder / "nan/last").exists()
    seen.clear()
    monkeypatch.setattr(_Near, "forward", lambda near, windows: seen.append(near.layer.number) or loss(near, windows))
    assert recover(world, "nan", *options, "--block-rate", 1e-3) == 0
    assert set(seen) == {1}


def test_a_layer_that_gets_no_nearer_stays_as_it_was(world):
    _, folder = world
    assert recover(world, "wild", "--train", "weights", "--steps", 1, "--learning-rate", 1e-9, "--weight-rate", 1e-9, "--block-steps", 4,
                   "--block-rate", 0.99) == 0
    before, after = (open_checkpoint(folder / name).quantized("model.layers.0.mlp.up_proj") for name in ("q", "wild/last"))
    assert torch.equal(before.codes, after.codes) and torch.equal(before.scales, after.scales)


def test_weights_of_another_model_are_refused(world, tiny_checkpoint, capsys):
    other = tiny_checkpoint("smollm2", intermediate_size=96)
    assert recover(world, "bad", "--train", "weights", teacher=other) == 2
    assert "has other ones in model.layers.0.mlp" in capsys.readouterr().err


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
