"""The comparison of logits: against scipy over a whole vocabulary, and as a lower bound of that where only the likeliest are known."""

import numpy as np
from scipy.special import log_softmax, rel_entr

from runtime.bundle import open_bundle
from runtime.compare import Comparison, Top, compare
from runtime.compare import log_rest as rest_of
from runtime.golden import read_golden


def test_kl_is_scipys_and_a_near_tie_is_none_of_the_errors():
    """KL as scipy has it; a token that differs inside the noise is a near tie, one that differs outside is not."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 50)).astype(np.float32)
    logits = reference + rng.normal(scale=0.01, size=reference.shape).astype(np.float32)
    for row, (first, second) in enumerate(((9.0, 8.0), (9.0, 8.999), (9.0, 8.0))):
        reference[row, 4], reference[row, 5] = first, second
        logits[row, 4], logits[row, 5] = first, second
    logits[1, 5] += 0.01          # the order of two nearly equal logits turns round
    logits[2] += 5.0              # a constant is no difference
    result = compare(reference, logits)
    p, q = (log_softmax(x.astype(np.float64), 1) for x in (reference, logits))
    assert np.allclose(result.kl, rel_entr(np.exp(p), np.exp(q)).sum(1), rtol=1e-9)
    assert result.differs.tolist() == [False, True, False] and result.near_tie.tolist() == [False, True, False]
    logits[0, [4, 5]] = 8.0, 9.0      # now the largest difference among the 20 is 1, and so is the margin: a near tie
    logits[1, [4, 5]] = 9.0, 9.001
    assert compare(reference, logits).near_tie.tolist() == [True, True, False]
    other = reference.copy()
    other[0, 30] = 40.0               # far from any tie, and not among the 20 likeliest
    wrong = compare(reference, other)
    assert wrong.differs[0] and not wrong.near_tie[0] and wrong.kl[0] > 10


def test_kl_is_a_lower_bound_of_the_whole(golden_bundle):
    top = read_golden(open_bundle(golden_bundle))[1][0].reference
    rng = np.random.default_rng(0)
    top_ids, vocab = top.ids, 384
    log_p = np.full((len(top_ids), vocab), -30.0)             # any distribution that has these for its top 20
    np.put_along_axis(log_p, top_ids, top.log_p, axis=1)
    rest = 1 - np.take_along_axis(np.exp(log_p), top_ids, axis=1).sum(1)
    others = rng.random(log_p.shape)
    np.put_along_axis(others, top_ids, 0, axis=1)
    others /= others.sum(1, keepdims=True)
    p = np.where(log_p > -30, np.exp(log_p), others * np.maximum(rest, 1e-9)[:, None])
    p /= p.sum(1, keepdims=True)
    logits = np.log(p) + rng.normal(size=p.shape) * 0.3
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    whole = (p * np.log(p / q)).sum(1)
    kl = compare(top, logits.astype(np.float32)).kl
    assert (kl <= whole + 1e-6).all() and (kl > 0).all()
    same = compare(top, (np.log(p) + 7).astype(np.float32))
    assert np.abs(same.kl).max() < 1e-6 and not same.differs.any()


def test_a_top_of_all_but_one_token_is_the_whole():
    rng = np.random.default_rng(1)
    reference, logits = (rng.normal(size=(5, 40)).astype(np.float32) for _ in range(2))
    ids = np.argsort(-reference, axis=1)[:, :39]
    log_p = np.take_along_axis(log_softmax(reference.astype(np.float64), 1), ids, axis=1)
    whole, top = compare(reference, logits), compare(Top(ids, log_p, rest_of(log_p)), logits)
    assert np.allclose(top.kl, whole.kl, rtol=1e-6) and top.differs.tolist() == whole.differs.tolist()


def test_numbers_that_are_none_keep_no_budget(recwarn):
    logits = np.random.default_rng(2).normal(size=(3, 30)).astype(np.float32)
    broken = logits.copy()
    broken[1] = np.nan
    fine = compare(logits, logits)
    assert fine.keeps(1e-12) and fine.first is None and fine.row()["same top-1"] == "100.0%"
    for found in (compare(logits, broken), compare(broken, logits), Comparison.joined([fine, compare(logits, broken)])):
        assert not found.keeps(1e9)
    moved = Comparison.joined([fine, compare(logits, -logits)])
    assert moved.first == 3 and len(moved.kl) == 6 and not recwarn.list
