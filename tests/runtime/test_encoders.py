"""`runtime.Encoder`: labels, entities and pairs of tiny random models, against transformers; folders that it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from seqeval.metrics.sequence_labeling import f1_score, get_entities

from export import onnx as export_onnx
from models.judging import metrics
from runtime import Encoder, Engine, UserError
from runtime.entities import Entity, entities, spans, word_starts
from encoder_fixtures import HEADS, tiny

TEXTS = ["abc de f", "x", "the quick brown fox jumps over a lazy dog", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The bundle of each task, beside its model."""
    root, found = tmp_path_factory.mktemp("encoders"), {}
    for task in ("text-classification", "token-classification"):
        model = tiny(root / f"{task}-model", task)
        assert export_onnx.main([str(model), "-o", str(root / task)]) == 0
        found[task] = root / task
    return found


def logits(folder: Path, task: str, **given) -> np.ndarray:
    model = getattr(transformers, HEADS[task]).from_pretrained(folder.parent / f"{task}-model").eval()
    with torch.no_grad():
        return model(**{name: torch.tensor([ids]) for name, ids in given.items()}).logits[0].numpy()


def fast(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def test_labels_of_texts_and_pairs_are_transformers(folders):
    folder, task = folders["text-classification"], "text-classification"
    given = [*TEXTS, ("ab", "cd e"), ("the quick fox", "x")]
    with Encoder(folder, threads=1) as encoder:
        found = encoder.classify(given)
        assert encoder.truncated == 0
    for text, label in zip(given, found):
        tokens = fast(folder)(*([text] if isinstance(text, str) else text), return_token_type_ids=True)
        want = torch.softmax(torch.tensor(logits(folder, task, **tokens)), 0).numpy()
        np.testing.assert_allclose(list(label.scores.values()), want, atol=1e-5)
        assert label.label == f"LABEL_{want.argmax()}" and label.score == max(label.scores.values())


def test_long_texts_are_cut_and_counted(folders):
    folder = folders["text-classification"]
    with Encoder(folder, threads=1) as encoder:
        long, pair = "a " * 100, ("b " * 70, "c " * 3)
        cut = encoder.classify([long, "a " * 62, pair, ("b " * 58, "c " * 3)])      # of 64 tokens, 2 or 3 stand around
        assert encoder.truncated == 2 and cut[0] == cut[1] and cut[2] == cut[3]


def test_windows_agree_with_one_pass_where_they_are_whole(folders):
    """A text of one window is judged alike with a stride; every word of a longer one is judged in the window that holds it deepest."""
    folder, task = folders["token-classification"], "token-classification"
    labels = ["B-PER", "O", "I-PER"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["labels"] = labels
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Encoder(folder, threads=1) as encoder:
        text = "the quick brown fox jumps"
        assert encoder.entities([text], stride=8) == encoder.entities([text])
        tokens = fast(folder)(text, return_offsets_mapping=True)
        places = tokens.pop("offset_mapping")
        best = logits(folder, task, **tokens).argmax(1)[1:-1]
        first = word_starts(text, places[1:-1])
        assert [text[places[1:-1][n][0]] for n in first] == list("tqbfj")
        want = [(kind, first[a]) for kind, a, _ in spans([labels[best[n]] for n in first])]
        assert [(found.label, found.start) for found in encoder.entities([text])[0]] == [
            (kind, places[1:-1][token][0]) for kind, token in want]
        long = " ".join("abcdefghij"[n % 10] for n in range(150))
        with_windows, cut = encoder.entities([long], stride=16)[0], encoder.entities([long])[0]
        assert encoder.truncated == 1 and max(found.end for found in cut) < 2 * 62
        assert [long[found.start:found.end] for found in with_windows] == [found.text for found in with_windows]
        ids = fast(folder)(long, add_special_tokens=False)["input_ids"]
        judged, depth = [None] * len(ids), [-1] * len(ids)
        for start in range(0, len(ids) - 16, 62 - 16):                              # windows, by hand
            part = ids[start:start + 62]
            rows = logits(folder, task, input_ids=[2, *part, 3]).argmax(1)[1:-1]
            for n, row in enumerate(rows):
                left, right = n if start else 10**6, len(part) - 1 - n if start + len(part) < len(ids) else 10**6
                if min(left, right) > depth[start + n]:
                    judged[start + n], depth[start + n] = labels[row], min(left, right)
        assert [(found.label, found.start) for found in with_windows] == [(kind, 2 * a) for kind, a, _ in spans(judged)]
        with pytest.raises(UserError, match="stride is 62"):
            encoder.entities([text], stride=62)


def test_spans_are_seqevals():
    rng, tags = np.random.default_rng(0), ["O", "B-A", "I-A", "B-B", "I-B"]
    right, found = [[list(rng.choice(tags, size=12)) for _ in range(300)] for _ in range(2)]
    assert all([(kind, a, b - 1) for kind, a, b in spans(row)] == get_entities(row) for row in right + found)
    assert metrics.entities([spans(row) for row in found], [spans(row) for row in right])["f1"] == pytest.approx(f1_score(right, found))


@pytest.mark.parametrize("tags, want", [
    ("O B-A I-A O", [("A", 1, 3)]), ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]), ("I-A I-A O I-B", [("A", 0, 2), ("B", 3, 4)]),
    ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]), ("O O", [])])
def test_spans(tags, want):
    assert spans(tags.split()) == want


def test_offsets_are_characters():
    text = "Ada Lovelace, née Byron, lived in 倫敦."
    offsets = [(0, 3), (4, 8), (8, 12), (12, 13), (14, 17), (18, 23), (23, 24), (25, 30), (31, 33), (34, 35), (35, 36), (36, 37)]
    first = word_starts(text, offsets)
    assert [text[offsets[n][0]:offsets[n][1]] for n in first] == ["Ada", "Love", ",", "née", "Byron", ",", "lived", "in", "倫", "."]
    ends = [*first[1:], len(offsets)]
    found = entities(text, [(offsets[a][0], offsets[b - 1][1]) for a, b in zip(first, ends)],
                     ["B-PER", "I-PER", "O", "O", "B-PER", "O", "O", "O", "B-LOC", "O"], [1.0] * 10)
    assert found == [Entity("PER", 0, 12, "Ada Lovelace", 1.0), Entity("PER", 18, 23, "Byron", 1.0), Entity("LOC", 34, 36, "倫敦", 1.0)]


def test_what_is_no_encoder(folders, served_bundle, tmp_path):
    folder = folders["text-classification"]
    with pytest.raises(UserError, match="is an encoder's bundle, which generates no text: open it with runtime.Encoder"):
        Engine(folder)
    with pytest.raises(UserError, match="is a decoder's bundle, which gives no embeddings, labels or entities: open it with runtime.Engine"):
        Encoder(served_bundle)
    with Encoder(folder, threads=1) as encoder:
        for ask, why in ((encoder.embed, "is a model for text-classification and gives no embeddings"), (encoder.entities, "gives no entities"),
                         (encoder.regress, "gives no numbers")):
            with pytest.raises(UserError, match=why):
                ask(["a"])
        for texts, why in (("a text", "give a list of texts"), ([3], "each must be a text"), (["\ud800"], "lone surrogate")):
            with pytest.raises(UserError, match=why):
                encoder.classify(texts)
    with pytest.raises(UserError, match="was closed"):
        encoder.classify(["a"])
    with pytest.raises(UserError, match="it has portable"):
        Encoder(folder, role="fast", provider="cpu")
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    (old / "manifest.json").unlink()
    with pytest.raises(UserError, match="of an older version, without a manifest.json; export the model again"):
        Encoder(old)


@pytest.mark.parametrize("change, why", [
    ({"labels": None}, "labels are missing"), ({"labels": ["a", "a", "b"]}, "labels are"), ({"task": "poetry"}, "task is 'poetry'"),
    ({"version": 2}, "version 2"), ({"graphs": []}, "the graphs' roles"), ({"graphs": [{"role": "portable", "file": "../x"}]}, "not among its files"),
    ({"model": {"model_type": "bert", "vocab_size": 9, "max_tokens": 2, "pad_token_id": 0}}, "max_tokens is at least 4"),
    ({"files": {"../x": {"bytes": 1, "sha256": ""}, "tokenizer.json": {"bytes": 1, "sha256": ""}, "model.onnx": {"bytes": 1, "sha256": ""}}, "golden": None},
     "leaves the bundle's folder"), ({"task": "sentence-similarity", "labels": None}, "and not sentence_embedding")])
def test_damaged_manifests(folders, tmp_path, change, why):
    folder = Path(shutil.copytree(folders["text-classification"], tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=why):
        Encoder(folder, provider="cpu")


def test_verify_and_bench(folders, tmp_path, capsys):
    from runtime import bench, verify
    folder = Path(shutil.copytree(folders["text-classification"], tmp_path / "bundle"))
    assert verify.main([str(folder), "--threads", "1"]) == 0 and "portable: 1 - cosine" in capsys.readouterr().out
    assert bench.main([str(folder), "--prompt-tokens", "16", "--repeat", "1", "--threads", "1", "--json", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["sentences_per_s"] > 0
    assert bench.main([str(folder), "--prompt-tokens", "100"]) == 2 and "takes 64" in capsys.readouterr().err
    golden = json.loads((folder / "golden.json").read_text())
    golden["outputs"][0] = [number + 1 for number in reversed(golden["outputs"][0])]
    data = json.dumps(golden).encode()
    (folder / "golden.json").write_bytes(data)
    assert verify.main([str(folder)]) != 0 and "golden.json" in capsys.readouterr().err               # its size or its hash
    manifest = json.loads((folder / "manifest.json").read_text())
    import hashlib
    manifest["files"]["golden.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify.main([str(folder)]) == 1 and "against a budget" in capsys.readouterr().err
