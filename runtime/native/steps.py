"""What the core is told in a pass of a cache's rows, and where it answers: one token of each row, or several, a different number of
each, as guesses are checked (runtime/speculation).

Kept from pass to pass, with its addresses: weights have just driven Python out of the CPU's caches, where each call of numpy costs
ten times as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..sampling import MOST_CANDIDATES, Sampler
from . import library

if TYPE_CHECKING:
    from .backend import NativeCache

MOST = 32                         # tokens of a ragged pass


class Step:
    """A step of one token a row of a NativeCache."""

    def __init__(self, cache: NativeCache):
        rows, self._vocab = cache.rows, cache.backend.vocab
        self.numbers = np.empty((6, rows), np.int32)          # tokens, rows, slots, whose logits are wanted, copies of states
        self.numbers[1], self.numbers[3] = np.arange(cache.start, cache.start + rows), np.arange(rows)
        self.at = [row.ctypes.data for row in self.numbers]
        self.states = library.States(cache.storage.states.ctypes.data, *self.at[4:]) if cache.states else None
        self.logits, self.choices = np.empty((rows, self._vocab), np.float32), (library.Choice * rows)()
        self.logits_at = self.logits.ctypes.data
        self.found: list = list(self.logits)                  # of each row: its logits, or the ids and logits that are sought
        self._sought: list = [(None, 0)] * rows

    def seek(self, samplers: list[Sampler]) -> None:
        """The core is to find what these samplers choose among."""
        for row, (sampler, before) in enumerate(zip(samplers, self._sought, strict=True)):
            sought = sampler, min(sampler.candidates, self._vocab)
            if sought[0] is before[0] and sought[1] == before[1]:
                continue
            self._sought[row], count = sought, sought[1]      # keeps the sampler, whose penalties the core reads
            ids, values = np.empty(count, np.int32), np.empty(count, np.float32)
            choice = library.Choice(k=count, index=ids.ctypes.data, value=values.ctypes.data)
            self.found[row] = (ids, values) if count else self.logits[row]
            if count and (penalties := sampler.penalties(self._vocab)):
                options, counts, seen = penalties
                choice.repetition, choice.presence, choice.frequency = (
                    options.repetition_penalty, options.presence_penalty, options.frequency_penalty)
                choice.counts, choice.seen = counts.ctypes.data, seen.ctypes.data
            self.choices[row] = choice


class Ragged:
    """A pass of up to MOST tokens. start: the cache's first row among its storage's; states: the address of its recurrent layers', or
    None."""

    def __init__(self, start: int, states: int | None):
        self._start = start
        self.numbers = np.empty((6, MOST), np.int32)          # tokens, rows, slots, whose logits are wanted, copies of states
        self.at = [row.ctypes.data for row in self.numbers]
        self.states = library.States(states, *self.at[4:]) if states else None
        self.choices = (library.Choice * MOST)()
        self._ids, self._values = np.empty((MOST, MOST_CANDIDATES), np.int32), np.empty((MOST, MOST_CANDIDATES), np.float32)
        for choice, ids, values in zip(self.choices, self._ids, self._values):
            choice.index, choice.value = ids.ctypes.data, values.ctypes.data

    def tell(self, feeds: list[list[int]], slots: list[int], firsts: list[int], samplers: list[Sampler], vocab: int) -> list[int]:
        """What the core is to run: feeds[r] at slots[r] on of row r, and to find after each from firsts[r] on. Gives how many tokens of
        each place are sought, 0 where all logits are wanted."""
        tokens, rows, places, wanted, sought = [], [], [], [], []
        for row, (feed, slot, first, sampler) in enumerate(zip(feeds, slots, firsts, samplers)):
            wanted += range(len(tokens) + first, len(tokens) + len(feed))
            tokens += feed
            rows += [self._start + row] * len(feed)
            places += range(slot, slot + len(feed))
            # Penalties of a later place depend on what is chosen at an earlier one.
            sought += [0 if sampler.penalizes else min(sampler.candidates, vocab)] * (len(feed) - first)
        for line, values in zip(self.numbers, (tokens, rows, places, wanted)):
            line[:len(values)] = values
        for choice, count in zip(self.choices, sought):
            choice.k = count
        return sought

    def found(self, place: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits of the candidates of the place."""
        return self._ids[place, :count], self._values[place, :count]
