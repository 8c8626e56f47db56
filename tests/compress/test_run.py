"""`python -m compress.run`: stages in order, skipped and resumed, judged on text that no stage saw."""

import json

import pytest

from compress import run
from compress.text import split_text
from compress.ladder import ladder
from compress.quantizing.mixed import bundle_extras
from compress.recipe import Recipe, Stage
from models.formats import lineage
from models.checkpoint import open_checkpoint
from models.data.corpus import DataOptions
from models.evaluate import main as evaluate
from runtime.errors import UserError
from tiny import SENTENCES

RECIPE = """
[[stages]]
stage = "prune"
what = "depth"
layers = 1
order = "influence"
windows = 8
length = 32

[[stages]]
stage = "distill"
steps = 4
context = 32
batch = 2
eval_rows = 2
precision = "fp32"

[[stages]]
stage = "quantize"
method = "clip"
target_bpw = 6.0
windows = 8
length = 32
sensitivity_windows = 4
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(SENTENCES * 80), encoding="utf-8")
    return file


def test_the_last_tenth_of_every_file_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {n}" for n in range(1000)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(100)))
    (tmp_path / "c.txt").write_text("没有空格" * 500)
    options = DataOptions(data=tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.txt")))
    sides = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in split_text(options, tmp_path / "out")]
    learn, judge = sides
    assert learn[0].split("\n") + judge[0].strip().split("\n") == [f"line {n}" for n in range(1000)]
    assert len(judge[0]) == pytest.approx(0.1 * 8889, rel=0.02)
    documents = [text for text in learn + judge if text.startswith("document")]
    assert documents[:90] == [f"document {n}" for n in range(90)]
    assert "".join(part for part in judge if part.startswith("document ")).count("document 9") == 10
    assert [part for side in sides for part in side if "没" in part] == ["没有空格" * 450, "没有空格" * 50]
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(UserError, match="too little text"):
        split_text(DataOptions(data=(str(tmp_path / "d.txt"),)), tmp_path / "out2")


def test_a_recipe_runs_is_skipped_and_goes_on_after_an_interruption(tiny_checkpoint, text, tmp_path, capsys, monkeypatch):
    model, recipe, out, home = tiny_checkpoint("smollm2"), tmp_path / "r.toml", tmp_path / "out", tmp_path / "home"
    recipe.write_text(RECIPE)
    monkeypatch.setenv("HOME", str(home))                       # the teacher's cache
    arguments = [str(recipe), "--model", str(model), "--data", str(text), "-o", str(out), "--no-speed", "--eval-windows", "2",
                 "--cache", str(tmp_path / "cache")]
    # The second stage is killed in its midst: its run folder is there, nothing was saved.
    from models.training.trainer import Trainer
    monkeypatch.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run.main(arguments) == 130
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(home))
    capsys.readouterr()
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 prune: unchanged" in printed and "python -m compress.distill" in printed
    final = open_checkpoint(out / "model")
    assert len(final.config.layers) == 1 and final.quantization is not None
    assert [entry["stage"] for entry in lineage.read(out / "model")] == ["compress.prune", "compress.distill", "compress.quantize"]
    folders = {path.name.rsplit("-", 1)[0]: path for path in out.iterdir() if path.name[0] != "."}
    figures = json.loads((folders["3-quantize"] / "figures.json").read_text())
    assert figures["bytes"] == sum(final.nbytes(name) for name in final.names()) + bundle_extras(final)
    # The same figures from the command that judges, on the text that was held out.
    held_out = folders["0-text"] / "held-out.jsonl"
    assert evaluate([str(out / "model"), "--data", str(held_out), "--reference", str(model), "--window", "256", "--max-windows", "2",
                     "--json", str(tmp_path / "e.json")]) == 0
    judged = json.loads((tmp_path / "e.json").read_text())
    assert {name: figures[name] for name in ("perplexity", "kl", "top1_agreement")} == pytest.approx(
        {name: judged[name] for name in ("perplexity", "kl", "top1_agreement")}, rel=1e-5)
    # Once more: nothing runs. With a smaller target, the last stage alone.
    capsys.readouterr()
    before = (out / "model/model.safetensors").read_bytes()
    assert run.main(arguments) == 0 and "python -m" not in capsys.readouterr().out
    assert run.main([*arguments, "--target-size", "44kB"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("unchanged") == 2 and printed.count("python -m compress.quantize") == 1
    assert len((out / "model/model.safetensors").read_bytes()) < len(before)


def test_overrides_need_a_stage_and_options_need_values(tiny_checkpoint, text, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[stages]]\nstage = "prune"\nwhat = "depth"\nlayers = 1\n')
    arguments = [str(recipe), "--model", str(tiny_checkpoint("smollm2")), "--data", str(text), "-o", str(tmp_path / "out")]
    for more, words in ((["--target-size", "1MB"], "no stage that quantizes"), (["--eval-windows", "0"], "--eval-windows is 0")):
        assert run.main([*arguments, *more]) == 2 and words in capsys.readouterr().err
    assert run.main(arguments[:-2]) == 2 and "--out is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run.main(["--list"]) == 0 and "faithful" in capsys.readouterr().out


def test_the_ladder_says_what_was_not_measured():
    lines = ladder([("original", {"bytes": 538e6, "perplexity": 19.181, "kl": 0.0, "top1_agreement": 1.0,
                                  "decode_tokens_per_s": None}), ("1 prune", {"bytes": 9e6, "perplexity": 20.0})]).splitlines()
    assert lines[2].split() == ["original", "538.0", "19.18", "0.0000", "100.0%", "-"]
    assert lines[3].split() == ["1", "prune", "9.0", "20.00", "-", "-", "-"]
    each = {"texts": {"a/zh.txt": {"perplexity": 30.0}, "chat.jsonl": {"perplexity": 4.0, "kl": 0.1, "top1_agreement": 0.5}}}
    rows = [line.split() for line in ladder([("original", each), ("1 prune", {}), ("2 quantize", each)]).splitlines()]
    assert rows[-4:] == [["zh.txt", "original", "30.00", "-", "-"], ["zh.txt", "2", "quantize", "30.00", "-", "-"],
                         ["chat.jsonl", "original", "4.00", "0.1000", "50.0%"], ["chat.jsonl", "2", "quantize", "4.00", "0.1000", "50.0%"]]


def test_what_replaces_a_recipes_options_is_checked_with_the_others(tmp_path):
    """Before the first stage: those before quantizing may take hours."""
    recipe = Recipe("mine", "", (Stage("quantize", {"method": "autoround"}),))
    options = run.Options(recipe="mine", model=tmp_path, data=("text.txt",), out=tmp_path, backend="tensorrt")
    with pytest.raises(UserError, match=r"mine \(quantize\): --method autoround"):
        run.overridden(recipe, options)
