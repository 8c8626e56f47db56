"""The training loop on tiny models, in this process: the loss, its accumulation, schedules, stopping, bad numbers."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.network.config import LayerConfig, ModelConfig
from models.data.corpus import IGNORE
from models.device import has_bf16
from models.network.decoder import Decoder
from models.training.optimizer import learning_rate, optimizer
from models.training.presets import parameter_count, preset
from models.training.losses import label_columns, label_loss, summed_loss
from models.training.placement import mixed_precision
from models.training.trainer import Trainer, TrainerOptions
from runtime.errors import CheckFailed, UserError

VOCAB, CONTEXT = 50, 12
CPU = torch.device("cpu")


def tiny_decoder(seed=0):
    torch.manual_seed(seed)
    return Decoder(ModelConfig(family="llama", vocab_size=VOCAB, hidden_size=32, layers=(LayerConfig(2, 1, 48),) * 2,
                               head_dim=16, context_length=32))


class RandomRows:
    """Rows of random tokens; some labels are without loss."""

    lengths = None

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.ids = rng.integers(0, VOCAB, (count, CONTEXT + 1))
        self.ignored = rng.random((count, CONTEXT)) < 0.4

    def __len__(self):
        return len(self.ids)

    def rows(self, indices):
        return self.ids[indices, :-1], np.where(self.ignored[indices], IGNORE, self.ids[indices, 1:])


def trainer(tmp_path, module=None, name="run", train=None, valid=None, **options):
    options = {"steps": 6, "batch": 4, "micro_batch": 4, "learning_rate": 1e-2, "warmup": 2, "eval_every": 3,
               "precision": "fp32"} | options
    return Trainer(module or tiny_decoder(), TrainerOptions(out=tmp_path / name, **options), train or RandomRows(20, 1),
                   valid or RandomRows(8, 2), lambda module, folder, metrics: None, {})


def lines(folder, kind="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_loss_is_the_sum_over_labels_in_float64():
    module, rows = tiny_decoder(), RandomRows(5, 3)
    input_ids, labels = map(torch.from_numpy, rows.rows(np.arange(5)))
    log_probabilities = module(input_ids).double().log_softmax(-1)
    expected = sum(-log_probabilities[r, c, labels[r, c]] for r in range(5) for c in range(CONTEXT) if labels[r, c] != IGNORE)
    assert summed_loss(module, input_ids, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"micro_batch": 3}, {"checkpointing": True}])
def test_the_way_a_batch_is_run_does_not_change_the_losses(tmp_path, change):
    trainer(tmp_path, name="plain").fit()
    trainer(tmp_path, name="other", **change).fit()
    for plain, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "other"), strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)


def test_checkpointing_computes_layers_twice(tmp_path):
    module, calls = tiny_decoder(), []
    module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run = trainer(tmp_path, module, checkpointing=True)
    run.train_step()
    assert len(calls) == 2


@pytest.mark.parametrize("options, decay, theirs", [
    ({}, 0.1, partial(torch.optim.AdamW, betas=(0.9, 0.95))),
    ({"betas": (0.8, 0.999), "weight_decay": 0.3}, 0.3, partial(torch.optim.AdamW, betas=(0.8, 0.999))),
    ({"optimizer": "sgd"}, 0.0, partial(torch.optim.SGD, lr=0.0, momentum=0.9)),
    ({"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.1}, 0.1, partial(torch.optim.SGD, lr=0.0)),
    ({"optimizer": "sgd", "momentum": 0.7, "weight_decay": 0.1}, 0.1, partial(torch.optim.SGD, lr=0.0, momentum=0.7))])
def test_updates_equal_pytorchs_own_loop(tmp_path, options, decay, theirs):
    """The same batches, gradients and optimizer by hand, in float32."""
    run, oracle = trainer(tmp_path, clip=0.5, warmup=0, **options), tiny_decoder()
    optimizer = theirs([{"params": [p for p in oracle.parameters() if p.dim() > 1], "weight_decay": decay},
                        {"params": [p for p in oracle.parameters() if p.dim() == 1], "weight_decay": 0.0}], foreach=False)
    from models.data.corpus import batch_indices
    for step in range(6):
        input_ids, labels = map(torch.from_numpy, run.train.rows(batch_indices(20, 4, 0, step)))
        loss = torch.nn.functional.cross_entropy(oracle(input_ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 5)))
        optimizer.step()
        optimizer.zero_grad()
        assert run.train_step().read()[0] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(run.module.parameters(), oracle.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_validation_loss_is_the_mean_over_its_labels(tmp_path):
    run = trainer(tmp_path, micro_batch=3, eval_rows=7)
    input_ids, labels = map(torch.from_numpy, run.valid.rows(np.arange(7)))
    expected = torch.nn.functional.cross_entropy(run.module(input_ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert run.validate()["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_patience_ends_the_run_once_the_loss_no_longer_falls(tmp_path):
    run = trainer(tmp_path, steps=300, eval_every=5, patience=2)
    run.fit()
    losses = [line["valid_loss"] for line in lines(tmp_path / "run", "valid")]
    assert run.step < 300
    assert all(loss >= min(losses[:-2]) for loss in losses[-2:])
    assert run.best == min(losses[1:])


class NaNAt(torch.nn.Module):
    """A decoder whose logits become NaN from the given training step on."""

    def __init__(self, step):
        super().__init__()
        self.inner, self.left = tiny_decoder(), step

    def forward(self, input_ids, logits_positions=None):
        logits = self.inner(input_ids, logits_positions=logits_positions)
        self.left -= self.training
        return logits * (math.nan if self.left < 0 else 1.0)


def test_nan_loss_stops_with_step_and_rows_and_keeps_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path, NaNAt(4))
    with pytest.raises(CheckFailed, match=r"loss nan .* at step 5, in the batch of rows (\d+, ){3}\d+; .*last keeps step 3"):
        run.fit()
    assert json.loads((tmp_path / "run/last/training_state/state.json").read_text())["step"] == 3
    assert all(p.isfinite().all() for p in run.module.parameters())


def stopped_at(run, step, number):
    """Send this process the signal within the given step of training (negative: of validation)."""
    train_step, validate = run.train_step, run.validate
    run.train_step = lambda: (os.kill(os.getpid(), number) if run.step + 1 == step else None, train_step())[1]
    run.validate = lambda: (os.kill(os.getpid(), number) if run.step == -step else None, validate())[1]
    return run


@pytest.mark.parametrize("step, number, error, kept", [
    (2, signal.SIGINT, KeyboardInterrupt, 2), (5, signal.SIGTERM, SystemExit, 5), (1, signal.SIGINT, KeyboardInterrupt, 1),
    (-3, signal.SIGTERM, SystemExit, 3), (-6, signal.SIGINT, KeyboardInterrupt, 6)])
def test_a_stopped_run_is_saved_and_ends_as_if_it_had_not_been(tmp_path, capfd, step, number, error, kept):
    trainer(tmp_path, name="whole").fit()
    with pytest.raises(error) as left:
        stopped_at(trainer(tmp_path), step, number).fit()
    assert error is KeyboardInterrupt or left.value.code == 143
    assert f"last keeps step {kept}: --resume continues" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer(tmp_path, resume=True).fit()
    for kind, key in (("train", "loss"), ("valid", "valid_loss")):
        assert [(row["step"], row[key]) for row in lines(tmp_path / "run", kind)] == [
            (row["step"], row[key]) for row in lines(tmp_path / "whole", kind)]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("hurried", [False, True])
def test_a_run_that_saved_nothing_starts_again(tmp_path, hurried, resume):
    """Stopped in its first evaluation, or by two signals, of which the second does not wait for the step."""
    first = stopped_at(trainer(tmp_path), 1 if hurried else 0, signal.SIGINT)
    if hurried:
        train_step = first.train_step
        first.train_step = lambda: (train_step(), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        first.fit()
    assert not (tmp_path / "run/last").exists()
    trainer(tmp_path, resume=resume).fit()
    assert [row["step"] for row in lines(tmp_path / "run", "valid")] == [0, 3, 6]


def test_more_steps_continue(tmp_path):
    trainer(tmp_path).fit()
    longer = trainer(tmp_path, steps=12, resume=True)
    assert longer.step == 6
    longer.fit()
    trainer(tmp_path, name="long", steps=12).fit()
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 13))
    for ours, whole in zip(lines(tmp_path / "run")[6:], lines(tmp_path / "long")[6:], strict=True):
        assert ours["learning_rate"] == whole["learning_rate"]         # the longer run's schedule from there on
    with pytest.raises(UserError, match="steps was 12 and is 9"):
        trainer(tmp_path, steps=9, resume=True)


def test_a_diverged_model_is_not_saved(tmp_path):
    run = trainer(tmp_path, learning_rate=1e300, warmup=0, eval_every=1)
    with pytest.raises(CheckFailed, match="nothing was saved yet"):
        run.fit()
    assert not (tmp_path / "run/last").exists()


@pytest.mark.parametrize("option, value", [("steps", 0), ("batch", -1), ("learning_rate", float("nan")), ("warmup", 7),
                                           ("optimizer", "adam"), ("momentum", 0.5), ("betas", (0.9, 1.0))])
def test_numbers_that_cannot_train_are_refused(tmp_path, option, value):
    with pytest.raises(UserError, match=option.replace("_", "-")):
        trainer(tmp_path, **{option: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        trainer(tmp_path, precision="fp16")


@pytest.mark.skipif(not has_bf16(CPU), reason="this machine does not compute in bf16")
def test_bf16_learns_as_fp32_does(tmp_path):
    """Mixed precision: other roundings, the same curve; the weights themselves stay in float32."""
    runs = {precision: trainer(tmp_path, name=precision, precision=precision, steps=30, eval_every=30)
            for precision in ("fp32", "bf16")}
    for run in runs.values():
        run.fit()
    fp32, bf16 = ([line["loss"] for line in lines(tmp_path / name)] for name in ("fp32", "bf16"))
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, rel=0.02)
    assert all(p.dtype == torch.float32 for p in runs["bf16"].module.parameters())


def test_auto_is_bf16_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, chosen in (({}, "no"), ({"avx512_bf16": True}, "no"), ({"avx512_bf16": True, "amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert mixed_precision("auto", CPU) == chosen
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(UserError, match="does not compute in bf16"):
        mixed_precision("bf16", CPU)


def test_compiled_it_learns_the_same(tmp_path, monkeypatch):
    """Traced, differentiated and run as compiled graphs; without generated code, which takes a minute to build."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name in ("plain", "compiled"):
        trainer(tmp_path, name=name, steps=3, compile=name == "compiled").fit()
    for plain, compiled in zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("version, options, judge, message", [
    (1, {}, label_loss, "--fsdp_version 2"), (2, {"compile": True}, label_loss, "does not go with --compile"),
    (2, {}, lambda module, *rows: {}, "distillation")])
def test_what_fsdp_cannot_do_is_refused(tmp_path, version, options, judge, message):
    run = trainer(tmp_path)
    run.accelerator, run.judge = SimpleNamespace(is_fsdp2=version == 2), judge
    run.options = replace(run.options, **options)
    with pytest.raises(UserError, match=message):
        run._check_sharded()


def test_schedules():
    options = dict(steps=100, warmup=10, peak=2.0, floor=0.1, decay_share=0.2)
    cosine = [learning_rate(s, schedule="cosine", **options) for s in range(100)]
    wsd = [learning_rate(s, schedule="wsd", **options) for s in range(100)]
    assert cosine[:10] == wsd[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert cosine[10] == pytest.approx(2.0) and cosine[99] == pytest.approx(0.2)
    assert cosine[54] > 2.0 * 0.55 > cosine[55]                       # halfway between peak and floor
    assert wsd[10:81] == pytest.approx([2.0] * 71) and wsd[90] == pytest.approx(2.0 * 0.55)
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:]))


def test_only_matrices_decay():
    module = tiny_decoder()
    groups = optimizer(module, TrainerOptions(out=Path("run"))).param_groups
    assert {p.dim() for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("size, vocab", [("5m", 4096), ("15m", 8192), ("60m", 16384), ("135m", 49152), ("22m", 8192)])
def test_presets_have_the_size_they_are_named_by(size, vocab):
    config = preset(size, vocab, 512, eos=0).config
    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(config).parameters())
    assert count == parameter_count(config)
    assert count == pytest.approx(float(size[:-1]) * 1e6, rel=0.1)


def test_135m_is_smollm2s_shape():
    config = preset("135m", 49152, 2048, eos=0).config
    assert (config.hidden_size, len(config.layers), config.layers[0]) == (576, 30, LayerConfig(9, 3, 1536))


@pytest.mark.parametrize("size", ["5", "huge", "10k"])
def test_a_preset_of_no_use_is_refused(size):
    with pytest.raises(UserError, match=f"--preset {size}"):
        preset(size, 4096, 512, eos=0)
