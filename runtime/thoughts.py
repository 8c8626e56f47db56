"""What a model thought before it answered: told apart by the delimiters that its chat template knows.

A template's prompt may end inside a thought (`<think>\\n`), so that the reply has only the end of it; and a delimiter
may be a control token, of which the reply's text shows nothing. Both are looked up in the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .text import Tokenizer, overlap

_TAIL = 32                        # tokens at a prompt's end among which a thought may be opened


@dataclass(frozen=True)
class Thoughts:
    """How a model's thoughts are delimited, and what each begins with besides."""

    begin: str
    end: str
    title: str = ""

    def split(self, tokenizer: Tokenizer, prompt: np.ndarray, tokens: list[int], text: str,
              spelled: frozenset[int] = frozenset()) -> tuple[str | None, str]:
        """The thought (None: there is none) and the answer in a reply to `prompt` (ids), its `tokens` being `text`. A
        thought that has not ended has no answer yet. spelled: control tokens that stand in the text."""
        start = self._find(self.begin, tokenizer, tokens, text, spelled)
        if start is None or text[:start[0]].strip():
            if not self.opened(tokenizer, prompt):
                return None, text
            start = 0, 0
        end = self._find(self.end, tokenizer, tokens, text, spelled) or (len(text), len(text))
        thought = text[start[1]:end[0]].lstrip().removeprefix(self.title).strip()
        return thought or None, text[end[1]:].lstrip()

    def stream(self, tokenizer: Tokenizer, prompt: np.ndarray) -> ThoughtStream:
        """`split` of a text that comes in pieces, in which the control tokens of `spelled` stand."""
        return ThoughtStream(self, self.opened(tokenizer, prompt))

    def opened(self, tokenizer: Tokenizer, prompt: np.ndarray) -> bool:
        """Whether a prompt (ids) ends inside a thought."""
        tail = "".join(map(tokenizer.alone, prompt[-_TAIL:].tolist()))
        return tail.rfind(self.begin) > tail.rfind(self.end)

    def spelled(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the delimiters that are control tokens, which a reply's text does not show of itself."""
        return frozenset({tokenizer.token_id(self.begin), tokenizer.token_id(self.end)} & tokenizer.control_tokens.keys())

    def _find(self, mark: str, tokenizer: Tokenizer, tokens: list[int], text: str, spelled: frozenset[int]) -> tuple[int, int] | None:
        """Where `mark` begins and ends in the text; a control token is nothing there, unless it is spelled."""
        token = tokenizer.token_id(mark)
        if token not in tokenizer.control_tokens or token in spelled:
            place = text.find(mark)
            return None if place < 0 else (place, place + len(mark))
        if token not in tokens:
            return None
        place = len(tokenizer.decode(tokens[:tokens.index(token)]))
        return place, place


class ThoughtStream:
    """Tells thought and answer apart as the text comes: what `push` and at last `finish` give, as ("thought" or "answer",
    text), joins to what `split` gives, however the text is cut. White space and what may be a delimiter wait."""

    def __init__(self, thoughts: Thoughts, opened: bool):
        self._known, self._opened = thoughts, opened
        self._state = self._begin                 # what is done with the text that waits; None: it needs more
        self._held, self._blank = "", True        # text that waits; whether nothing of the thought was given yet

    def push(self, text: str) -> list[tuple[str, str]]:
        """What a piece of the reply's text adds."""
        self._held += text
        return self._run(last=False)

    def finish(self) -> list[tuple[str, str]]:
        """What waited."""
        return self._run(last=True)

    def _run(self, last: bool) -> list[tuple[str, str]]:
        found, state = [], None
        while state != self._state:               # until it stays where it is
            state = self._state
            kind, text = state(last)
            if text:
                found.append((kind, text))
        return found

    def _begin(self, last: bool) -> tuple[str, str]:
        begin, text = self._known.begin, self._held.lstrip()
        if text.startswith(begin):
            self._held, self._state = text[len(begin):], self._title
        elif last or not begin.startswith(text):
            self._state = self._title if self._opened else self._answer
        return "", ""

    def _title(self, last: bool) -> tuple[str, str]:
        title, text = self._known.title, self._held.lstrip()
        if text.startswith(title) or last or not title.startswith(text):
            self._held, self._state = text.removeprefix(title), self._thought
        return "", ""

    def _thought(self, last: bool) -> tuple[str, str]:
        end, text = self._known.end, self._held
        if self._blank:
            text = text.lstrip()
        thought, ended, rest = text.partition(end)
        if ended:
            self._held, self._state = rest, self._after
            thought = thought.rstrip()
        else:
            thought = text.rstrip() if last else text[:len(text) - overlap(text, end)].rstrip()
            self._held = "" if last else text[len(thought):]
        self._blank = self._blank and not thought
        return "thought", thought

    def _after(self, last: bool) -> tuple[str, str]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._answer
        return "", ""

    def _answer(self, last: bool) -> tuple[str, str]:
        text, self._held = self._held, ""
        return "answer", text


KNOWN = (Thoughts("<think>", "</think>"), Thoughts("[THINK]", "[/THINK]"),
         Thoughts("<|channel>", "<channel|>", "thought\n"))


def thoughts_of(template: str, tokenizer: Tokenizer) -> Thoughts | None:
    """Those of a model whose chat template, or vocabulary, has the delimiters; None: it does not think."""
    return next((known for known in KNOWN if known.end in template),
                next((known for known in KNOWN if tokenizer.token_id(known.end) is not None), None))
