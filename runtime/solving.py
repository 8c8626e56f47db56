"""An engine's answer to a record, by the task that its bundle brings, or another: what `Engine.solve` does.

A text is written, greedily unless sampling is asked for; a label is the likeliest of the task's, a number their mean by
likelihood. The prompt is the task's (task.py), the one that was trained and judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .bundle import Bundle
from .errors import UserError, shown
from .likelihood import shares
from .reply import Reply
from .task import Task, read_task

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Answer:
    text: str                                                   # what was written, without blanks around it; a label's name; a number
    scores: dict[str, float] = field(default_factory=dict)      # of each label its probability among them
    reply: Reply | None = None                                  # of a text


def bundle_task(bundle: Bundle) -> Task | None:
    """The task that a bundle brings; None: it has none. Raises UserError."""
    return bundle.manifest["task"] and read_task(bundle.path(bundle.manifest["task"]))


def solve(engine: Engine, record: Mapping, task: Task | None, options: dict) -> Answer:
    """See `Engine.solve`."""
    task = task or bundle_task(engine.bundle)
    if task is None:
        raise UserError(f"{engine.bundle.folder}: this bundle has no task; give one, runtime.task.read_task(FILE), or export a "
                        "checkpoint that was fine-tuned on one")
    if not isinstance(task, Task) or not isinstance(record, Mapping):
        what, given = ("task", task) if not isinstance(task, Task) else ("record", record)
        raise UserError(f"the {what} is {shown(given)}, which should be {'a Task' if what == 'task' else 'a dict of its fields'}")
    chat = engine.chat_encoder if task.chat else None
    ids = task.prompt(record, engine.tokenizer, chat)
    if task.answer == "text":
        # As judged: a penalty that a model's own configuration has for chats would keep an answer from quoting its text.
        defaults = {"max_new_tokens": task.max_new_tokens, "stop": task.stops, "temperature": 0.0, "repetition_penalty": 1.0}
        reply, = engine.generate([ids], **defaults | options)
        thoughts = chat and chat.thoughts
        text = thoughts.split(engine.tokenizer, ids, reply.tokens, reply.text)[1] if thoughts else reply.text
        return Answer(text.strip(), reply=reply)
    if options:
        raise UserError(f"there is no option {next(iter(options))!r} for an answer that is a {task.answer}: it is not written, but chosen")
    tails = [task.tail(record, words, engine.tokenizer, chat) for words in task.labels.values()]
    likely = dict(zip(task.labels, map(float, shares([score for score, _ in engine.score(ids, tails)]))))
    if task.answer == "number":
        return Answer(f"{mean(likely):.4g}", likely)
    return Answer(max(likely, key=likely.get), likely)


def mean(likely: Mapping[str, float]) -> float:
    """The mean of labels that are numbers, by their probabilities."""
    return sum(float(label) * share for label, share in likely.items())
