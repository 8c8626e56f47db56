"""Guesses of a smaller model with the same tokenizer: a bundle of its own, such as a student of `compress.distill`.

    drafts = DraftModel(backend, context)        # of an engine
    source = drafts.source(sampler, 256)         # of one reply of at most 256 tokens (drafter.py)

It reads the last WINDOW tokens before its first guess, and then what the reply gains; where its cache of CAPACITY slots is full, it
begins anew with the last WINDOW. So what it costs does not grow with the prompt, and its memory is one small cache a reply. Reading
the window is not in the reply's account (pace.py): it is paid once, for replies that may become LEAST tokens long.

It draws with the reply's own next random numbers: where both models say nearly the same, they choose the same. (That beats taking
its likeliest token, and needs no accept rule of its own: what the reply chooses is drawn from the model's logits in any case.)

A draft that fails (its device, its memory) guesses no more, and nobody's reply ends for it.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from .. import decode
from ..backend import Backend, Cache
from ..errors import UserError
from ..sampling import Sampler
from .matches import Matches

WINDOW, CAPACITY, LEAST = 64, 512, 48
_KEPT = 7                         # measurements
_log = logging.getLogger(__name__)


class DraftModel:
    """What all replies share of a draft: its backend, the tokens of its context, and what a guess takes."""

    def __init__(self, backend: Backend, context: int):
        self.backend: Backend | None = backend
        self.context = context
        self._times: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """What one guess takes: the median of the last measurements."""
        return sorted(self._times)[len(self._times) // 2] if self._times else 1e-9

    def measured(self, seconds: float) -> None:
        self._times = (self._times + (seconds,))[-_KEPT:]

    def source(self, sampler: Sampler, most: int) -> ModelGuesses:
        """Of a reply with this sampler and at most so many tokens."""
        return ModelGuesses(self, sampler, most)

    def fail(self, error: Exception) -> None:
        self.backend = None
        _log.warning("the draft guesses no more: %s", error)


class ModelGuesses:
    """The source of one reply."""

    def __init__(self, model: DraftModel, sampler: Sampler, most: int):
        self._model, self._sampler, self._long = model, sampler, most >= LEAST
        self._matches: Matches | None = None
        self._cache: Cache | None = None
        self._held: list[int] = []                # tokens that the cache holds
        self._from = 0                            # of the text, where these begin

    @property
    def seconds(self) -> float:
        return self._model.seconds

    def look(self, matches: Matches, most: int) -> list[str]:
        self._matches = matches
        return ["model"] * most if self._long and self._model.backend else []

    def take(self, count: int) -> list[int]:
        try:
            return self._take(count)
        except UserError as error:
            self._model.fail(error)
            return []

    def _take(self, count: int) -> list[int]:
        backend, text = self._model.backend, self._matches.text
        self._sync(backend, text, count)
        missing, began = text[self._from + len(self._held):], time.perf_counter()
        found = decode.logits(backend, np.array(missing), len(missing) - 1, self._cache)[0]
        self._held += missing
        place = self._cache.snapshot(0) if self._cache.states else None
        sequence = decode.Sequence(np.array(missing), self._sampler.twin(), count + 1)
        sequence.accept(found)
        while len(sequence.tokens) < count:
            found, = decode.choices(backend, self._cache, [sequence])
            sequence.accept(found)
        if place:                                 # recurrent layers cannot be cut back: they read again what holds
            self._cache.restore(0, place)
        else:
            self._held += sequence.tokens[:-1]
        if len(missing) < WINDOW // 2:
            self._model.measured((time.perf_counter() - began) / count)
        return sequence.tokens

    def _sync(self, backend: Backend, text: list[int], count: int) -> None:
        """Have the cache hold what it knows of the text but for its last token, with room for the rest and `count` guesses."""
        if self._cache is None:
            self._cache, self._from = backend.new_cache(1, min(CAPACITY, self._model.context)), max(0, len(text) - WINDOW)
        same, known = 0, min(len(self._held), len(text) - 1 - self._from)
        while same < known and self._held[same] == text[self._from + same]:
            same += 1
        if len(text) - self._from + count > self._cache.capacity:
            self._from, same = max(0, len(text) - WINDOW), 0
        self._cache.truncate(0, same)
        del self._held[same:]
