"""One pass over rows of which some have guesses: what `decode.advance` does where a sequence has a drafter.

Rows with guesses go beside rows without; a row without is one whose plan says so, or that has no drafter. Every sequence gains at
least a token. Afterwards a row holds what its reply says, all but the last token: guesses that failed are cut off again. The state
of recurrent layers goes back to where it was before the pass instead, so what did hold is read again in the next pass, which
guesses nothing in that row.

A backend with `check_rows` (native/backend.py) takes a different number of tokens of each row. Elsewhere the pass is as wide as the
widest row, and where the graph takes several new tokens of only so many rows (`max_chunk_rows`), more rows go without guesses.
"""

from __future__ import annotations

import time

import numpy as np

from .. import decode
from ..backend import Backend, Cache
from ..errors import UserError
from .pace import MOST, MOST_TOKENS


def advance(backend: Backend, cache: Cache, sequences: list[decode.Sequence], most: int | None = None) -> list[UserError | None]:
    """See `decode.advance`. most: tokens that a row may take in at most."""
    if all(s.drafter is None or s.drafter.rest for s in sequences):
        return _rested(backend, cache, sequences)
    rows, together = len(sequences), hasattr(backend, "check_rows")
    alone = not together and rows > (backend.max_chunk_rows or rows)
    if alone:
        _catch_up(backend, cache, sequences)
    lengths = cache.lengths.tolist()
    behind = [len(s.prompt) + len(s.tokens) - length for s, length in zip(sequences, lengths)]        # tokens to be read
    pace = next(s.drafter.pace for s in sequences if s.drafter)
    looked = time.perf_counter()
    guesses = _guesses(backend, cache, sequences, lengths, behind, 1 if alone or rows >= MOST_TOKENS else most, pace)
    extra, began = sum(behind) - rows + sum(map(len, guesses)), time.perf_counter()
    if not extra:                                 # a plain step, which this may not make slower: what is done here costs ten times what
        found = decode.choices(backend, cache, sequences)        # it does elsewhere, since weights have driven Python out of the caches
        ran, rest = time.perf_counter(), pace.rest(rows)
        pace.stepped(rows, ran - began)
        errors = [_settle(cache, row, sequence, [], [one], 0, 1.0) for row, (sequence, one) in enumerate(zip(sequences, found))]
        for sequence in sequences:
            if sequence.drafter:
                sequence.drafter.rest = 0 if sequence.drafter.account.pay(pace.look(rows)) else rest
        pace.looked(rows, time.perf_counter() - ran + began - looked)
        return errors
    feeds = [s.tokens[-n:] + guess for s, n, guess in zip(sequences, behind, guesses)]
    found = _checked(backend, cache, sequences, feeds, [n - 1 for n in behind])
    ran, wide = time.perf_counter(), extra if together else rows * (max(map(len, feeds)) - 1)
    pace.passed(rows, wide, ran - began)
    cost = pace.ratio(rows, wide) + pace.look(rows) - 1
    if any(guess and s.drafter.seconds for s, guess in zip(sequences, guesses)):
        cost += (began - looked) / (pace.step(rows) or ran - began)
    return [_settle(cache, row, sequence, guesses[row], found[row], lengths[row], 1 + cost * (behind[row] - 1 + len(guesses[row])) / extra)
            for row, sequence in enumerate(sequences)]


def _rested(backend: Backend, cache: Cache, sequences: list[decode.Sequence]) -> list[UserError | None]:
    """A plain step as if nobody guessed: where nothing was found worth a guess, looking again at once would cost more than it brings."""
    found = decode.choices(backend, cache, sequences)
    for sequence in sequences:
        if sequence.drafter:
            sequence.drafter.rested()
    return [decode.accept(sequence, one) for sequence, one in zip(sequences, found)]


def _guesses(backend: Backend, cache: Cache, sequences, lengths, behind, most, pace) -> list[list[int]]:
    """What is guessed of each row, and worth to be checked. most 1: nothing, but what comes is compared with what would have been."""
    together = hasattr(backend, "check_rows")
    room = []
    for sequence, length, n in zip(sequences, lengths, behind):
        left = min(cache.capacity - length, most or MOST_TOKENS, backend.chunk or MOST_TOKENS) - n
        room.append(min(left, sequence.max_new_tokens - len(sequence.tokens) - 1, MOST) if sequence.drafter and n == 1 else 0)
    if not together:                              # what pads a row lies in the cache, and in the context, too
        width = min(min(cache.capacity - length, len(s.prompt) + s.max_new_tokens - length) for s, length in zip(sequences, lengths))
        room = [min(left, width - 1) for left in room]
    chances = [s.drafter.look(s.tokens, max(1, left))[:max(0, left)] if s.drafter else [] for s, left in zip(sequences, room)]
    if not any(chances) or max(behind) > 1:      # in a pass that reads something again nobody guesses
        return [[] for _ in sequences]
    drafters = [s.drafter for s in sequences]
    seconds = max((d.seconds for d, chance in zip(drafters, chances) if chance), default=0.0)
    spare = [d.account.spare if d else 0.0 for d in drafters]
    counts = pace.plan(chances, spare, seconds=seconds, together=together, again=bool(cache.states))
    return [d.guess(count, s.sampler.constraint) if count else [] for d, s, count in zip(drafters, sequences, counts)]


def _checked(backend: Backend, cache: Cache, sequences, feeds: list[list[int]], firsts: list[int]) -> list:
    """Append feeds[r] to row r; for each row what is chosen from after each of its tokens from firsts[r] on."""
    if hasattr(backend, "check_rows") and sum(map(len, feeds)) <= MOST_TOKENS:
        return backend.check_rows(cache, feeds, firsts, [s.sampler for s in sequences])
    counts = np.array([len(feed) for feed in feeds])
    tokens, first = np.zeros((len(feeds), counts.max()), np.int64), np.array(firsts)
    for row, feed in enumerate(feeds):
        tokens[row, :len(feed)] = feed
    wanted = np.minimum(first[:, None] + np.arange((counts - first).max()), counts[:, None] - 1)
    found = decode.append(backend, cache, tokens, counts, wanted)
    return [found[row, :count - start] for row, (count, start) in enumerate(zip(counts, firsts))]


def _catch_up(backend: Backend, cache: Cache, sequences: list[decode.Sequence]) -> None:
    """Read what rows of recurrent layers lack, each on its own, up to the last token: which can then go through with the others'."""
    for row, sequence in enumerate(sequences):
        missing = len(sequence.prompt) + len(sequence.tokens) - int(cache.lengths[row])
        if missing > 1:
            feed = np.array([sequence.tokens[-missing:-1]])
            decode.append(backend, cache.view(row, row + 1), feed, missing - 1, np.array([[missing - 2]]))


def _settle(cache: Cache, row: int, sequence: decode.Sequence, guess: list[int], found, before: int, cost: float) -> UserError | None:
    """Choose this row's tokens as far as the guess holds, and one more; cut off what failed."""
    had, held, error = len(sequence.tokens), 0, None
    for one in found:
        if (error := decode.accept(sequence, one)) or sequence.finish_reason:
            break
        if held == len(guess) or sequence.tokens[-1] != guess[held]:
            break
        held += 1
    if held < len(guess):
        cache.truncate(row, before if cache.states else int(cache.lengths[row]) - len(guess) + held)
    if sequence.drafter:
        gained = sequence.tokens[had:]
        sequence.drafter.settle(gained, bool(guess))
        sequence.drafter.account.book(len(gained), cost)
    return error
