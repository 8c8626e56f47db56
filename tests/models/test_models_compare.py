"""`python -m models.compare`: its table against models.evaluate and by hand, its resuming, and what it refuses."""

import json
import math
import random

import numpy as np
import pytest
from tiny import write_stranger

from models.compare import held_out, main
from models.data.corpus import Corpus
from models.ngram import load_ngram
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.text import Tokenizer

WORDS = "the king of rivers and mountains sees a ship that sails to an island of gold where no one lives".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, chance = tmp_path_factory.mktemp("compared"), random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(200)))
    assert main(arguments(folder)) == 0
    return folder, json.loads((folder / "out/comparison.json").read_text())["models"]


def arguments(folder, *more):
    return ["--data", str(folder / "text.txt"), "-o", str(folder / "out"), "--vocab-size", "300", "--preset", "100k", "--steps", "2", "--batch",
            "2", "--context", "16", "--cache", str(folder / "cache"), "--valid-share", "0.2", "--threads", "1", "--windows", "9", *more]


def test_every_model_is_judged_on_the_same_unseen_text(made, capsys):
    folder, found = made
    assert [one["model"] for one in found] == ["n-grams", "GRU", "LSTM", "transformer"]
    assert [one["run_by"] for one in found] == ["ngram", "onnxruntime-cpu", "onnxruntime-cpu", "native"]
    assert {one["tokens"] for one in found} == {72} and all(one["tokens_per_s"] > 0 for one in found)
    for one, name in zip(found[1:], ("gru", "lstm", "decoder")):
        bundle = open_bundle(folder / "out" / name / "bundle", verify=True)
        assert one["bytes"] == sum(file.stat().st_size for file in bundle.folder.iterdir() if file.name != "manifest.json")
    page = (folder / "out/comparison.html").read_text()
    assert all(one["model"] in page and f"{one['bits_per_byte']:.3f}" in page for one in found) and "http" not in page


def test_the_ngrams_figures_are_those_of_their_probabilities(made):
    folder, (ngrams, *_) = made
    model, tokenizer = load_ngram(folder / "out/ngram"), Tokenizer(folder / "out/tokenizer/tokenizer.json")
    valid, = (path for path in (folder / "cache").iterdir() if (path / "corpus.json").is_file()
              and (json.loads((path / "corpus.json").read_text())["key"]["split"] or {}).get("part") == "valid")
    tokens = np.fromfile(valid / "tokens.bin", np.uint16).astype(int).tolist()
    nll, right, count, size = 0.0, 0, 0, 0
    for start in range(0, 72, 8):
        window = tokens[start:start + 16]
        for i in range(8, 16):
            grams = np.array([[*window[max(0, i - 3):i], token] for token in range(model.vocab_size)])
            p = model.probability(grams)
            nll, right, count = nll - math.log(p[window[i]]), right + (p.argmax() == window[i]), count + 1
        size += len(tokenizer.decode(window).encode()) - len(tokenizer.decode(window[:8]).encode())
    assert ngrams["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5) and ngrams["token_accuracy"] == right / count
    assert ngrams["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_it_goes_on_where_it_was_and_not_with_other_options(made, capsys):
    folder, found = made
    assert main(arguments(folder, "--models", "ngram", "gru")) == 0
    again = json.loads((folder / "out/comparison.json").read_text())["models"]
    assert [one["bits_per_byte"] for one in again] == [one["bits_per_byte"] for one in found[:2]]
    assert main(arguments(folder, "--models", "ngram", "--windows", "1")) == 0
    assert "nan" not in capsys.readouterr().out + (folder / "out/comparison.html").read_text()       # one window has no interval
    stranger = write_stranger(folder / "out/tokenizer", folder / "stranger")
    capsys.readouterr()
    for more, words in ((("--tokenizer", str(stranger)), "the contents of tokenizer changed"), (("--batch", "3"), "batch was 2 and is 3"),
                        (("--models", "rnn"), "--models rnn: choose from ngram, gru, lstm, decoder"), (("-o", str(folder)), "is not of a comparison"),
                        (("--tokenizer", str(folder)), "no tokenizer.json there")):
        assert main(arguments(folder, "--models", "gru", *more)) == 2, more
        assert words in capsys.readouterr().err


def test_too_little_held_out_text_is_refused(tmp_path):
    corpus = Corpus(tmp_path, np.arange(7), np.array([0]), 7, 0)
    with pytest.raises(UserError, match="7 tokens are held out, fewer than --context 8"):
        held_out(corpus, None, 8, 3)
