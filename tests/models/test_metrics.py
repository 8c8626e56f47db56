"""Metrics against worked examples, scipy and scikit-learn's definitions written out."""

import math

import numpy as np
import pytest

from models.judging import metrics
from models.tasks.defaults import DEFAULTS
from models.tasks.scoring import Solved, score


def test_squad_normal_form_and_f1():
    assert metrics.exact_match("The Eiffel Tower!", ["eiffel tower"]) == 1.0
    assert metrics.exact_match("Eiffel", ["eiffel tower"]) == 0.0
    assert metrics.token_f1("in the Eiffel Tower", ["Eiffel Tower"]) == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.token_f1("", ["x"]) == 0.0 and metrics.token_f1("the", ["a"]) == 1.0


def test_chinese_counts_characters():
    assert metrics.answer_tokens("北京 Olympics。") == ["北", "京", "olympics"]
    assert metrics.token_f1("北京市", ["北京"]) == pytest.approx(2 * 2 / 5)


def test_rouge_l_is_the_longest_common_subsequence():
    scores = metrics.rouge("the cat sat on mat", ["a cat on the mat"])
    # after articles are dropped: "cat sat on mat" against "cat on mat": LCS 3
    assert scores["rougeL"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))
    assert metrics.rouge("猫坐着", ["猫坐"])["rouge1"] == pytest.approx(0.8)


def test_bleu_and_chrf_at_their_ends():
    same = ["a quick brown fox jumps", "over the lazy dog again"]
    assert metrics.bleu(same, [[x] for x in same]) == pytest.approx(100) and metrics.chrf(same, [[x] for x in same]) == pytest.approx(100)
    assert metrics.bleu(["x y z w v"], [["a b c d e"]]) < 1


def test_meteor_equals_its_formula():
    # Three of four words match in one chunk: P = R = 3/4; penalty 0.5 (1/3)^3; F = PR / (0.9 P + 0.1 R).
    assert metrics.meteor("red green blue qqq", "red green blue zzz") == pytest.approx(0.75 * (1 - 0.5 * (1 / 3) ** 3))


def test_classification_by_hand():
    r = metrics.classification(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert r["confusion"] == [[1, 0], [1, 2]] and r["accuracy"] == 0.75
    assert r["precision"] == pytest.approx((0.5 + 1) / 2) and r["recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert r["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)


def test_bootstrap_matches_the_normal_interval():
    x = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = metrics.bootstrap(list(x))
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert low == pytest.approx(x.mean() - half, abs=0.02) and high == pytest.approx(x.mean() + half, abs=0.02)
    assert all(math.isnan(v) for v in metrics.bootstrap([1.0]))


def test_correlations_are_scipys_and_scikit_learns():
    import scipy.stats
    rng = np.random.default_rng(0)
    for ties in (3, 100):
        a, b = rng.integers(ties, size=(2, 60)) / 7
        b += a / 2
        assert metrics.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
        assert metrics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert metrics.pearson([1, 1, 1], [1, 2, 3]) == metrics.spearman([2, 2], [1, 3]) == 0
    found, right = ([str(label) for label in rng.integers(3, size=50)] for _ in range(2))
    right[:30] = found[:30]
    theirs = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with lm-eval")
    ours = metrics.classification(found, right)
    assert ours["matthews"] == pytest.approx(theirs.matthews_corrcoef(right, found))
    assert ours["macro_f1"] == pytest.approx(theirs.f1_score(right, found, average="macro"))
    assert metrics.classification(["a", "a"], ["a", "b"])["matthews"] == 0


def test_entities_are_counted_whole():
    """seqeval's own example: of 2 entities, one is found with its exact span; and what is listed twice counts once."""
    right, found = [[("MISC", 3, 6)], [("PER", 0, 2)]], [[("MISC", 2, 6)], [("PER", 0, 2)]]
    assert metrics.entities(found, right) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert metrics.entities([[("PER", "Bo"), ("PER", "Bo")]], [[("PER", "Bo")]]) == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert metrics.entities([[]], [[]])["f1"] == 0


def test_bleu_takes_the_nearest_reference_and_variety_is_told():
    one, two = "the quick brown fox jumps over it", "a lazy dog sleeps in the warm sun"
    assert metrics.bleu([two, one], [[one, two], [one]]) == pytest.approx(100)
    assert metrics.distinct(["x y z", "x y w"], 1) == pytest.approx(4 / 6) and metrics.distinct(["x y z", "x y"], 2) == pytest.approx(2 / 3)
    assert metrics.self_bleu([one, one, one]) == pytest.approx(100) and metrics.self_bleu([one, two]) < 10
    assert math.isnan(metrics.self_bleu([one])) and math.isnan(metrics.distinct(["", "!"], 1))
    single, several = (score(DEFAULTS["summarize"], [Solved(some, (one,)) for some in answers])[0] for answers in (
        ([one], [two], [one], [two]), ([one, two], [two, two], [one, two])))
    assert math.isnan(single["self_bleu_interval"][0]) and single["distinct1"] == pytest.approx(1 / 2)       # drawn twice, each is beside itself
    low, high = several["self_bleu_interval"]
    assert low <= several["self_bleu"] <= high and low < high
