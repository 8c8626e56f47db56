"""The teacher cache against full distributions; resuming; identity of what is cached."""

import numpy as np
import pytest
import torch

from compress.drawing import drawn
from compress.teacher import build_cache, main, write_own_text
from models.checkpoint import load_decoder
from runtime.errors import UserError

IDS = torch.randint(0, 384, (5, 24), generator=torch.Generator().manual_seed(0))


def full_divergence(teacher, student):
    p, q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (p.exp() * (p - q)).sum(-1)


def test_divergence_is_the_full_one_less_the_tail(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("smollm2")
    decoder = load_decoder(path)
    with torch.no_grad():
        teacher = decoder(IDS)
    student = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    gaps = []
    for k in (8, 64, 383):
        cache = build_cache(path, IDS, tmp_path, k, "fp32")
        found = torch.stack([cache.divergence(w, student[w]) for w in range(5)])
        exact = full_divergence(teacher, student)
        assert (found <= exact + 2e-3).all()                   # a lower bound, up to fp16
        gaps.append(float((exact - found).mean() / exact.mean()))
        own = torch.stack([cache.divergence(w, teacher[w]) for w in range(5)])
        assert own.abs().max() < 2e-3                          # the teacher agrees with itself
    assert gaps[0] > gaps[1] > gaps[2] and abs(gaps[2]) < 0.01


def test_gradient_is_that_of_the_full_divergence(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("smollm2")
    with torch.no_grad():
        teacher = load_decoder(path)(IDS[:1])[0]
    student = (teacher * 0.8).requires_grad_()
    cache = build_cache(path, IDS[:1], tmp_path, 383, "fp32")
    ours, = torch.autograd.grad(cache.divergence(0, student).sum(), student)
    exact, = torch.autograd.grad(full_divergence(teacher, student).sum(), student)
    assert torch.allclose(ours, exact, atol=2e-3)


def test_bf16_is_near_fp32_and_another_cache(tiny_checkpoint, tmp_path):
    """Neither so far that a student would notice, nor nothing: the layers' products are rounded to 8 bits of mantissa."""
    path = tiny_checkpoint("smollm2")
    exact, low = (build_cache(path, IDS, tmp_path, 383, precision) for precision in ("fp32", "bf16"))
    assert exact.folder != low.folder and low.state["precision"] == "bf16"
    differ = np.abs(exact.log_probabilities.astype(np.float32) - low.log_probabilities).max()
    with torch.no_grad():
        logits = load_decoder(path)(IDS)
    distance = torch.stack([low.divergence(window, logits[window]) for window in range(len(IDS))]).mean()
    assert differ > 2e-3 and distance < 1e-3


def test_interrupted_work_goes_on_and_finished_work_is_read(tiny_checkpoint, tmp_path, monkeypatch):
    from compress import teacher
    path, ask, filled = tiny_checkpoint("smollm2"), teacher.ask, []

    def counting(decoder, ids, question):
        if len(filled) == 2:
            filled.append("stop")
            raise KeyboardInterrupt
        filled.extend(ids.tolist())
        return ask(decoder, ids, question)
    monkeypatch.setattr(teacher, "ask", counting)
    with pytest.raises(KeyboardInterrupt):
        build_cache(path, IDS, tmp_path)
    again = build_cache(path, IDS, tmp_path)
    assert [row for row in filled if row != "stop"] == IDS.tolist()
    whole = build_cache(path, IDS, tmp_path / "whole")
    count = len(filled)
    assert build_cache(path, IDS, tmp_path).folder == again.folder and len(filled) == count
    for name in ("ids", "indices", "log_probabilities", "others"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))


def test_another_teacher_text_or_k_is_another_cache(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("smollm2")
    folders = {build_cache(path, IDS, tmp_path, 8).folder, build_cache(path, IDS, tmp_path, 9).folder,
               build_cache(path, IDS.flip(0), tmp_path, 8).folder, build_cache(tiny_checkpoint("smollm2", 1), IDS, tmp_path, 8).folder}
    assert len(folders) == 4


@pytest.mark.parametrize("k", [0, -1, 384])
def test_top_k_must_be_possible(k, tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="top-k"):
        build_cache(tiny_checkpoint("smollm2"), IDS, tmp_path, k)


def test_a_smaller_student_vocabulary_is_refused(tiny_checkpoint, tmp_path):
    cache = build_cache(tiny_checkpoint("smollm2"), IDS, tmp_path, 64)
    with pytest.raises(UserError, match="made over a vocabulary of 384 tokens, and the model has 100"):
        cache.divergence(0, torch.zeros(24, 100))


def test_own_text_is_drawn_from_the_model(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("smollm2"))
    first, again = (write_own_text(decoder, 40, 12, 384, seed=4, batch=batch) for batch in (16, 40))
    assert torch.equal(first, again) and first.shape == (40, 12)
    with torch.no_grad():
        log_probabilities = torch.log_softmax(decoder(first)[:, :-1], -1).gather(2, first[:, 1:, None])
        entropy = -(torch.log_softmax(decoder(first)[:, :-1], -1).exp() * torch.log_softmax(decoder(first)[:, :-1], -1)).sum(-1)
    # What is drawn at temperature 1 has, on average, the model's entropy as its surprise.
    assert float(-log_probabilities.mean()) == pytest.approx(float(entropy.mean()), rel=0.1)


def test_tokens_are_drawn_in_proportion():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 2.0, 0.0]])
    chance = torch.linspace(0, 1, 4001)[:-1].expand(2, -1)
    found = drawn(weights, chance)
    shares = torch.stack([torch.bincount(row, minlength=5) for row in found]) / 4000
    assert torch.allclose(shares, weights / 4, atol=1e-3) and torch.equal(shares > 0, weights > 0)
    assert (drawn(weights, torch.ones(2, 1)) < 5).all()             # a number rounded up to 1


@pytest.mark.parametrize("options", [[], ["--self", "2", "--data", "x"]])
def test_text_or_own_text_not_both(options, tiny_checkpoint, tmp_path, capsys):
    assert main([str(tiny_checkpoint("smollm2")), "-o", str(tmp_path), *options]) == 2
    assert "either --data FILES or --self N" in capsys.readouterr().err
