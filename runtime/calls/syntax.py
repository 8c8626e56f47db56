"""How a model writes calls of tools, and what reads them out of its text: whole, or as it comes.

A `Kind` is one syntax: the mark that opens a call, and a function that reads what stands behind it. What is common lies here.
Text before, between and behind calls is content; white space beside a call is none. Where a text misses its syntax, the mark
that seemed to open a call is content, and reading goes on behind it: nothing is ever lost, and nothing raises.

A call is given when it is complete, so that what turns out to be none can still be content.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..text import Tokenizer, overlap

_CLOSING = frozenset(">}]")       # what the end of a call ends with, in every syntax
_NAME = re.compile(r"[\w.:/-]{1,200}")


class Miss(ValueError):
    """The text is no call."""


class Unfinished(Miss):
    """It ends inside a value: what seemed to end it belongs to the value."""


class Call(NamedTuple):
    name: str
    arguments: str                # a JSON object


class Content(NamedTuple):
    text: str


class CallBegun(NamedTuple):
    index: int                    # 0, 1, ... in one reply
    name: str


class CallArguments(NamedTuple):
    index: int
    piece: str                    # pieces of a call's arguments join to its JSON


Event = Content | CallBegun | CallArguments
Schemas = dict[str, dict]         # of the arguments, by the function's name


@dataclass(frozen=True)
class Kind:
    """One syntax.

    read(text, last, schemas): of a text that begins with `opening`, where the calls end and the calls; None: it needs more (never
    with `last`, when all is there). Raises Miss. Once it answers, more text must not change the answer.
    """

    opening: str
    read: Callable[[str, bool, Schemas], tuple[int, list[Call]] | None]
    marks: tuple[str, ...]                        # which may be control tokens
    knows: Callable[[str, Tokenizer], bool]       # whether a chat template's model writes calls so
    grammar: Callable[[list[tuple[str, dict]], Callable[[str], str]], tuple[str, str]]       # what a call is, what is between two
    first: bool = False                           # calls stand at the beginning of a reply or nowhere
    between: str = ""                             # what may stand between calls besides white space


class Syntax:
    """The syntax of one model. tools: as in a request, [{"type": "function", "function": {"name", "parameters"}}]; their schemas
    say how values are meant that the syntax does not tell apart."""

    def __init__(self, kind: Kind, tokenizer: Tokenizer):
        self.kind, self._tokenizer = kind, tokenizer

    def parse(self, text: str, tools: list[dict] | None = None) -> tuple[str, list[Call]]:
        """The content and the calls of a whole text."""
        stream = self.stream(tools)
        events = [*stream.push(text), *stream.finish()]
        names = [event.name for event in events if isinstance(event, CallBegun)]
        arguments = [event.piece for event in events if isinstance(event, CallArguments)]
        return "".join(event.text for event in events if isinstance(event, Content)), list(map(Call, names, arguments))

    def stream(self, tools: list[dict] | None = None) -> CallStream:
        """`parse` of a text that comes in pieces."""
        return CallStream(self.kind, dict(schemas_of(tools or [])))

    def spelled(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Control tokens that must stand in the text."""
        return frozenset(tokenizer.token_id(mark) for mark in self.kind.marks) & tokenizer.control_tokens.keys()

    def grammar(self, functions: list[dict], several: bool = True) -> str:
        """A grammar (runtime/structured.py) of replies that are calls of these functions (name, parameters) and nothing else."""
        call, between = self.kind.grammar(list(schemas_of(functions)), self._mark)
        return f"start: call{f' ({between} call)*' if several else ''}\ncall: {call}\n"

    def _mark(self, mark: str) -> str:
        """A mark as a grammar has it: a control token, or a text."""
        token = self._tokenizer.token_id(mark)
        return f"<[{token}]>" if token in self._tokenizer.control_tokens else quoted(mark)


class CallStream:
    """Reads content and calls out of a text in pieces: the events of `push` and at last `finish` are the same, joined, however
    the text is cut."""

    def __init__(self, kind: Kind, schemas: Schemas):
        self._kind, self._schemas = kind, schemas
        self._held = ""                           # text that waits
        self._space = ""                          # white space before it, which is none if it is a call
        self._in_call = self._said = False        # whether a call may have begun; whether there was content
        self._calls = 0
        self._behind = False                      # right behind a call

    def push(self, text: str) -> list[Event]:
        """What a piece of text adds."""
        self._held += text
        if self._in_call and _CLOSING.isdisjoint(text):
            return []                             # which ends nothing
        return self._run(last=False)

    def finish(self) -> list[Event]:
        """What waited for more."""
        return self._run(last=True)

    def _run(self, last: bool) -> list[Event]:
        events: list[Event] = []
        while self._call(events, last) if self._in_call else self._content(events, last):
            pass
        return events

    def _content(self, events: list[Event], last: bool) -> bool:
        """Give what is content; whether a call may begin behind it."""
        if self._behind:
            self._held = self._held.lstrip(f" \t\r\n{self._kind.between}")
            self._behind = not self._held
        place, waits = self._opening()
        if place >= 0:
            content = self._held[:place].rstrip()
            self._space, self._in_call = self._held[len(content):place], True
            self._held = self._held[place:]
        else:
            content = self._held if last else self._held[:len(self._held) - waits].rstrip()
            self._held = self._held[len(content):]
        self._say(events, content)
        return place >= 0

    def _opening(self) -> tuple[int, int]:
        """Where a call may begin in the text that waits (-1: nowhere), and how much at its end may become its beginning."""
        text, opening = self._held, self._kind.opening
        if not self._kind.first:
            return text.find(opening), overlap(text, opening)
        if self._said:
            return -1, 0
        bare = text.lstrip()
        starts = (opening, "{")
        if bare.startswith(starts):
            return len(text) - len(bare), 0
        return -1, len(text) if any(start.startswith(bare) for start in starts) else 0

    def _call(self, events: list[Event], last: bool) -> bool:
        """Give the call that waits, or its mark as content; whether either was done."""
        try:
            found = self._kind.read(self._held, last, self._schemas)
        except (ValueError, RecursionError):      # Miss, and what json says of numbers and depths
            length = len(self._kind.opening) if self._held.startswith(self._kind.opening) else 1
            self._say(events, self._space + self._held[:length])
            self._held, self._space, self._in_call = self._held[length:], "", False
            return True
        if found is None:
            return False
        end, calls = found
        for call in calls:
            events += [CallBegun(self._calls, call.name), CallArguments(self._calls, call.arguments)]
            self._calls += 1
        self._held, self._space, self._in_call, self._behind = self._held[end:], "", False, True
        return True

    def _say(self, events: list[Event], text: str) -> None:
        if text:
            self._said = True
            events.append(Content(text))


def delimited(opening: str, end: str, parse: Callable[[str, Schemas], list[Call]]):
    """The `read` of a syntax whose calls stand between two marks. parse: of what is between; raises Miss, and Unfinished where it
    ends inside a value. At the end of a reply the second mark may be missing."""
    def read(text: str, last: bool, schemas: Schemas) -> tuple[int, list[Call]] | None:
        place = len(opening)
        while (stop := text.find(end, place)) >= 0:
            try:
                return stop + len(end), parse(text[len(opening):stop], schemas)
            except Unfinished:
                place = stop + 1
        return (len(text), parse(text[len(opening):], schemas)) if last else None
    return read


def checked(name: object) -> str:
    """A function's name. Raises Miss for what is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Miss(f"no function's name: {name!r:.60}")
    return name


def schemas_of(tools: list[dict]):
    """(name, schema of the arguments) of each tool."""
    for tool in tools:
        function = tool.get("function") or tool
        schema = function.get("parameters")
        yield function.get("name"), {"type": "object", **(schema if isinstance(schema, dict) else {})}


def quoted(text: str) -> str:
    """A text as a grammar's literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
