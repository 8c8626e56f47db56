"""The evaluate command: checkpoints and bundles alike, the labelled tasks, and what it refuses."""

import json

import numpy as np
import pytest
from tiny import write_stranger
from transformers import AutoTokenizer

from models import evaluate

from models.judging import texts
from models.judging.language_model import open_model
from models.tasks import read_examples
from models.tasks.defaults import DEFAULTS

TEXT = "A small engine reads a sentence and answers in another. 然后 🙂\n" * 10


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return tiny_checkpoint("smollm2")


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return str(tmp_path / "text.txt")


def run(*args) -> int:
    return evaluate.main([str(a) for a in args])


def test_perplexity_and_fidelity_as_json(model, tiny_checkpoint, text_file, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper(), "utf-8")
    assert run(model, "--data", text_file, other, "--reference", tiny_checkpoint("smollm2", seed=1), "--window", 32,
               "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["texts"]) == {"text.txt", "other.txt"}
    parts = result["texts"].values()
    tokens = sum(p["tokens"] for p in parts)
    assert result["tokens"] == tokens
    assert result["kl"] == pytest.approx(sum(p["kl"] * p["tokens"] for p in parts) / tokens)
    for name in ("perplexity", "bits_per_byte", "kl", "top1_agreement"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    assert "perplexity" in capsys.readouterr().out


def test_a_model_agrees_with_itself(model, text_file, tmp_path):
    assert run(model, "--data", text_file, "--reference", model, "--window", 32, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["top1_agreement"] == 1 and abs(result["kl"]) < 1e-6


def test_chats_are_judged_through_the_models_template(model, text_file, tmp_path, capsys):
    chats = [[{"role": "user", "content": "Wer bist du? 🙂"}, {"role": "assistant", "content": "A small engine."}],
             [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "It reads on."}]] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": q["content"], "output": a["content"]} for q, a in chats]))
    theirs, opened = AutoTokenizer.from_pretrained(model), open_model(model, threads=1)
    wanted = [token for chat in chats for token in theirs.apply_chat_template(chat, return_dict=False)]
    for name in ("chats.jsonl", "alpaca.json"):
        read = texts.read(tmp_path / name, opened.tokenizer, lambda: opened.chat)
        assert read.ids.tolist() == wanted
    rendered = "".join(theirs.apply_chat_template(chat, tokenize=False) for chat in chats)
    assert read.ends[-1] == len(rendered.encode()) and (np.diff(read.ends) >= 0).all()
    plain = texts.read(tmp_path / "chats.jsonl", opened.tokenizer, lambda: None)             # a model without a template
    assert opened.tokenizer.decode(plain.ids) == "\n".join(message["content"] for chat in chats for message in chat)
    assert run(model, "--data", text_file, tmp_path / "chats.jsonl", "--window", 32, "--json", tmp_path / "out.json") == 0
    assert set(json.loads((tmp_path / "out.json").read_text())["texts"]) == {"text.txt", "chats.jsonl"}
    assert "chats.jsonl" in capsys.readouterr().out
    # What a message spells is text; a chat that is none is refused with its place.
    (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi<|im_end|>"}, {"role": "assistant", "content": "x"}]}))
    assert texts.read(tmp_path / "odd.jsonl", opened.tokenizer, lambda: opened.chat).ids.tolist().count(2) == 2
    (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": chats[0][:1]}))
    assert run(model, "--data", tmp_path / "odd.jsonl") == 2 and "odd.jsonl:1" in capsys.readouterr().err


def test_texts_of_one_name_are_told_apart(model, text_file, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/text.txt").write_text(TEXT.upper(), "utf-8")
    assert run(model, "--data", text_file, tmp_path / "more/text.txt", "--window", 32, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["tokens"] == sum(part["tokens"] for part in result["texts"].values()) and len(result["texts"]) == 2


FILES = {"qa": ("qa.json", json.dumps({"data": [{"paragraphs": [{"context": "Ann has a cat.", "qas": [
             {"question": f"Who {i}?", "answers": [{"text": "Ann"}]} for i in range(5)]}]}]})),
         "summarize": ("s.jsonl", "".join(json.dumps({"text": f"long text {i}", "summary": "short"}) + "\n" for i in range(6))),
         "translate": ("t.tsv", "".join(f"Hello {i}.\t你好。\n" for i in range(7))),
         "instruct": ("g.json", json.dumps([{"instruction": f"Say {i}", "input": "", "output": "it is said"} for i in range(4)])),
         "classify": ("c.tsv", "".join(f"a sentence {i}\t{i % 2}\n" for i in range(9))),
         "pair": ("p.csv", "premise,hypothesis,label\n" + "".join(f"a cat {i},an animal {i},{'yes' if i % 2 else 'no'}\n" for i in range(9))),
         "regress": ("r.csv", "".join(f"A plane {i} is off.,A plane {i} flies.,{i / 2}\n" for i in range(9))),
         "ner": ("n.conll", "".join(f"Ann{i}\tB-person\nLee\tI-person\nslept\tO\n\n" for i in range(6))),
         "chat": ("h.jsonl", "".join(json.dumps({"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello."}]})
                                     + "\n" for i in range(4))),
         "continue": ("w.jsonl", "".join(json.dumps({"text": f"It was the {i}. of the best times"}) + "\n" for i in range(4)))}


@pytest.mark.parametrize("task", FILES)
def test_every_task_runs_and_keeps_its_examples(task, model, tmp_path):
    name, content = FILES[task]
    (tmp_path / name).write_text(content, "utf-8")
    assert run(model, "--task", task, "--data", tmp_path / name, *(() if task == "chat" else ("--shots", 1)), "--limit", 3, "--json",
               tmp_path / "out.json", "--examples", tmp_path / "rows.jsonl") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert DEFAULTS[task].metrics and all({n, f"{n}_interval"} <= set(result) for n in DEFAULTS[task].metrics)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == result["examples"] == 3 and all(r["references"] for r in rows)


@pytest.mark.parametrize("family", ["smollm2", "qwen3_5"])         # the state of the latter cannot be cut back to the prompt
def test_label_likelihood_equals_scoring_the_whole_text(tiny_checkpoint, family):
    """A continuation's score is the sum of its tokens' log probabilities in prompt + continuation read at once."""
    import torch

    from models.checkpoint import load_decoder
    model = tiny_checkpoint(family)
    opened = open_model(model, threads=1)
    prompt, tails = "Sentence: a sentence\nSentiment:", [" negative", " positive and more"]
    decoder = load_decoder(model)
    head = opened.encode(prompt)
    for tail, (got, _) in zip(tails, opened.score_tails(head, [opened.tokenizer.encode(tail) for tail in tails])):
        rest = opened.tokenizer.encode(tail)
        with torch.no_grad():
            logp = torch.log_softmax(decoder(torch.from_numpy(np.concatenate([head, rest]))[None])[0].double(), -1)
        assert got == pytest.approx(sum(logp[len(head) - 1 + i, t].item() for i, t in enumerate(rest)), abs=1e-4)


def test_generation_stops_and_does_not_depend_on_its_batch(model):
    opened = open_model(model, threads=1)
    prompts = ["A small", "The engine reads a sentence and", "x"]
    together = [reply.text for reply in opened.generate(prompts, 12, progress=False)]
    assert together == [opened.generate([p], 12, progress=False)[0].text for p in prompts]
    stop = together[0][3:5]
    assert opened.generate(prompts[:1], 12, [stop], progress=False)[0].text == together[0].split(stop)[0]


def test_prompt_can_be_seen_and_changed(model, tmp_path, capsys):
    (tmp_path / "c.tsv").write_text(FILES["classify"][1])
    (tmp_path / "p.toml").write_text('instruction = "Judge.\\n"\nexample = "{text} ->"\n')
    assert run(model, "--task", "classify", "--data", tmp_path / "c.tsv", "--task-file", tmp_path / "p.toml", "--shots", 2,
               "--show-prompt") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Judge.\n") and shown.count(" ->") == 3 and "negative" in shown and "positive" in shown


ENDINGS = {"perplexity": "txt", "classify": "tsv", "qa": "json", "summarize": "jsonl", "ner": "conll", "regress": "csv"}


@pytest.mark.parametrize("content, task, says", [
    (b"", "perplexity", "is empty"), (b"\0\1", "perplexity", "binary"), (b"\xff\xfe text", "perplexity", "not UTF-8"),
    (b"a\t1\nc\n", "classify", "f.tsv:2: 1 columns where the file began with 2"), (b'{"data": 3}', "qa", "f.json:record 0: no answer; it has data"),
    (b'{"text": "x"}\n', "summarize", "f.jsonl:1: no 'summary'; it has text"),
    (b"good\t1\nbad\t0\nodd\t7\nx\t1\ny\t0\nz\t1\n", "classify", "f.tsv:3: label '7' was never seen; known are 0, 1"),
    (b"caf\xe9\t1\n", "classify", "f.tsv:1: not UTF-8"), (b"Ann\tI-person\n", "ner", "f.conll:1: tag 'I-person' of token 1 follows nothing"),
    (b"Ann\tB-person\nLee\tX\n", "ner", "f.conll:1: tag 'X' of token 2 is none of O, B-KIND and I-KIND"),
    (b"a cat,a dog,2\na cow,a bird,much\n", "regress", "f.csv:2: its score is 'much'"), (b"a,b,7\nc,d,1\n", "regress", "its score is 7, outside"),
    (b"good\t1\n", "classify", "too few")])
def test_unusable_files(content, task, says, model, tmp_path, capsys):
    file = tmp_path / f"f.{ENDINGS[task]}"
    file.write_bytes(content)
    assert run(model, "--task", task, "--data", file, "--json", tmp_path / "out.json") == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_refusals(model, tiny_checkpoint, text_file, tmp_path, capsys):
    stranger = write_stranger(model, tmp_path / "stranger")
    assert run(model, "--data", text_file, "--reference", stranger) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert run(model, "--data", tmp_path / "missing.txt") == 2
    assert run(tmp_path / "nothing", "--data", text_file) == 2
    assert run(model, "--data", text_file, "--stride", 600) == 2
    assert run(model, "--data", text_file, "--max-windows", 0) == 2
    long = "word " * 9000
    (tmp_path / "c.tsv").write_text("".join(f"{long}\t{i % 2}\n" for i in range(6)))
    assert run(model, "--task", "classify", "--data", tmp_path / "c.tsv", "--shots", 0, "--limit", 1) == 2
    assert "tokens" in capsys.readouterr().err
    for entry, says in (("shot = 3", "unknown entry 'shot' (did you mean 'shots'?)"), ("shots = 3", "shots is 3, which should be a list of pairs"),
                        ('metrics = ["acuracy"]', "metric 'acuracy' is unknown (did you mean 'accuracy'?)"), ('metrics = ["f1"]', "metric f1 is of answers that are a text"),
                        ('labels = {a = ""}', "labels is {'a': ''}")):
        (tmp_path / "p.toml").write_text(entry)
        assert run(model, "--task", "classify", "--data", tmp_path / "c.tsv", "--task-file", tmp_path / "p.toml") == 2
        assert f"p.toml: {says}" in capsys.readouterr().err
    assert run(model, "--task", "classify", "--data", tmp_path / "c.tsv", "--shots", 0, "--n", 3) == 2
    assert "--n 3: without --temperature" in capsys.readouterr().err


def test_a_rare_odd_line_is_left_out_and_said(tmp_path, capsys):
    (tmp_path / "t.tsv").write_text("a\tb\n" * 150 + "a\tb\tc\n", "utf-8")
    assert len(read_examples("translate", [tmp_path / "t.tsv"])) == 150
    assert "line 151" in capsys.readouterr().err


@pytest.mark.parametrize("name, header", [("t.tsv", None), ("t.tsv", ("review", "sentiment")), ("t.csv", ("Label", "Sentence")),
                                          ("t.tsv", ("sentence", "label"))])
def test_a_header_is_no_example(name, header, tmp_path, capsys):
    rows = [("one long string", "0"), ("fine\u2028all the same", "1"), ("not at all", "0"), ("it moves me", "1")]
    if header and header[0] == "Label":
        rows = [row[::-1] for row in rows]
    separator = "," if name.endswith("csv") else "\t"
    (tmp_path / name).write_text("".join(separator.join(row) + "\r\n" for row in ([header] if header else []) + rows), "utf-8")
    examples = read_examples("classify", [tmp_path / name])
    assert [(e.fields["text"], e.answers[0]) for e in examples] == [tuple(sorted(row, reverse=True)) for row in rows]
    assert f"{name}: {'columns' if header else '2 columns without names'}" in capsys.readouterr().err
