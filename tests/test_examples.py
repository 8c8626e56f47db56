"""The case studies end to end, on a model of random weights: every step runs, and the page has what was told."""

import importlib
import json
import re

import pytest

from encoder_fixtures import tiny
from examples import encoder, nlg, qa
from examples.story import Story


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, which has PyTorch already; the server still in one of its own."""
    def run(self, module, *words, makes):
        assert makes.exists() or importlib.import_module(module).main([str(word) for word in words]) == 0
    monkeypatch.setattr(Story, "run", run)


def test_questions_are_learned_asked_and_corrected(here, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "qa.json").write_text(json.dumps({"data": [{"paragraphs": [
        {"context": f"Ann{n} has a cat.", "qas": [{"question": f"Who{n}?", "answers": [{"text": f"Ann{n}"}]}]} for n in range(30)]}]}))
    assert qa.main(["--model", str(tiny_checkpoint("smollm2")), "--data", str(tmp_path / "qa.json"), "-o", str(tmp_path / "out"), "--steps", "3",
                    "--batch", "2", "--judged", "4", "--aside", "3", "--context", "250"]) == 0
    page, said = (tmp_path / "out/report.html").read_text("utf-8"), capsys.readouterr().out
    for title in ("The answers", "Asked from Python and through the server", "What 3 corrections taught"):
        assert f"<h2>{title}</h2>" in page and title in said
    assert page.count('class="bar"') == 6 and not re.search(r"(src|href)=|@import|url\(", page)
    judged, learned = ({json.loads(line)["context"] for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()} for name in ("judge", "learn"))
    assert judged and not judged & learned
    sent = [json.loads(line)["messages"][-1] for line in (tmp_path / "out/feedback.jsonl").read_text().splitlines()]
    assert len(sent) == 3 and all(message["role"] == "assistant" and message["content"].startswith("Ann") for message in sent)
    rows = re.findall(r'data-name="Engine.solve"[^>]*>(.*?)</td><td data-name="server"[^>]*>(.*?)</td>', page)
    assert len(rows) == 3 and all(python == served for python, served in rows)
    assert nlg.main(["--data", str(tmp_path / "nothing")]) == 2


def test_an_encoder_learns_shrinks_and_is_timed(here, tmp_path, capsys):
    """The scores on the page are those of models.evaluate; what was made is not made again."""
    base, data, out = tiny(tmp_path / "bert", "feature-extraction"), tmp_path / "labels.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": f"{'abc'[n % 3]} {'de'[n % 2]}", "label": "xy"[n % 2]}) + "\n" for n in range(40)))
    argv = ["--model", str(base), "--classify", str(data), str(data), "--tasks", "classify", "-o", str(out), "--steps", "3", "--tokens", "8",
            "--rounds", "1", "--layers", "1"]
    assert encoder.main(argv) == 0
    page, said = (out / "report.html").read_text("utf-8"), capsys.readouterr().out
    for title in ("Score, size, time", "Sentiment: accuracy", "Sentiment: texts a second", "Asked from Python"):
        assert f"<h2>{title}</h2>" in page
    assert "Score, size, time" in said and page.count('class="bar"') == 10
    figures = [json.loads((out / f"classify-{number}.json").read_text()) for number in range(5)]
    assert re.findall(r'data-name="score"[^>]*>([0-9.]+)', page)[:5] == [f"{one['accuracy']:.4f}" for one in figures]
    assert [one["backend"] for one in figures] == ["pytorch", "onnxruntime portable", "onnxruntime fast", "pytorch", "onnxruntime fast"]
    rates = [one["figures"]["sentences_per_s"] for one in json.loads((out / "classify-speed.json").read_text())["systems"].values()]
    assert len(rates) == 5 and all(rate > 0 for rate in rates)
    weights = out / "classify-run/last/model.safetensors"
    written = weights.stat().st_mtime_ns
    assert encoder.main(argv) == 0 and weights.stat().st_mtime_ns == written
    for words, sentence in ((["--tasks", "poetry"], "--tasks poetry: unknown"), (["--classify", str(data)], "give two files")):
        assert encoder.main([*argv, *words]) == 2
        assert sentence in capsys.readouterr().err
