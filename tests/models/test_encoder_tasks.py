"""Encoders learn classify, pair, regress, ner and similarity: tiny random ones on tasks of letters, whose answers are known."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_fixtures import tiny

from models import encoder_bench, evaluate, finetune, get
from models.encoders.network import load, pooled_by, task_of
from models.encoders.rows import asked, cosent, in_batch, tags_of_words
from models.tasks.examples import Example
from runtime.encoder import TextEncoder
from runtime.text import Tokenizer

RECORDS = {
    "classify": lambda text, other, rng: {"text": text, "label": "with" if "a" in text else "without"},
    "pair": lambda text, other, rng: {"text": text, "text2": other, "label": "second" if other[0] == "a" else "other"},
    "regress": lambda text, other, rng: {"text": text, "score": text.count("a") / 2},
    "similarity": lambda text, other, rng: {"text": text, "text2": other, "score": 5.0 if text[0] == other[0] else 0.0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("base") / "bert", "feature-extraction")


def data(folder: Path, task: str, count: int = 400) -> Path:
    rng, file = random.Random(0), folder / f"{task}.jsonl"
    with open(file, "w") as out:
        for _ in range(count):
            text, other = (" ".join(rng.choice(letters) for _ in range(rng.randint(1, 3))) for letters in ("abcd", "abcd"))
            if task in ("pair", "similarity"):
                text, other = (rng.choice("ab") + "".join(rng.choices(" cdef", k=5)) for _ in "ab")
            out.write(json.dumps(RECORDS[task](text, other, rng)) + "\n")
    return file


def names(folder: Path, count: int = 300) -> Path:
    """CoNLL of letters, where p begins a name and q continues one."""
    rng = random.Random(1)
    with open(folder / "names.conll", "w") as out:
        for _ in range(count):
            for _ in range(rng.randint(2, 4)):
                out.write(rng.choice(["a\tO\n", "b\tO\n", "p\tB-P\n", "p\tB-P\nq\tI-P\n"]))
            out.write("\n")
    return folder / "names.conll"


def learn(base: Path, task: str, file: Path, out: Path, *more: str) -> dict:
    """The metrics of what it learned on what it learned from, by models.evaluate."""
    assert finetune.main([str(base), "--task", task, "--data", str(file), "-o", str(out), "--method", "full", "--steps", "150", "--batch", "32",
                          "--learning-rate", "3e-3", "--device", "cpu", *more]) == 0
    assert evaluate.main([str(out / "last"), "--task", task, "--data", str(file), "--json", str(out / "m.json")]) == 0
    return json.loads((out / "m.json").read_text())


def test_labels_and_lora(base, tmp_path):
    found = learn(base, "classify", data(tmp_path, "classify"), tmp_path / "out")
    assert found["accuracy"] > 0.97 and found["matthews"] > 0.9 and found["backend"] == "pytorch"
    model = load(tmp_path / "out" / "last", "text-classification")
    assert model.config.id2label == {0: "with", 1: "without"}
    assert [stage["stage"] for stage in json.loads((tmp_path / "out" / "last" / "lineage.json").read_text())["stages"]] == ["finetune"]
    lora = learn(base, "classify", data(tmp_path, "classify"), tmp_path / "lora", "--method", "lora", "--rank", "8")
    assert lora["accuracy"] > 0.9
    was, now = (load(folder, task).state_dict() for folder, task in ((base, "feature-extraction"), (tmp_path / "lora" / "last", "text-classification")))
    assert not any("lora" in name for name in now)
    assert torch.equal(was["embeddings.word_embeddings.weight"], now["bert.embeddings.word_embeddings.weight"])         # nothing but linears
    assert not torch.equal(was["encoder.layer.0.output.dense.weight"], now["bert.encoder.layer.0.output.dense.weight"])


def test_numbers_and_pairs(base, tmp_path):
    assert learn(base, "regress", data(tmp_path, "regress"), tmp_path / "regress")["pearson"] > 0.9
    assert learn(base, "pair", data(tmp_path, "pair"), tmp_path / "pair")["accuracy"] > 0.9


def test_similarity_is_what_sentence_transformers_opens(base, tmp_path):
    found = learn(base, "similarity", data(tmp_path, "similarity"), tmp_path / "out")
    assert found["spearman"] > 0.8
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from models.encoders.evaluate import opened
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out" / "last"), device="cpu").encode(["a b", "c"])
    np.testing.assert_allclose(opened(tmp_path / "out" / "last").embed(["a b", "c"]), theirs, atol=1e-5)


def test_entities(base, tmp_path):
    found = learn(base, "ner", names(tmp_path), tmp_path / "out")
    assert found["entity_f1"] > 0.95
    config = json.loads((tmp_path / "out" / "last" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["O", "B-P", "I-P"]


def test_every_word_has_its_tag(base):
    words, tags = ["@ab", "it's", "in", "pqr"], ["B-X", "O", "O", "B-Y"]
    one = Example({"text": " ".join(words), "tokens": words, "tags": tags}, ("",))
    encode = TextEncoder(Tokenizer(base / "tokenizer.json"), 64)
    encoded = encode(asked(one))
    spelled = [one.fields["text"][a:b] for a, b in encoded.offsets.tolist()]
    assert [(spelled[token], tag) for token, tag in tags_of_words(one, encoded.offsets, 1)] == [
        ("@", "B-X"), ("a", "I-X"), ("i", "O"), ("'", "O"), ("s", "O"), ("i", "O"), ("p", "B-Y")]


def test_losses_are_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.losses")
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
    scores = torch.tensor([5.0, 1.0, 3.0, 3.0, 0.0, 2.5, 4.0])
    module = torch.nn.Identity()
    want = losses.CoSENTLoss(module).compute_loss_from_embeddings([a, b], scores)
    torch.testing.assert_close(cosent((a * b).sum(1), scores), want)
    torch.testing.assert_close(in_batch(a, b), losses.MultipleNegativesRankingLoss(module).compute_loss_from_embeddings([a, b], None))


def test_bad_input(base, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "x"}\n' * 20)
    file, bad = data(tmp_path, "classify", 40), tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "label": "with"}\n{"text": "a", "label": "never"}\n')
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": "a", "label": "with"}\n{"label": "with"}\n')
    conll = tmp_path / "bad.conll"
    conll.write_text("a\tO\np\tI-P\n\n")
    latin = tmp_path / "latin.tsv"
    latin.write_bytes("caf\xe9\t1\n".encode("latin-1"))
    for argv, sentence in (
            (["--task", "classify", "--data", one], "every example has the label x, so there is nothing to tell apart"),
            (["--task", "classify", "--data", file, "--valid", bad], "bad.jsonl:2: label 'never' was never seen; known are with, without"),
            (["--task", "classify", "--data", blank], "blank.jsonl:2: no text and label"),
            (["--task", "classify", "--data", latin], "latin.tsv:1: not UTF-8"),
            (["--task", "ner", "--data", conll], "tags must be BIO"),
            (["--task", "chat", "--data", file], "is an encoder, which writes no text"),
            (["--task", "classify", "--data", file, "--keep-adapter"], "--keep-adapter is for decoders"),
            (["--task", "classify", "--data", file, "--augment", "noise"], "--augment is for decoders"),
            (["--task", "classify", "--data", file, "--class-weights", "balanced"], "--class-weights is for decoders"),
            (["--task", "classify", "--data", file, "--context", "65"], "the model's positions are 64")):
        assert finetune.main([str(base), "-o", str(tmp_path / "o"), "--device", "cpu", *map(str, argv)]) == 2
        assert sentence in capsys.readouterr().err, argv
    assert not (tmp_path / "o" / "last").exists()
    for argv, sentence in (([tmp_path], "is no encoder's bundle or checkpoint"), ([base, "--json", tmp_path / "no/f.json"], "no such folder"),
                           ([base, "--prompt-tokens", "65"], "takes 64; give at most as many")):
        assert encoder_bench.main(list(map(str, argv))) == 2
        assert sentence in capsys.readouterr().err, argv
    assert evaluate.main([str(base), "--task", "qa", "--data", str(file)]) == 2
    assert "is an encoder, which writes no text" in capsys.readouterr().err
    for words in (["--examples", "x.jsonl"], ["--n", "2", "--temperature", "1"], ["--graph", "fast"], ["--max-windows", "3"], ["--shots", "1"]):
        assert evaluate.main([str(base), "--task", "classify", "--data", str(file), *words]) == 2
        assert f"{words[0]} is for models that write text" in capsys.readouterr().err


def test_models_get_brings_an_encoder_with_its_pooling(base, tmp_path, monkeypatch, capsys):
    """From a folder and, of the hub's files, with what says how a sentence's embedding is made."""
    source = tmp_path / "cls"
    shutil.copytree(base, source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]')
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: fetched.append(how["allow_patterns"]) or str(source))
    for number, name in enumerate((str(source), "owner/cls")):
        out = tmp_path / f"out{number}"
        assert get.main([name, "-o", str(out)]) == 0
        assert task_of(out) == "sentence-similarity" and pooled_by(out) == "cls"
        was, now = (load(folder, "sentence-similarity").state_dict() for folder in (base, out))
        assert all(torch.equal(was[key], now[key]) for key in was)
        assert [stage["stage"] for stage in json.loads((out / "lineage.json").read_text())["stages"]] == ["models.get"]
    assert fetched == [get.HUB_FILES, ["1_Pooling/config.json"]]
    shutil.rmtree(source / "1_Pooling")
    for argv, sentence in (([source], "names a pooling"), ([base, "--off-grid"], "--off-grid is for decoders")):
        assert get.main([*map(str, argv), "-o", str(tmp_path / "bad")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
