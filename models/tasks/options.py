"""The options that say which task it is, for every command that asks a model something; and the task that they make.

A checkpoint or bundle that was fine-tuned on a task brings it (task.json), and is asked that way where the same task is named;
any other is asked as models/tasks/defaults.py says. A file, and then the options, change that.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from models.data.records import FORMATS, lot
from models.data.tables import HEADERS
from models.tasks.defaults import DEFAULTS, IN_CHAT, OTHER_LABELS, SHOTS
from models.tasks.examples import Example, read_examples
from models.tasks.scoring import check_metrics
from runtime.cli import Checked, arg
from runtime.errors import UserError
from runtime.files import read_toml
from runtime.task import FILE, Task, read_task

_GROUP = "the task"


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Checked):
    """How records are read and asked."""
    task_file: Path | None = arg(None, help="TOML file, or a task.json, with entries of the task to change (instruction, example, stop, "
                                            "max_new_tokens, labels, metrics, ...)", group=_GROUP)
    prompt: str | None = arg(None, help="what precedes the answer, with the record's {fields}; \\n is a new line", group=_GROUP)
    labels: tuple[str, ...] = arg((), help="the labels in words, as 0=negative 1=positive", group=_GROUP)
    chat: bool | None = arg(None, help="ask through the model's chat template", group=_GROUP)
    shots: int | None = arg(None, help="solved examples in each prompt, drawn by seed", least=0, group=_GROUP)
    format: str | None = arg(None, help="format of every file, in place of its ending", choices=tuple(dict.fromkeys(FORMATS.values())),
                             group=_GROUP)
    header: str = arg("auto", help="whether the first row of CSV and TSV files names the columns", choices=HEADERS, group=_GROUP)
    field: str | None = arg(None, help="field or column of the text", group=_GROUP)
    label_field: str | None = arg(None, help="field or column of the label or answer", group=_GROUP)


def examples_of(options: TaskOptions, names: Iterable, limit: int | None = None, task: str | None = None) -> list[Example]:
    return read_examples(task or options.task, names, format=options.format, header=options.header, field=options.field,
                         label_field=options.label_field, limit=limit)


def set_aside(examples: list[Example], options) -> tuple[list[Example], list[Example]]:
    """(those to learn from, the share `valid_share` to judge on): by the hash of each and the seed, at least one on either side."""
    lots = [lot(str(example.fields) + str(example.answers), options.seed) for example in examples]
    held = max(options.valid_share, min(lots) + 2**-52)
    first = [drawn < min(held, max(lots)) for drawn in lots]
    if not any(first):
        raise UserError(f"{options.data[0]}: {len(examples)} examples, all the same, leave none to judge on: give --valid files")
    return [one for one, out in zip(examples, first) if not out], [one for one, out in zip(examples, first) if out]


def own_task(name: str, folder: Path | None) -> Task | None:
    """The task `name` that a model brings, if it was fine-tuned on that."""
    task = read_task(folder / FILE) if folder is not None and (folder / FILE).is_file() else None
    return task if task and task.name == name else None


def open_task(name: str, options: TaskOptions, examples: list[Example], folder: Path | None = None) -> Task:
    """The task `name`, as a model's folder and the options have it, without shots of its own making. examples: those it is for,
    which say what labels there are where nothing else does. Raises UserError for a label that has no words."""
    own = own_task(name, folder)
    task = own or DEFAULTS[name]
    if own:
        print(f"{name}: asked as {folder / FILE} says", file=sys.stderr)
    entries, place = _entries(options), str(options.task_file or "the options")
    if task.answer == "label" and task is not own and "labels" not in entries:
        entries = _with_labels(task, entries, examples)
    if entries.get("chat") and task is not own:
        entries = IN_CHAT.get(name, {}) | entries
    task = task.changed(entries, place)
    check_metrics(task, place)
    for example in examples if task.answer != "text" else ():
        check_label(task, example)
    if options.prompt is not None and not any(f"{{{field}}}" in task.example for field in (examples[0].fields if examples else ())):
        raise UserError(f"--prompt {options.prompt!r}: has no {{text}} to put the record in; it has {', '.join(examples[0].fields)}")
    return task


def with_shots(task: Task, solved: list[Example]) -> Task:
    """The task with these examples solved in every prompt."""
    return replace(task, shots=tuple((task.asked(e.fields), words_of(task, e)) for e in solved))


def default_shots(task: Task) -> int:
    """How many examples a model that never learned the task is shown."""
    return 0 if task.chat else SHOTS.get(task.name, 0)


def words_of(task: Task, example: Example) -> str:
    """The example's first answer, as the model writes it: of a label its words, of a number those of the nearest label."""
    answer = example.answers[0]
    if task.answer == "number":
        answer = min(task.labels, key=lambda label: abs(float(label) - float(answer)))
    return answer if task.answer == "text" else task.labels[answer]


def _entries(options: TaskOptions) -> dict:
    """What the file and the options change."""
    file, entries = options.task_file, {}
    if file is not None:
        entries = read_toml(file) if file.suffix.lower() == ".toml" else asdict(read_task(file))
    if options.prompt is not None:
        entries |= {"instruction": "", "example": options.prompt.replace("\\n", "\n")}
    if options.labels:
        pairs = [label.partition("=") for label in options.labels]
        if bad := [name + sign for name, sign, words in pairs if not words.strip()]:
            raise UserError(f"--labels {bad[0]}: give each label as NAME=WORDS")
        entries["labels"] = {name: words for name, _, words in pairs}
    return entries | ({} if options.chat is None else {"chat": options.chat})


def _with_labels(task: Task, entries: dict, examples: list[Example]) -> dict:
    """The labels of the examples, where they have nothing to do with the task's own."""
    seen = sorted({example.answers[0] for example in examples})
    if not seen or set(seen) & set(task.labels):
        return entries
    if len(seen) < 2:
        raise UserError(f"{examples[0].place}: every example has the label {seen[0]}, so there is nothing to tell apart: give others, or "
                        "name every label with --labels")
    return OTHER_LABELS[task.name] | entries | {"labels": {label: label for label in seen}}


def check_label(task: Task, example: Example) -> None:
    """Raises UserError for an answer that is none of the task's labels, or outside them."""
    if task.answer == "label" and example.answers[0] not in task.labels:
        raise UserError(f"{example.place}: label {example.answers[0]!r} was never seen; known are {', '.join(task.labels)}. Mend the file, "
                        "or name every label with --labels")
    if task.answer == "number":
        low, high = min(map(float, task.labels)), max(map(float, task.labels))
        if not low <= float(example.answers[0]) <= high:
            raise UserError(f"{example.place}: its score is {example.answers[0]}, outside the labels' {low:g} to {high:g}: name others with "
                            "--labels, as 1=1 2=2")
