"""Kneser-Ney against a dictionary version written from the formulas, one probability at a time."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from export import onnx as export_onnx
from models import evaluate, info
from models.judging.language_model import open_model
from models.ngram import NgramModel, count_ngrams, load_ngram, main, pack_keys
from models.tokenizer import main as tokenizer_main
from runtime.errors import UserError
from runtime.text import Tokenizer

VOCAB = 7


def text(n, seed=0):
    """A stream with structure: every count from 1 up occurs at every order."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.35, n) - 1, VOCAB - 1)


class Reference:
    def __init__(self, tokens, order):
        tokens = tokens.tolist()
        grams = [Counter(tuple(tokens[i:i + order]) for i in range(len(tokens) - order + 1))]
        for _ in range(order - 1):
            grams.append(Counter(gram[1:] for gram in grams[-1]))    # types before it, not occurrences
        self.counts = grams[::-1]
        self.after = [defaultdict(dict) for _ in self.counts]
        for after, counts in zip(self.after, self.counts):
            for gram, count in counts.items():
                after[gram[:-1]][gram[-1]] = count
        self.discounts = []
        for counts in self.counts:
            n = [max(1, sum(c == i for c in counts.values())) for i in range(5)]
            y = n[1] / (n[1] + 2 * n[2])
            self.discounts.append([0] + [min(max(i - (i + 1) * y * n[i + 1] / n[i], 0), i) for i in (1, 2, 3)])

    def probability(self, gram):
        if not gram:
            return 1 / VOCAB
        lower, seen = self.probability(gram[1:]), self.after[len(gram) - 1].get(gram[:-1])
        if not seen:
            return lower
        discounts, total = self.discounts[len(gram) - 1], sum(seen.values())
        taken = sum(discounts[min(count, 3)] for count in seen.values())
        count = seen.get(gram[-1], 0)
        return (count - discounts[min(count, 3)]) / total + taken / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_formulas(order):
    tokens = text(600)
    model, reference = count_ngrams(tokens, order, VOCAB), Reference(tokens, order)
    grams = np.random.default_rng(1).integers(0, VOCAB, (300, order))
    expected = [reference.probability(tuple(map(int, gram))) for gram in grams]
    np.testing.assert_allclose(model.probability(grams), expected, rtol=1e-5)


def test_every_distribution_sums_to_one_and_leaves_nothing_out():
    model = count_ngrams(text(500), 3, VOCAB + 3)                    # three tokens never seen
    for context in ([], [0], [2, 1], [VOCAB + 1, 0], [5, 5, 5, 5]):
        p = model.next_token(context)
        assert p.sum() == pytest.approx(1.0, abs=1e-6) and (p > 0).all()
        grams = np.array([[*context[-2:], token] for token in range(VOCAB + 3)])
        np.testing.assert_allclose(p, model.probability(grams), rtol=1e-12)


def test_a_text_whose_counts_say_nothing_of_the_unseen_leaves_it_something_all_the_same():
    model = count_ngrams(np.array([1, 2, 3, 4, 1, 2, 5] * 4), 3, VOCAB)
    assert all((model.next_token(context) > 0).all() for context in ([], [1], [1, 2], [2, 5], [6, 6]))


def test_loss_is_the_mean_over_tokens_that_are_not_first(tmp_path):
    class Held:
        tokens, starts = text(60, seed=5), np.array([0, 20, 33])
    model, reference = count_ngrams(text(600), 3, VOCAB), Reference(text(600), 3)
    stream = Held.tokens.tolist()
    expected = [-np.log(reference.probability(tuple(stream[max(0, i - 2):i + 1]))) for i in range(60) if i not in (0, 20, 33)]
    assert model.loss(Held) == pytest.approx(np.mean(expected), rel=1e-5)


def test_keys_use_every_bit():
    keys = pack_keys(np.array([[2**16 - 1] * 4, [0, 0, 0, 1]]), 16)
    assert keys.tolist() == [2**64 - 1, 1]
    tokens = np.array([65535, 65534, 65535, 65535, 65534, 65535, 1, 2])
    p = count_ngrams(tokens, 4, 2**16).probability(np.array([[65535, 65534, 65535, 65535]]))
    assert p[0] > 0.1


def test_command_writes_what_load_reads(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the king and the queen and the ship\n" * 50)
    assert tokenizer_main(["train", "--data", str(tmp_path / "a.txt"), "-o", str(tmp_path / "tok"), "--vocab-size", "280"]) == 0
    command = ["--tokenizer", str(tmp_path / "tok"), "--data", str(tmp_path / "a.txt"), "--valid", str(tmp_path / "a.txt"),
               "--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    model = load_ngram(tmp_path / "out")
    assert isinstance(model, NgramModel) and len(model.orders) == 4
    assert model.next_token([]).sum() == pytest.approx(1.0, abs=1e-6)
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    (tmp_path / "b.txt").write_text("the queen and the king and the dog\n")
    assert evaluate.main([str(tmp_path / "out"), "--data", str(tmp_path / "b.txt"), "--window", "8", "--json", str(tmp_path / "x.json")]) == 0
    found, tokenizer = json.loads((tmp_path / "x.json").read_text()), Tokenizer(tmp_path / "tok/tokenizer.json")
    ids = tokenizer.encode("the queen and the king and the dog\n")
    p = [model.next_token(ids[max(0, i - 3):i]) for i in range(4, 4 + found["tokens"])]
    assert found["perplexity"] == pytest.approx(np.exp(-np.mean([np.log(row[ids[4 + i]]) for i, row in enumerate(p)])), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(np.mean([row.argmax() == ids[4 + i] for i, row in enumerate(p)]))
    replies = open_model(tmp_path / "out").generate(["the king", "the"], 4, progress=False)
    for prompt, reply in zip(("the king", "the"), replies):                          # greedy, as the probabilities say
        context = tokenizer.encode(prompt).tolist()
        for token in reply.tokens:
            assert model.next_token(context).argmax() == token
            context.append(token)
    capsys.readouterr()
    for refused in (export_onnx.main, info.main):                                     # n-grams in a checkpoint's place
        assert refused([str(tmp_path / "out"), *(["-o", str(tmp_path / "b")] if refused is export_onnx.main else [])]) == 2
        assert "these are n-grams, not a network" in capsys.readouterr().err


@pytest.mark.parametrize("order, vocab, message", [(5, 49152, "--order 5: from 1 to 4"), (0, 10, "--order 0"), (3, 10, "2 tokens, fewer")])
def test_orders_of_no_use_are_refused(order, vocab, message):
    with pytest.raises(UserError, match=message):
        count_ngrams(np.array([1, 2]), order, vocab)
