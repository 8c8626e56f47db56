"""Text to token ids and back, as pieces that can be shown while they are made.

`Tokenizer` reads a `tokenizer.json` through the `tokenizers` library. `Detokenizer` turns one token after another into
text that never ends in half a character, and whose pieces join to exactly `decode` of all the tokens. `StopStrings`
cuts that text at the first stop string to be complete, however tokens split it, and holds back only what may still
become one.

How `Detokenizer` stays exact and cheap: it decodes a window of the last tokens only, once without and once with the
new ones, and emits what has been added. The tokens already shown stay in the window as context, because some decoders
treat the first token of a text differently (a leading space). A window that ends in U+FFFD may end in half a character
and waits. Sentencepiece's byte fallback is the one decoder for which whole-text decoding depends on what follows: there
a reply cut off inside a character keeps the complete ones before it, which `decode` of all tokens would lose too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers

from runtime.errors import UserError

_REPLACEMENT = "\ufffd"           # what decoders write for bytes that are no character (yet)


class Tokenizer:
    """Text <-> token ids. Raises UserError where the file is no tokenizer."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                # the library raises bare Exception
            raise UserError(f"{path}: is no tokenizer that `tokenizers` {tokenizers.__version__} reads ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special_tokens: bool = True) -> np.ndarray:
        """int64 ids of `text`; `special_tokens` adds those the tokenizer puts around a text (BOS), where it has any.
        Special tokens spelled out in the text are recognized either way. Raises UserError for lone surrogates."""
        if not isinstance(text, str):
            raise UserError(f"the prompt is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                            f"{error.start}, which is half a character; remove it") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids, np.int64)

    def decode(self, ids) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_text(self, token: int) -> str | None:
        """A token as the vocabulary spells it, special tokens included; None: no such token."""
        return self._tokenizer.id_to_token(token)


class Detokenizer:
    """Turns the tokens of one reply into text, piece by piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._window: list[int] = []      # tokens already shown, for context, then those not yet shown
        self._shown = 0                   # how many of them have been shown
        self._context = ""                # text of those

    def push(self, token: int) -> str:
        """Text that `token` completes; "" while it ends inside a character."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._context) or text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._context):]
        self._window = self._window[self._shown:]
        self._shown = len(self._window)
        self._context = self._decode(self._window)
        return piece

    def finish(self) -> str:
        """What was held back: the incomplete character at the end, as U+FFFD, or a U+FFFD that is really there."""
        piece = self._decode(self._window)[len(self._context):]
        self._window, self._shown, self._context = [], 0, ""
        return piece


class StopStrings:
    """Passes text through until one of `stops` is complete; the stop string itself is left out."""

    def __init__(self, stops: tuple[str, ...] = ()):
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UserError(f"stop strings are {stops!r}; each must be text of at least one character")
        self._stops = stops
        self._held = ""                   # the end of the text, which may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string is complete. Call no more after it is."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            return text[:min(found)[1]], True          # complete first; of those, the longest
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept:]
        return text[:len(text) - kept], False

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
