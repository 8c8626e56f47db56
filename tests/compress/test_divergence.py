"""Divergences against torch's kl_div and sums in float64; the top-k form and the chunked loss against the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from compress.distilling import chunked_loss as module
from compress.distilling.chunked_loss import chunked_loss, top_events
from compress.distilling.divergence import divergence
from runtime.errors import UserError

DRAW = torch.Generator().manual_seed(0)


def logits(*shape, spread=3.0):
    return spread * torch.randn(shape, generator=DRAW, dtype=torch.float64)


def torch_kl(p, q):
    """KL(p || q) of probabilities by torch's own function, [n]."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


P, Q = logits(5, 17).softmax(-1), logits(5, 17).softmax(-1)
EXPECTED = {
    ("forward", None): torch_kl(P, Q), ("reverse", None): torch_kl(Q, P),
    ("js", None): 0.5 * torch_kl(P, (P + Q) / 2) + 0.5 * torch_kl(Q, (P + Q) / 2),
    ("js", 0.9): 0.9 * torch_kl(P, 0.9 * P + 0.1 * Q) + 0.1 * torch_kl(Q, 0.9 * P + 0.1 * Q),
    ("skew", None): torch_kl(P, 0.1 * P + 0.9 * Q), ("skew", 0.3): torch_kl(P, 0.3 * P + 0.7 * Q),
}


@pytest.mark.parametrize("kind,mix", EXPECTED)
def test_each_is_what_its_paper_says(kind, mix):
    measure = divergence(kind, mix)
    torch.testing.assert_close(measure(P.log(), Q.log()), EXPECTED[kind, mix], rtol=1e-12, atol=1e-12)
    assert measure(P.log(), P.log()).abs().max() < 1e-14


@pytest.mark.parametrize("kind,mix,complaint", [("forward", 0.5, "nothing to mix"), ("skew", 0.0, "above 0"), ("js", 1.0, "below 1")])
def test_a_mix_of_no_use_is_refused(kind, mix, complaint):
    with pytest.raises(UserError, match=complaint):
        divergence(kind, mix)


def brute_events(z, index):
    """[n, k + 1] by loops over probabilities."""
    q = z.softmax(-1)
    given = torch.stack([row[i] for row, i in zip(q, index)])
    return torch.cat((given, torch.stack([row[[j for j in range(len(row)) if j not in i]].sum() for row, i in
                                          zip(q, index.tolist())])[:, None]), 1).log()


def test_top_events_and_their_gradient_are_autograds():
    z, index = logits(4, 23).requires_grad_(), torch.stack([torch.randperm(23, generator=DRAW)[:6] for _ in range(4)])
    torch.testing.assert_close(top_events(z, index), brute_events(z, index))
    assert torch.autograd.gradcheck(lambda z: top_events(z, index), z)
    weights = logits(4, 7)
    ours, = torch.autograd.grad((weights * top_events(z, index)).sum(), z)
    theirs, = torch.autograd.grad((weights * brute_events(z, index)).sum(), z)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js", "skew"])
def test_all_but_one_token_kept_is_the_whole_vocabulary(kind):
    """With k = vocab - 1 "any other token" is one token: value and gradient are the full divergence's."""
    teacher, student = logits(6, 11), logits(6, 11).requires_grad_()
    log_p = teacher.log_softmax(-1)
    top, index = log_p.topk(10)
    others = brute_events(teacher, index)[:, -1:]
    measure = divergence(kind)
    few = measure(torch.cat((top, others), 1), top_events(student, index))
    whole = measure(log_p, student.log_softmax(-1))
    torch.testing.assert_close(few, whole)
    for ours, theirs in zip(*(torch.autograd.grad(value.sum(), student) for value in (few, whole))):
        torch.testing.assert_close(ours, theirs)


def test_a_rest_that_has_almost_no_mass_stays_finite():
    z = torch.zeros(1, 8, dtype=torch.float32)
    z[0, :2] = 200.0
    z.requires_grad_()
    events = top_events(z, torch.tensor([[0, 1]]))
    events.sum().backward()
    assert events.isfinite().all() and z.grad.isfinite().all()
    torch.testing.assert_close(events[0, :2], torch.tensor([0.5, 0.5]).log())


def test_the_chunked_loss_is_the_whole_one(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(module, "ROWS", 3)
    hidden, head = logits(10, 4).requires_grad_(), logits(9, 4).requires_grad_()
    labels = torch.randint(0, 9, (10,), generator=DRAW)
    scale = 0.25
    ours = scale * chunked_loss(hidden, head, lambda z, part: F.cross_entropy(z, labels[part], reduction="sum"))
    theirs = scale * F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-6, atol=0)         # the sum is float32
    for a, b in zip(torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head))):
        torch.testing.assert_close(a, b)
