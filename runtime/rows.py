"""The rows of one cache that many requests share: who has which, and whether there is memory for one more.

Rows being answered (`live`) lie at the beginning, so that a step of all is one call over one view; prompts being read at the
end. Whether a request is admitted is decided by bytes computed before: rows x the slots that any of them needs soon (its prompt,
its reply so far and FIRST_TOKENS more) must fit the budget. A client that names no length gets all that the context leaves, so
what replies may become at most would admit next to nobody. Where more rows or longer ones are needed than the cache has, it is
made anew and the rows move over; where there is no memory for that, somebody must leave (`extend`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import decode
from .backend import BLOCK, Backend, Cache
from .pending import Pending

_LEAST_CAPACITY = 512


@dataclass(eq=False)
class Row:
    """A request that runs. context: int64 [n], what is to be read before its next token is chosen; index: of its row in the
    cache; read: tokens of the context that the row holds, None before it was begun."""

    pending: Pending
    context: np.ndarray
    index: int
    read: int | None = None

    @property
    def sequence(self) -> decode.Sequence:
        return self.pending.draft.sequence

    @property
    def scores(self) -> bool:
        """Whether the prompt's own log probabilities are still to be told: then all of it is read."""
        return self.pending.wants_prompt is not None and not self.sequence.tokens

    @property
    def capacity(self) -> int:
        """Slots that it needs soon."""
        return decode.first_capacity([self.sequence])


class Rows:
    """At most `most` rows of `backend`. bytes_of(rows, capacity): of its caches; budget: what they may take, None: no limit."""

    def __init__(self, backend: Backend, most: int, bytes_of: Callable[[int, int], int], budget: int | None):
        self.backend, self.most, self._bytes_of, self._budget = backend, most, bytes_of, budget
        self.live: list[Row] = []                 # live[i] has row i of the cache
        self.reading: list[Row] = []              # whose turn it is, first
        self.cache: Cache | None = None
        self._view: Cache | None = None

    @property
    def all(self) -> list[Row]:
        return self.live + self.reading

    @property
    def nbytes(self) -> int:
        """Of the cache, as far as it can become filled."""
        return self._bytes_of(self.cache.rows, self.cache.capacity) if self.cache else 0

    @property
    def view(self) -> Cache:
        """The live rows: the same object until they change, since backends keep bindings with it."""
        if self._view is None:
            self._view = self.cache.view(0, len(self.live))
        return self._view

    def admit(self, pending: Pending) -> bool:
        """Give it a row, to be read; False: there is no row, or no memory, for it now."""
        soon = max([decode.first_capacity([pending.draft.sequence]), *(row.capacity for row in self.all)])
        if len(self.all) == self.most or not self._make_room(len(self.all) + 1, soon):
            return False
        used = {row.index for row in self.all}
        index = next(i for i in reversed(range(self.cache.rows)) if i not in used)
        self.cache.truncate(index, 0)
        self.reading.append(Row(pending, pending.draft.sequence.context, index))
        return True

    def answer(self, row: Row) -> None:
        """Its prompt has been read: it goes behind the live rows."""
        self.reading.remove(row)
        source, row.index = row.index, len(self.live)
        there = next((other for other in self.reading if other.index == row.index), None)
        kept = _take(self.cache, row.index) if there else None
        self.cache.fork(source, row.index)
        if there:                                 # they change places
            _put(self.cache, source, kept)
            there.index = source
        self.live.append(row)
        self._view = None

    def leave(self, row: Row) -> None:
        """Its row is free: the last of the live rows takes its place."""
        if row in self.reading:
            self.reading.remove(row)
            return
        last = self.live.pop()
        if last is not row:
            self.cache.fork(last.index, row.index)
            self.live[row.index], last.index = last, row.index
        self._view = None

    def extend(self) -> bool:
        """Have room for the next token of every live row; False: there is no memory for so many rows."""
        if int(self.view.lengths.max()) < self.cache.capacity:
            return True
        return self._make_room(len(self.all), max(row.capacity for row in self.all))

    def _make_room(self, rows: int, capacity: int) -> bool:
        """Have a cache of at least this size; False: there is no memory for it now."""
        if not self._fits(rows, capacity):
            return False
        if self.cache is None or self.cache.rows < rows or self.cache.capacity < capacity:
            most, larger = self.most, max(_LEAST_CAPACITY, 1 << (capacity - 1).bit_length())      # so as not to be made anew soon
            capacity = larger if self._fits(most, larger) else capacity
            while most > rows and not self._fits(most, capacity):
                most -= 1
            self._replace(self.backend.new_cache(most, capacity))
        return True

    def _fits(self, rows: int, capacity: int) -> bool:
        return self._budget is None or self._bytes_of(rows, capacity) <= self._budget

    def _replace(self, cache: Cache) -> None:
        """Move all rows over."""
        old, self.cache, self._view = self.cache, cache, None
        for number, row in enumerate(self.all):
            at = number if number < len(self.live) else cache.rows - 1 - (number - len(self.live))
            cache.adopt(old, row.index, at)
            row.index = at


def _take(cache: Cache, row: int) -> tuple:
    """What a row holds."""
    length = int(cache.lengths[row])
    stop = -(-length // BLOCK) * BLOCK
    return length, stop, cache.read(row, 0, stop) if stop else None, cache.snapshot(row)


def _put(cache: Cache, row: int, taken: tuple) -> None:
    length, stop, data, snapshot = taken
    cache.truncate(row, 0)
    if length:
        cache.write(row, 0, stop, data)
        cache.lengths[row] = length
        cache.restore(row, snapshot)
