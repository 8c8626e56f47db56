"""What a model thought before it answered: told apart by the delimiters that its chat template knows.

A template's prompt may end inside a thought (`<think>\\n`), so that the reply has only the end of it; and a delimiter
may be a control token, of which the reply's text shows nothing. Both are looked up in the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .text import Tokenizer

_TAIL = 32                        # tokens at a prompt's end among which a thought may be opened


@dataclass(frozen=True)
class Thoughts:
    """How a model's thoughts are delimited, and what each begins with besides."""

    begin: str
    end: str
    title: str = ""

    def split(self, tokenizer: Tokenizer, prompt: np.ndarray, tokens: list[int], text: str) -> tuple[str | None, str]:
        """The thought (None: there is none) and the answer in a reply to `prompt` (ids), its `tokens` being `text`. A
        thought that has not ended has no answer yet."""
        start = self._find(self.begin, tokenizer, tokens, text)
        if start is None or text[:start[0]].strip():
            tail = "".join(map(tokenizer.alone, prompt[-_TAIL:].tolist()))
            if tail.rfind(self.begin) <= tail.rfind(self.end):
                return None, text
            start = 0, 0
        end = self._find(self.end, tokenizer, tokens, text) or (len(text), len(text))
        thought = text[start[1]:end[0]].lstrip().removeprefix(self.title).strip()
        return thought or None, text[end[1]:].lstrip()

    def _find(self, mark: str, tokenizer: Tokenizer, tokens: list[int], text: str) -> tuple[int, int] | None:
        """Where `mark` begins and ends in the text; a control token is nothing there."""
        token = tokenizer.token_id(mark)
        if token not in tokenizer.control_tokens:
            place = text.find(mark)
            return None if place < 0 else (place, place + len(mark))
        if token not in tokens:
            return None
        place = len(tokenizer.decode(tokens[:tokens.index(token)]))
        return place, place


KNOWN = (Thoughts("<think>", "</think>"), Thoughts("[THINK]", "[/THINK]"),
         Thoughts("<|channel>", "<channel|>", "thought\n"))


def thoughts_of(template: str, tokenizer: Tokenizer) -> Thoughts | None:
    """Those of a model whose chat template, or vocabulary, has the delimiters; None: it does not think."""
    return next((known for known in KNOWN if known.end in template),
                next((known for known in KNOWN if tokenizer.token_id(known.end) is not None), None))
