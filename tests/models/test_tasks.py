"""One task, one description: the prompt trained on is the prompt judged and the prompt an engine asks, token for token."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import transformers

from export.onnx import main as export
from models.evaluate import Options, _asked, labelled
from models.finetune import main as finetune
from models.formats.chat import chat_encoder
from models.judging.language_model import open_model
from models.tasks import TASKS, TaskOptions, open_task, read_examples
from models.tasks.defaults import DEFAULTS
from models.tasks.entities import as_text, from_text, spans
from models.tasks.learning import encode
from models.tasks.options import with_shots
from runtime import Engine, solving
from runtime.chat_tokens import ChatEncoder
from runtime.errors import UserError
from runtime.task import Task, read_task
from runtime.template import ChatTemplate
from runtime.text import Tokenizer

def bundle_of(checkpoint, out):
    assert export([str(checkpoint), "-o", str(out)]) == 0
    return out


QA = [{"context": f"Ann{i} has a cat.", "question": f"Who{i}?", "answer": f"Ann{i}"} for i in range(8)]


@pytest.fixture(scope="module")
def with_bos(tiny_checkpoint, tmp_path_factory):
    """A checkpoint whose tokenizer begins a text with BOS, as Llama's does."""
    folder = shutil.copytree(tiny_checkpoint("smollm2"), tmp_path_factory.mktemp("t") / "bos")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bundle(with_bos, tmp_path_factory):
    return bundle_of(with_bos, tmp_path_factory.mktemp("t") / "bundle")


def write_qa(folder):
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QA))
    return folder / "qa.jsonl"


@pytest.mark.parametrize("shots, chat", [(0, False), (2, False), (0, True), (2, True)], ids=["plain", "few-shot", "chat", "few-shot chat"])
@pytest.mark.parametrize("name", ["qa", "classify"])
def test_what_is_trained_is_what_is_judged_and_what_an_engine_asks(name, shots, chat, with_bos, bundle, tmp_path, monkeypatch):
    """The oracle is `transformers`: its tokenizer's ids of the plain prompt, its template's of the conversation."""
    oracle = transformers.AutoTokenizer.from_pretrained(with_bos)
    if name == "qa":
        file = write_qa(tmp_path)
    else:
        file = tmp_path / "c.tsv"
        file.write_text("".join(f"so fine {i}\t{i % 2}\n" for i in range(8)))
    options = Options(model=with_bos, task=name, data=(str(file),), shots=shots, chat=chat)
    task, examples = _asked(options)
    record, answer = examples[0].fields, task.labels.get(examples[0].answers[0], examples[0].answers[0])
    fill = (lambda r: f"Text: {r['context']}\nQuestion: {r['question']}\nAnswer:") if name == "qa" else (lambda r: f"Sentence: {r['text']}\nSentiment:")
    solved = [e for e in read_examples(name, [file]) if e.fields not in [one.fields for one in examples]]
    assert sorted(task.shots) == sorted((fill(e.fields), task.labels.get(e.answers[0], e.answers[0])) for e in solved) and len(solved) == shots
    if chat:
        said = [text for turn in task.shots for text in turn] + [fill(record)]
        turns = [{"role": ("user", "assistant")[n % 2], "content": text if n else task.instruction + text} for n, text in enumerate(said)]
        wanted = oracle.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        whole = oracle.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
    else:
        wanted = oracle(task.instruction + "".join(f"{asked} {words}\n\n" for asked, words in task.shots) + fill(record))["input_ids"]
        whole = wanted + oracle(" " + answer, add_special_tokens=False)["input_ids"] + ([] if name == "classify" else [2])
        assert wanted[0] == 0                          # BOS
    # Trained on.
    tokenizer = Tokenizer(with_bos / "tokenizer.json")
    (ids, learned), = encode(task, SimpleNamespace(fields=record, answers=examples[0].answers, place="here"), tokenizer,
                             chat_encoder(with_bos, tokenizer), 2)
    assert ids[~learned].tolist() == wanted and ids.tolist() == whole[:len(ids)] and len(whole) - len(ids) <= 1        # a last line's end
    # Judged.
    model, asked = open_model(with_bos, threads=1), []
    model.generate = lambda prompts, *a, **k: asked.extend(ids.tolist() for ids in prompts) or [SimpleNamespace(text="", tokens=[]) for _ in prompts]
    model.score_tails = lambda ids, tails: asked.append(ids.tolist()) or [(0.0, False) for _ in tails]
    labelled(options, model, task, [SimpleNamespace(fields=record, answers=examples[0].answers)])
    assert asked[-1] == wanted
    # Asked by an engine, of the file that training leaves.
    task.save(tmp_path / "task.json")
    with Engine(bundle, provider="cpu") as engine:
        monkeypatch.setattr(engine, "score", lambda ids, tails: asked.append(ids.tolist()) or [(0.0, False) for _ in tails])
        monkeypatch.setattr(engine, "generate", lambda prompts, **options: asked.append(prompts[0].tolist()) or [SimpleNamespace(text="", tokens=[])])
        engine.solve(record, read_task(tmp_path / "task.json"))
    assert asked[-1] == wanted


def test_a_task_travels_from_training_into_the_bundle_and_answers_there(with_bos, tmp_path, capsys):
    (tmp_path / "t.tsv").write_text("\n".join(f"{'good fine' if i % 2 else 'bad poor'} {i}\t{i % 2}" for i in range(40)))
    out = tmp_path / "out"
    assert finetune([str(with_bos), "-o", str(out), "--batch", "4", "--steps", "24", "--eval-every", "24", "--task", "classify", "--data",
                     str(tmp_path / "t.tsv"), "--valid", str(tmp_path / "t.tsv"), "--learning-rate", "0.02", "--prompt", "{text}\\nIs it?",
                     "--labels", "0=not good", "1=yes"]) == 0
    task = read_task(out / "last/task.json")
    assert (task.example, task.instruction, task.labels) == ("{text}\nIs it?", "", {"0": "not good", "1": "yes"})
    folder = bundle_of(out / "last", tmp_path / "bundle")
    model, asked = open_model(folder), open_task("classify", TaskOptions(), read_examples("classify", [tmp_path / "t.tsv"]), folder)
    assert asked == task and "asked as" in capsys.readouterr().err
    judged, rest = _asked(Options(model=folder, task="classify", data=(str(tmp_path / "t.tsv"),)))
    assert judged == task and not judged.shots and len(rest) == 40          # a default's examples go to models that never learned it
    with Engine(folder) as engine:
        for text, label in (("good fine 77", "1"), ("bad poor 78", "0")):
            answer = engine.solve({"text": text})
            assert answer.text == label and sum(answer.scores.values()) == pytest.approx(1)
            assert answer.scores == pytest.approx(model.likelihoods(task, {"text": text}), abs=1e-4)
        with pytest.raises(UserError, match="task classify: 'text' is missing; the record has sentence"):
            engine.solve({"sentence": "good"})
        with pytest.raises(UserError, match="there is no option 'temperature' for an answer that is a label"):
            engine.solve({"text": "good"}, temperature=1.0)


def test_text_and_numbers_are_answered_as_transformers_and_the_definition_have_them(with_bos, bundle):
    task = DEFAULTS["qa"]
    with Engine(bundle, provider="cpu") as engine:
        with pytest.raises(UserError, match="this bundle has no task"):
            engine.solve(QA[0])
        reply = engine.generate([task.prompt(QA[1], engine.tokenizer)], max_new_tokens=5, stop="\n", temperature=0)[0]
        engine._defaults["repetition_penalty"] = 1.5         # of a generation_config.json: it is for chats, and no model was judged with it
        assert engine.solve(QA[1], task, max_new_tokens=5).text == reply.text.strip()
        scored = DEFAULTS["regress"]
        answer = engine.solve({"text": "a", "text2": "b"}, scored)
        log_p = [s for s, _ in engine.score(scored.prompt({"text": "a", "text2": "b"}, engine.tokenizer), [
            engine.tokenizer.encode(f" {n}", special_tokens=False) for n in range(6)])]
        share = np.exp(log_p) / np.exp(log_p).sum()
        assert float(answer.text) == pytest.approx(share @ np.arange(6), rel=1e-3)


def test_a_prompt_that_opens_a_thought_is_refused(with_bos):
    source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    tokenizer = Tokenizer(with_bos / "tokenizer.json")
    with pytest.raises(UserError, match="opens what a plain reply does not go on with"):
        Task(name="qa", example="{question}", chat=True).tail(QA[0], "Ann", tokenizer, ChatEncoder(ChatTemplate(source, "t"), tokenizer))


@pytest.mark.parametrize("entries, says", [
    ({"version": 2}, "version 2 of a task, where this program reads version 1"), ({"nmae": "x"}, "unknown entry 'nmae' (did you mean 'name'?)"),
    ({"name": 3}, "name is 3, which should be a text"), ({"shots": [["a"]]}, "shots is [['a']], which should be a list of pairs"),
    ({"stop": [""]}, "stop is [''], which should be a list of texts, none of them empty"), ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"answer": "label"}, "an answer that is a label needs labels"), ({"answer": "number", "labels": {"a": "a", "b": "b"}}, "labels that are numbers"),
    ({"chat": 1}, "chat is 1, which should be true or false"), ({"answer": "song"}, "answer is 'song', which should be one of text")])
def test_a_task_file_of_no_use_is_refused(entries, says, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"version": 1, "name": "mine"} | entries))
    with pytest.raises(UserError) as refused:
        read_task(tmp_path / "task.json")
    assert str(refused.value).startswith(f"{tmp_path}/task.json: ") and says in str(refused.value)


def test_fields_are_put_in_and_nothing_else_is_read_from_them(tmp_path):
    task = Task(name="x", example="{{a}} {text} {number} {text.__class__}")
    assert task.asked({"text": "{number}", "number": 2.5}) == "{a} {number} 2.5 {text.__class__}"
    task = with_shots(DEFAULTS["qa"], read_examples("qa", [write_qa(tmp_path)])[:1])
    task.save(tmp_path / "task.json")
    assert read_task(tmp_path / "task.json") == task


FORMS = {
    "qa": [("json", json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]})),
           ("jsonl", '{"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}'), ("csv", "Context,Question,Answer\nc,q,a\n")],
    "summarize": [("jsonl", '{"text": "t", "summary": "s"}'), ("json", '[{"text": "t", "summary": "s"}]'), ("csv", "text,summary\nt,s\n")],
    "translate": [("tsv", "a b!\tc d!\n"), ("tsv", "source\ttarget\na b!\tc d!\n"), ("jsonl", '{"source": "a b!", "target": "c d!"}')],
    "classify": [("tsv", "so so\t1\n"), ("tsv", "text\tlabel\nso so\t1\n"), ("jsonl", '{"text": "so so", "label": 1}'), ("csv", "label,sentence\n1,so so\n")],
    "pair": [("tsv", "a b\tc d\t1\n"), ("csv", "premise,hypothesis,label\na b,c d,1\n"), ("jsonl", '{"sentence1": "a b", "sentence2": "c d", "label": 1}')],
    "regress": [("csv", "a b.,c d.,2.4\n"), ("tsv", "sentence1\tsentence2\tscore\na b.\tc d.\t2.4\n"), ("jsonl", '{"text": "a b.", "text2": "c d.", "score": 2.4}')],
    "ner": [("conll", "Ann B-per\nLee I-per\nran O\n"), ("jsonl", '{"tokens": ["Ann", "Lee", "ran"], "tags": ["B-per", "I-per", "O"]}')],
    "instruct": [("json", '[{"instruction": "i", "input": "", "output": "o"}]'), ("jsonl", '{"prompt": "i", "completion": "o"}')],
    "chat": [("json", '[{"instruction": "i", "output": "o"}]'), ("jsonl", '{"conversations": [{"from": "human", "value": "i"}, {"from": "gpt", "value": "o"}]}'),
             ("jsonl", '{"messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]}')],
    "continue": [("jsonl", '{"text": "one two three four"}'), ("txt", "one two three four\n")]}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_example(name, tmp_path):
    found = []
    for number, (ending, content) in enumerate(FORMS[name]):
        (tmp_path / f"{number}.{ending}").write_text(content)
        found.append(read_examples(name, [tmp_path / f"{number}.{ending}"])[0])
    first = found[0]
    assert all({key: value for key, value in e.fields.items()} == first.fields and e.answers == first.answers for e in found)
    assert len(found) > 1 and set(FORMS) | {"similarity"} == set(TASKS)


def test_entities_come_back_from_what_is_written():
    tokens, tags = "Ann Lee met Bo in New York".split(), ["B-person", "I-person", "O", "B-person", "O", "B-place", "I-place"]
    found = spans(tags, "here")
    assert found == [("person", 0, 2), ("person", 3, 4), ("place", 5, 7)]
    assert from_text(as_text(tokens, found)) == [("person", "Ann Lee"), ("person", "Bo"), ("place", "New York")]
    assert from_text("none") == [] and as_text(tokens, []) == "none" and from_text("nonsense; Bo = person; = x") == [("person", "Bo")]
    for wrong in (["I-person"], ["B-a", "I-b"], ["B-a", "O", "I-a"], ["U-a"], ["B-"]):
        with pytest.raises(UserError, match="here: tag"):
            spans(wrong, "here")


def test_a_mean_is_of_the_labels():
    assert solving.mean({"0": 0.25, "4": 0.75}) == 3.0
