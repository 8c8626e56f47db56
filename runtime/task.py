"""A task: how a record becomes a prompt, and what may answer it. One object for training, judging and the app.

    task = read_task("build/run/last/task.json")
    ids = task.prompt({"context": "...", "question": "..."}, tokenizer, chat)      # int64 [n], BOS included
    tail = task.tail(record, "Ann", tokenizer, chat)                               # the answer's ids, as they follow those

Nobody else makes a prompt of a record: `models.finetune` learns tails after it, `models.evaluate` and `Engine.solve` ask it.

Plain, a prompt is `instruction`, the `shots` (solved records, each as it is asked, and its answer), then the record, written
by `example`, whose {fields} are the record's; the answer follows after a space. With `chat` the same are turns of a
conversation through the model's own template. An empty `example` means that the record is a conversation ("messages").
`answer` says what an answer is: "text" that the model writes, the likeliest of the `labels` ("label"), or their mean by
likelihood ("number"). `metrics` are names that models.tasks knows; an app needs none.

A file has the entries of `Task` and its version. What is unknown in it is refused by name, for it would be asked otherwise.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .chat_tokens import ChatEncoder
from .cli import did_you_mean
from .errors import UserError, shown
from .files import read_json, write
from .text import Tokenizer

FILE, VERSION = "task.json", 1
ANSWERS = ("text", "label", "number")
_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    example: str = ""
    instruction: str = ""
    shots: tuple[tuple[str, str], ...] = ()        # (as asked, answer)
    stop: tuple[str, ...] = ("\n",)                # strings that end an answer, where no template ends the turn
    max_new_tokens: int = 64
    answer: str = "text"
    labels: dict[str, str] = field(default_factory=dict)           # name -> words
    chat: bool = False
    metrics: tuple[str, ...] = ()

    def changed(self, entries: Mapping, place: str) -> "Task":
        """The task with these entries, as a file has them. Raises UserError, beginning with `place`."""
        known = [f.name for f in dataclasses.fields(Task)]
        for name, value in entries.items():
            if name not in known:
                raise UserError(f"{place}: unknown entry {name!r}{did_you_mean(name, known)}; a task has {', '.join(known)}")
            if not _fits(name, value):
                raise UserError(f"{place}: {name} is {shown(value)}, which should be {_FORMS[name]}")
        made = {name: tuple(tuple(pair) for pair in value) if name == "shots" else tuple(value) if name in ("stop", "metrics") else value
                for name, value in entries.items()}
        task = dataclasses.replace(self, **made)
        if task.answer != "text" and len(task.labels) < 2:
            raise UserError(f"{place}: an answer that is a {task.answer} needs labels to choose from, two or more")
        if task.answer == "number" and not all(map(_is_number, task.labels)):
            raise UserError(f"{place}: an answer that is a number needs labels that are numbers, not {', '.join(task.labels)}")
        return task

    def save(self, file: Path | str) -> None:
        write(Path(file), json.dumps({"version": VERSION} | dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings in use: a template ends its turns itself."""
        return () if self.chat else self.stop

    def asked(self, record: Mapping) -> str:
        """The record in the words of `example`. Raises UserError for a record without one of its fields."""
        def filled(found: re.Match) -> str:
            name = found[1]
            if name is None:
                return found[0][0]
            value = record.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                told = "is missing" if name not in record else f"is {shown(value)}, which should be a text"
                raise UserError(f"task {self.name}: {name!r} {told}; the record has {', '.join(map(str, record)) or 'nothing'}")
            return str(value)
        return _PLACE.sub(filled, self.example)

    def text(self, record: Mapping) -> str:
        """The plain prompt, up to and excluding the answer. Raises UserError for a task that is a conversation."""
        if self.chat or not self.example:
            raise UserError(f"task {self.name} is asked through the model's chat template, and has no plain prompt")
        return self.instruction + "".join(f"{asked} {answer}\n\n" for asked, answer in self.shots) + self.asked(record)

    def messages(self, record: Mapping) -> list[dict]:
        """The conversation before the answer, for the chat template or a server. Raises UserError."""
        if not self.example:
            messages = record.get("messages")
            if not isinstance(messages, list) or not messages:
                raise UserError(f"task {self.name}: 'messages' is {shown(messages)}, which should be the conversation before the reply")
            return [{"role": "system", "content": self.instruction}] * bool(self.instruction) + messages
        turns = [{"role": role, "content": text} for pair in self.shots for role, text in zip(("user", "assistant"), pair)]
        turns.append({"role": "user", "content": self.asked(record)})
        return [turns[0] | {"content": self.instruction + turns[0]["content"]}, *turns[1:]]

    def prompt(self, record: Mapping, tokenizer: Tokenizer, chat: ChatEncoder | None = None) -> np.ndarray:
        """int64 ids of the prompt. chat: the model's template, which a task with `chat` needs. Raises UserError."""
        if not self.chat:
            return tokenizer.encode(self.text(record))
        return self._template(chat).tokens(self.messages(record), **template_variables(record))

    def tail(self, record: Mapping, words: str, tokenizer: Tokenizer, chat: ChatEncoder | None = None, end: int | None = None) -> np.ndarray:
        """int64 ids of an answer, as they follow the prompt's: after a space, and before the token `end`; in a template with what
        ends the turn there. Raises UserError for a template that does not let a reply follow its own prompt."""
        if not self.chat:
            ids = tokenizer.encode(" " + words, special_tokens=False)
            return ids if end is None else np.append(ids, end)
        chat = self._template(chat)
        marked = chat.marked([*self.messages(record), {"role": "assistant", "content": words}], template_variables(record))
        asked = chat.render(marked, marked.messages[:-1], add_generation_prompt=True)
        through = chat.render(marked, marked.messages, add_generation_prompt=False).rstrip()
        if not through.startswith(asked):
            raise UserError(f"task {self.name}: the chat template's prompt opens what a plain reply does not go on with (a thought, "
                            "perhaps): ask without chat")
        ids, offsets = chat.encode(through, marked.mark)
        return ids[offsets[:, 0] >= len(asked)]

    def _template(self, chat: ChatEncoder | None) -> ChatEncoder:
        if chat is None:
            raise UserError(f"task {self.name} is asked through a chat template, and the model has none: put one beside it as "
                            "chat_template.jinja, or ask without chat")
        return chat


def read_task(file: Path | str) -> Task:
    """The task in a file. Raises UserError."""
    entries = read_json(Path(file), mend="train or export the model again")
    if (version := entries.pop("version", None)) != VERSION:
        raise UserError(f"{file}: version {shown(version)} of a task, where this program reads version {VERSION}")
    if not isinstance(entries.get("name"), str):
        raise UserError(f"{file}: name is {shown(entries.get('name'))}, which should be a text")
    return Task(name=entries["name"]).changed(entries, str(file))


def template_variables(record: Mapping) -> dict:
    """What a record has for the chat template besides its messages: tools, documents and what chat_template_kwargs names."""
    more = record.get("chat_template_kwargs") or {}
    return {name: record[name] for name in ("tools", "documents") if record.get(name)} | (more if isinstance(more, dict) else {})


_FORMS = {"name": "a text", "example": "a text", "instruction": "a text", "shots": "a list of pairs of texts, [as asked, answer]",
          "stop": "a list of texts, none of them empty", "max_new_tokens": "a whole number of at least 1", "answer": f"one of {', '.join(ANSWERS)}",
          "labels": "an object of texts, none of them empty", "chat": "true or false", "metrics": "a list of names"}


def _fits(name: str, value) -> bool:
    """Whether a value is of the form that _FORMS names."""
    texts = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    if name == "shots":
        return isinstance(value, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair) for pair in value)
    if name == "labels":
        return isinstance(value, dict) and all(isinstance(words, str) and words.strip() for words in value.values())
    if name == "max_new_tokens":
        return type(value) is int and value >= 1
    return {"stop": texts and all(value), "metrics": texts, "chat": isinstance(value, bool), "answer": value in ANSWERS}.get(
        name, isinstance(value, str))


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False
