"""Examples of a task from data files of any of the field's formats: the fields it asks with, and the answers that are right.

    examples = read_examples("qa", ["xquad-en.json"])         # or a folder, a glob, hf:NAME@SPLIT
    examples[0].fields["question"], examples[0].answers

What a file must have is in models/tasks/defaults.py; its format is told by its ending (models/data/records.py). A column or
key is found by its name in any case, of a table without names by its place.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest

from models.data.records import (LABEL_NAMES, Record, as_labelled, as_messages, as_text, find_sources, folded, read_records,
                                 template_arguments)
from models.tasks.entities import as_text as entities_text
from models.tasks.entities import spans
from runtime.errors import UserError, shown

_FIRST = ("text", "sentence", "text1", "sentence1", "premise", "question1", "a")
_SECOND = ("text2", "sentence2", "hypothesis", "question2", "b")
_ANSWER = ("answers", "answer")
_SCORE = ("score", "similarity", "similarity_score", "label", "target")


@dataclass(frozen=True)
class Example:
    """Fields for the prompt, the answers that count as right (of a labelled task one, the label's name), and where it stands."""
    fields: dict
    answers: tuple[str, ...]
    place: str = ""


def read_examples(task: str, names: Iterable, *, format: str | None = None, header: str = "auto", field: str | None = None,
                  label_field: str | None = None, limit: int | None = None) -> list[Example]:
    """The examples of every file in order, at most `limit`. field, label_field: columns of the text and the answer, where they
    are called otherwise. Raises UserError, which names the file and the record."""
    read = partial(_READERS[task], field=field, label_field=label_field)
    records = read_records(find_sources(names), format, header=header, wanted=(field, label_field), odd_rows=task == "translate")
    return [read(record) for record in islice(records, limit)]


def _qa(record, field, label_field):
    fields = folded(record)
    answers = fields.get(label_field or next((name for name in _ANSWER if name in fields), "answers"))
    if isinstance(answers, dict):                       # as the datasets library has SQuAD
        answers = answers.get("text")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not any(map(str.strip, answers)):
        raise UserError(f"{record.place}: no answer; it has {', '.join(map(str, record.fields))}: a question needs context, question "
                        "and answers, a text or a list of them")
    kept = {"context": _value(record, "context"), "question": _value(record, field or "question")}
    return Example(kept, tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip())), record.place)


def _answered(record, field, label_field, *, asked: str, answer: str):
    text, summary = _two(record, field or asked, label_field or answer)
    return Example({asked: text}, (_filled(record, answer, summary).strip(),), record.place)


def _labelled(record, field, label_field):
    if record.table and len(record.fields) == 2 and not (field or label_field):          # the label, where it is known by name, last
        field, label_field = sorted(record.fields, key=lambda name: name.casefold() in LABEL_NAMES)
    text, label = as_labelled(record, field, label_field)
    return Example({"text": text}, (label,), record.place)


def _pair(record, field, label_field):
    text, text2, label = _three(record, field, label_field, ("label", "labels", "class"))
    return Example({"text": text, "text2": text2}, (label,), record.place)


def _scored(record, field, label_field):
    """Two texts and a number; of a table of two columns, or a record without a second text, one."""
    if len(record.fields) == 2 or folded(record).keys().isdisjoint(_SECOND) and not record.table:
        label = label_field or next((name for name in _SCORE if name in folded(record)), None)
        text, score = as_labelled(record, field, label, number=True)
        fields = {"text": text}
    else:
        text, text2, score = _three(record, field, label_field, _SCORE)
        fields = {"text": text, "text2": text2}
    try:
        number = float(score)
    except ValueError:
        number = float("nan")
    if not number - number == 0:
        raise UserError(f"{record.place}: its score is {shown(score)}, which should be a number")
    return Example(fields, (score,), record.place)


def _ner(record, field, label_field):
    fields = folded(record)
    tokens, tags = fields.get(field or "tokens"), fields.get(label_field or "tags", fields.get("ner_tags"))
    if not all(isinstance(part, list) and part and all(isinstance(one, str) for one in part) for part in (tokens, tags)) or len(tokens) != len(tags):
        raise UserError(f"{record.place}: no tokens with a tag each; it has {', '.join(map(str, record.fields))}")
    found = spans(tags, record.place)
    return Example({"text": " ".join(tokens), "tokens": tokens, "tags": tags}, (entities_text(tokens, found),), record.place)


def _instruction(record, field, label_field):
    fields = folded(record)
    pairs = (("instruction", "output"), ("prompt", "completion"))
    asked, answer = next((pair for pair in pairs if pair[0] in fields), pairs[0])
    kept = {"instruction": _value(record, field or asked), "input": fields.get("input") or ""}
    kept["prompt"] = "\n".join(part for part in kept.values() if part)
    return Example(kept, (_value(record, label_field or answer).strip(),), record.place)


def _chat(record, **_):
    messages = as_messages(record)
    fields, variables = {"messages": messages[:-1], "reply": messages[-1]}, template_arguments(record)
    fields |= {name: variables.pop(name) for name in ("tools", "documents") if name in variables} | {"chat_template_kwargs": variables}
    content = messages[-1].get("content")
    return Example(fields, (content if isinstance(content, str) else "",), record.place)


def _continue(record, field, **_):
    text = as_text(record, field).strip()
    cut = text.find(" ", len(text) // 2)
    cut = len(text) // 2 if cut < 0 else cut
    if not (text[:cut].strip() and text[cut:].strip()):
        raise UserError(f"{record.place}: a text of {len(text)} characters is too short to be continued")
    return Example({"text": text[:cut].rstrip()}, (text[cut:].strip(),), record.place)


_READERS = {"qa": _qa, "summarize": partial(_answered, asked="text", answer="summary"),
            "translate": partial(_answered, asked="source", answer="target"), "classify": _labelled, "pair": _pair, "regress": _scored,
            "similarity": _scored, "ner": _ner, "instruct": _instruction, "chat": _chat, "continue": _continue}


def _value(record: Record, name: str) -> str:
    """A field that must be a text with something in it."""
    fields = folded(record)
    value = fields.get(name, fields.get(name.casefold()))
    if value is None:
        raise UserError(f"{record.place}: no {name!r}; it has {', '.join(map(str, record.fields))}")
    return _filled(record, name, value)


def _filled(record: Record, name: str, value) -> str:
    value = str(value) if type(value) in (int, float) else value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{record.place}: its {name} is {shown(value)}, which should be a text with something in it")
    return value


def _two(record: Record, first: str, second: str) -> tuple[str, str]:
    """Two fields by their names; of a table of two columns that has others, or none, by their places."""
    fields = folded(record)
    if record.table and len(record.fields) == 2 and not {first.casefold(), second.casefold()} & set(fields):
        return tuple(_filled(record, name, value) for name, value in zip((first, second), record.fields.values()))
    return _value(record, first), _value(record, second)


def _three(record: Record, field: str | None, label_field: str | None, labels: tuple[str, ...]) -> tuple[str, str, str]:
    """Two texts and what is said of them, by names; of a table of three columns by their places."""
    fields = folded(record)
    if record.table and len(record.fields) == 3 and not set(fields) & {*_FIRST, *_SECOND}:
        names = list(record.fields)
    else:
        names = [field or next((name for name in _FIRST if name in fields), "text"), next((name for name in _SECOND if name in fields), "text2"),
                 label_field or next((name for name in labels if name in fields), labels[0])]
    text, text2, label = (_value(record, name) for name in names)
    return text, text2, label.strip()


def split_shots(examples: list[Example], shots: int, limit: int | None, seed: int) -> tuple[list[Example], list[Example]]:
    """Draw `shots` solved examples and up to `limit` others to solve, by seed. Labels take turns among the shots."""
    if len(examples) <= shots:
        raise UserError(f"{len(examples)} examples are too few for {shots} shots and one to solve")
    order = list(examples)
    random.Random(seed).shuffle(order)
    solved, groups = order[:shots], {e.answers[0]: [] for e in order}
    if len(groups) <= max(shots, 1):                            # labels: one of each in turn
        for example in order:
            groups[example.answers[0]].append(example)
        turns = [example for turn in zip_longest(*groups.values()) for example in turn]
        solved = [example for example in turns[:shots] if example is not None]
    return solved, [e for e in order if not any(e is s for s in solved)][:limit]
