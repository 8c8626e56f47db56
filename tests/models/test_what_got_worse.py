"""The comparison of two models: its numbers, its table and its page."""

import json
import re
from pathlib import Path

import pytest

from models.judging import behaviour, texts

from models import what_got_worse
from models.judging.language_model import open_model

TEXT = "A small engine reads a sentence and answers in another. 然后 🙂\n" * 8


def test_behaviours():
    assert behaviour.refuses("I'm sorry, but I can't help with that.") and behaviour.refuses("抱歉，我不能")
    assert not behaviour.refuses("Paris is the capital. I am able to help.")
    assert behaviour.repeats("the cat sat down " * 5) and behaviour.repeats("我喜欢你。" * 6)
    assert not behaviour.repeats("The cat sat on the mat while the dog slept by the door and dreamt.")
    assert behaviour.valid_json('{"a": [1]}') and behaviour.valid_json('```json\n[1, 2]\n```')
    assert not any(behaviour.valid_json(t) for t in ("3", "{'a': 1}", '{"a": 1} done', "", "[" * 100_000))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "one.txt").write_text(TEXT, "utf-8")
    (tmp_path / "two <b>.txt").write_text(TEXT.upper(), "utf-8")
    (tmp_path / "p.json").write_text(json.dumps(
        [{"instruction": f"Say <i>{i}</i>", "input": "", "output": "The engine answers."} for i in range(5)]))
    (tmp_path / "c.tsv").write_text("".join(f"a sentence {i}\t{i % 2}\n" for i in range(12)))
    return tmp_path


def test_everything_is_measured_and_shown(files, tiny_checkpoint, capsys):
    before, after = tiny_checkpoint("smollm2"), tiny_checkpoint("smollm2", seed=1)
    assert what_got_worse.main([str(before), str(after), "--data", str(files / "one.txt"), str(files / "two <b>.txt"),
                                "--prompts", str(files / "p.json"), "--labelled", str(files / "c.tsv"), "--new-tokens", "8",
                                "--json", str(files / "out.json"), "--html", str(files / "out.html")]) == 0
    result = json.loads((files / "out.json").read_text())
    assert [d["domain"] for d in result["domains"]] == ["one.txt", "two <b>.txt"] and all(d["kl"] > 0 for d in result["domains"])
    losses = [p["loss"] for p in result["prompts"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    assert result["answers"]["flipped"] == len(result["answers"]["flips"])
    page = (files / "out.html").read_text("utf-8")
    assert "two &lt;b&gt;.txt" in page and "<b>" not in page and "<i>" not in page          # text of files stays text
    assert not re.search(r"(src|href)=|@import|url\(", page)                                  # nothing outside the page
    assert page.count('class="bar"') == 2 and page.count('class="columns"') == 1
    assert "Habits" in capsys.readouterr().out


def test_a_model_against_itself_lost_nothing(files, tiny_checkpoint):
    model = open_model(tiny_checkpoint("smollm2"), threads=1)
    row = what_got_worse.domain("one", texts.plain(model.tokenizer, TEXT), model, model, 2, None)
    assert abs(row["kl"]) < 1e-6 and row["perplexity_before"] == row["perplexity_after"]
    options = what_got_worse.Options(model.folder, model.folder, data=(Path("text"),))
    examples = what_got_worse.read_examples("classify", [files / "c.tsv"])
    assert what_got_worse.answers(examples, model, model, options)["flipped"] == 0


def test_nothing_to_compare_on(tiny_checkpoint, capsys):
    model = str(tiny_checkpoint("smollm2"))
    assert what_got_worse.main([model, model]) == 2
    assert "--data, --prompts or --labelled" in capsys.readouterr().err


def test_two_files_of_one_name_have_a_bar_each():
    domain = {"domain": "text.txt", "tokens": 8, "top1_agreement": 0.5, "perplexity_before": 2.0, "perplexity_after": 3.0,
              "worst_kl": 1.0, "worst_after": "so"}
    shown = what_got_worse.page({"before": "a", "after": "b", "domains": [
        domain | {"kl": kl, "kl_interval": [kl, kl]} for kl in (0.1, 0.4)]}, 8)
    assert re.findall(r'class="value" style="width:([0-9.]+)%', shown) == ["25.0", "100.0"]
