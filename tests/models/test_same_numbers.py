"""A bundle and the checkpoint it was made of get the same metrics for the same codes, from the command line.

The portable graph in exact arithmetic within 0.1%, the fast graph (int8 activations) within 0.5% of perplexity. Its KL
from a reference is not held to 0.5% of itself, because rounding activations moves it by an amount of its own: by less
than 0.01 nats.
"""

import json

import pytest

from compress import quantize
from export import onnx as export_onnx
from export import ort
from models import evaluate

TEXT = "A small engine reads a sentence and answers in another. 然后 🙂\n" * 12
PORTABLE, FAST = ("--graph", "portable", "--exact"), ("--graph", "fast")


def bundled(checkpoint, bundle):
    """The bundle of an int4 checkpoint."""
    assert export_onnx.main([str(checkpoint), "-o", str(bundle)]) == 0 == ort.main([str(bundle)])
    return bundle


def metrics(folder, out, *options) -> dict:
    assert evaluate.main([str(folder), "--json", str(out), "--threads", "1", *map(str, options)]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def world(tiny_checkpoint, tmp_path_factory):
    """(the original, its int4 checkpoint, the bundle of that, a folder with data)."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    (folder / "c.tsv").write_text("".join(f"the {word} answer {i}\t{i % 2}\n" for i, word in enumerate("small fine good".split() * 8)))
    (folder / "qa.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "The capital of Italy is Rome.", "qas": [
        {"question": f"What is {i}?", "answers": [{"text": "Rome"}]} for i in range(5)]}]}]}))
    source = tiny_checkpoint("smollm2")
    assert quantize.main([str(source), "-o", str(folder / "int4"), "--bits", "4", "--group", "32"]) == 0
    return source, folder / "int4", bundled(folder / "int4", folder / "bundle"), folder


def compare(world, tmp_path, *task):
    source, checkpoint, bundle, folder = world
    return [metrics(which, tmp_path / "out.json", *task, *how)
            for which, how in ((checkpoint, ()), (bundle, PORTABLE), (bundle, FAST))]


def test_perplexity_and_kl(world, tmp_path):
    torch, portable, fast = compare(world, tmp_path, "--task", "kl", "--data", world[3] / "text.txt", "--reference", world[0],
                                    "--window", 64)
    assert torch["kl"] > 1e-3                                          # there is something to agree on
    for name in ("perplexity", "bits_per_byte", "kl", "top1_agreement"):
        assert portable[name] == pytest.approx(torch[name], rel=1e-3)
        assert portable[f"{name}_interval"] == pytest.approx(torch[f"{name}_interval"], rel=1e-3)
    assert fast["perplexity"] == pytest.approx(torch["perplexity"], rel=5e-3)
    assert fast["kl"] == pytest.approx(torch["kl"], abs=0.01)


@pytest.mark.parametrize("task, file, names", [("classify", "c.tsv", ("accuracy", "precision", "recall", "macro_f1")),
                                               ("qa", "qa.json", ("exact_match", "f1", "rougeL"))])
def test_labelled_tasks_give_the_same_answers(world, tmp_path, task, file, names):
    rows = tmp_path / "rows.jsonl"
    answers = []
    for which, how in ((world[1], ()), (world[2], PORTABLE)):
        result = metrics(which, tmp_path / "out.json", "--task", task, "--data", world[3] / file, "--limit", 12, "--shots", 1,
                         "--examples", rows, *how)
        answers.append((rows.read_text("utf-8"), {name: result[name] for name in names}))
    assert answers[0] == answers[1]


@pytest.mark.real
def test_smollm2(smollm2_int4, shared_data, tmp_path):
    checkpoint, bundle = smollm2_int4, bundled(smollm2_int4, tmp_path / "bundle")
    text = ["--data", shared_data / "text" / "wikitext2-valid.txt", "--window", 256, "--max-windows", 2]
    torch, portable, fast = (metrics(which, tmp_path / "out.json", *text, *how)
                             for which, how in ((checkpoint, ()), (bundle, PORTABLE), (bundle, FAST)))
    assert portable["perplexity"] == pytest.approx(torch["perplexity"], rel=1e-3)
    assert fast["perplexity"] == pytest.approx(torch["perplexity"], rel=5e-3)
