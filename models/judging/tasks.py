"""What the labelled tasks of `models.evaluate` are made of: examples from a file, a few-shot prompt, a stop, a score.

| task      | files                                                   | metrics                                    |
|-----------|---------------------------------------------------------|--------------------------------------------|
| qa        | SQuAD JSON                                              | exact_match, f1, rougeL                    |
| summarize | JSONL with `text` and `summary`                         | rouge1, rouge2, rougeL                     |
| translate | TSV: source TAB target, with or without names           | bleu, chrf                                 |
| generate  | Alpaca JSON, or JSONL with `instruction` and `output`   | bleu, rouge1, rouge2, rougeL, meteor       |
| classify  | TSV: sentence TAB label, with or without names          | accuracy, precision, recall, f1, confusion |

A prompt is `instruction`, then `shots` solved examples, then the example to solve, each written with `example`, whose
`{fields}` are the example's; the answer follows where the last line ends. `--prompt FILE` changes any of them (TOML with
the same names). Classification does not generate: it asks which label is the likeliest continuation.
"""

import dataclasses
import io
import random
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from models.data.records import LABEL_NAMES, Record, as_labelled, read_records
from models.data.tables import open_table
from runtime.errors import UserError
from runtime.files import read_toml


@dataclass(frozen=True)
class Example:
    """Fields for the prompt, and the answers that count as right (classification: one label)."""
    fields: dict[str, str]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """Few-shot prompt. `example` ends where the answer begins; `labels` renames classification labels in words."""
    instruction: str
    example: str
    shots: int
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 64
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


PROMPTS = {
    "qa": Prompt("Answer each question with a few words taken from the text.\n\n",
                 "Text: {context}\nQuestion: {question}\nAnswer:", shots=1, max_new_tokens=24),
    "summarize": Prompt("Summarize each description in one short line.\n\n",
                        "Description: {text}\nSummary:", shots=3, max_new_tokens=32),
    "translate": Prompt("Translate English to Chinese.\n\n", "English: {source}\nChinese:", shots=4, max_new_tokens=48),
    "generate": Prompt("", "Instruction: {instruction}\n{input}\nResponse:", shots=1, stop=("\nInstruction:",),
                       max_new_tokens=128),
    "classify": Prompt("Is the sentiment of each sentence negative or positive?\n\n", "Sentence: {sentence}\nSentiment:",
                       shots=4, labels={"0": "negative", "1": "positive"}),
}


def load_prompt(task: str, file: Path | None) -> Prompt:
    """The task's prompt, with the entries of a TOML file put over it."""
    prompt = PROMPTS[task]
    if file is None:
        return prompt
    changes, known = read_toml(file), sorted(f.name for f in dataclasses.fields(Prompt))
    if unknown := sorted(set(changes) - set(known)):
        raise UserError(f"{file}: unknown entry {unknown[0]!r}; a prompt has {', '.join(known)}")
    for name in ("instruction", "example"):
        if not isinstance(changes.get(name, ""), str):
            raise UserError(f"{file}: {name} must be text")
    if not isinstance(changes.get("shots", 0), int) or changes.get("shots", 0) < 0:
        raise UserError(f"{file}: shots must be a whole number, 0 or more")
    return dataclasses.replace(prompt, **{k: tuple(v) if k == "stop" else v for k, v in changes.items()})


def read_text(file: Path) -> str:
    """A UTF-8 text file, refused in words when it is missing, binary or empty."""
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if b"\0" in raw[:65536]:
        raise UserError(f"{file}: is a binary file; give UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start}); convert it first") from None
    if not text.strip():
        raise UserError(f"{file}: is empty")
    return text


def read_examples(task: str, file: Path, header: str = "auto") -> list[Example]:
    """Every example of a task's file, in the file's order. header: whether a table's first row is names (models/data/tables.py)."""
    try:
        examples = _READERS[task](file, header)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: is not in the format of task {task} ({what}); see python -m models.evaluate --help") from None
    if not examples:
        raise UserError(f"{file}: has no example for task {task}")
    return examples


def _fields(file, format):
    return [record.fields for record in read_records([str(file)], format)]


def _squad(file, _):
    return [Example({"context": r["context"], "question": r["question"]}, tuple(dict.fromkeys(r["answers"])))
            for r in _fields(file, "json") if r["answers"]]


def _summaries(file, _):
    return [Example({"text": r["text"]}, (r["summary"],)) for r in _fields(file, "jsonl")]


def _instructions(file, _):
    return [Example({"instruction": r["instruction"], "input": r.get("input", "")}, (r["output"],))
            for r in _fields(file, "json" if Path(file).suffix.lower() == ".json" else "jsonl")]


def _columns(file, header):
    """Records of two columns. A rare line with other than two is left out and said; more than 1% of them is a wrong file."""
    delimiter = "," if Path(file).suffix.lower() == ".csv" else "\t"
    names, rows = open_table(str(file), io.StringIO(read_text(file), newline="\n"), delimiter, header)
    rows, names = list(rows), names or ["0", "1"]
    odd = [(n, row) for n, row in rows if len(row) != 2]
    if len(names) != 2 or len(odd) > len(rows) / 100:
        line, found = (1, names) if len(names) != 2 else odd[0]
        raise UserError(f"{file}: line {line} has {len(found)} columns, not 2 separated by {'a tab' if delimiter != ',' else 'commas'}")
    if odd:
        print(f"{file}: left out {len(odd)} of {len(rows)} lines that do not have 2 columns, the first is line {odd[0][0]}",
              file=sys.stderr)
    return [Record(f"{file}:{line}", dict(zip(names, row))) for line, row in rows if len(row) == 2]


def _pairs(file, header):
    def ordered(fields):
        named = {name.casefold(): value for name, value in fields.items()}
        return (named["source"], named["target"]) if {"source", "target"} <= set(named) else tuple(fields.values())
    return [Example({"source": a}, (b,)) for a, b in (ordered(record.fields) for record in _columns(file, header))]


def _labelled(file, header):
    def pair(record):
        names = sorted(record.fields, key=lambda name: name.casefold() in LABEL_NAMES)       # the label, known by name, last
        return as_labelled(record, *names)
    return [Example({"sentence": a}, (b,)) for a, b in map(pair, _columns(file, header))]


_READERS = {"qa": _squad, "summarize": _summaries, "translate": _pairs, "generate": _instructions,
            "classify": _labelled}


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


def render(prompt: Prompt, solved: list[Example], example: Example) -> str:
    """The whole prompt, up to and excluding the answer."""
    def fill(e: Example) -> str:
        try:
            return prompt.example.format(**e.fields)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"the prompt's example asks for {error}; this task has {', '.join(e.fields)}") from None
    shown = [f"{fill(e)} {prompt.labels.get(e.answers[0], e.answers[0])}\n\n" for e in solved]
    return prompt.instruction + "".join(shown) + fill(example)
