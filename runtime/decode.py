"""The decode loop: prompts go into the cache, then every sequence gains a token a step until all are finished.

Deals in token ids, above the backend interface alone; it knows nothing of text and nothing of engines. A server that
lets sequences come and go can be written from the same parts: `prefill` rows, `step` a view, `Sequence.accept` each row.
What is measured goes through `logits`: tokens of one sequence in, what the model says after each of them out.

Prompts are right-padded and run together as long as the padded tokens of a call stay within `PREFILL_TOKENS`, which
bounds the activations' memory; a longer one, or one longer than the backend's chunk, goes through in chunks, on its row's own
view. Several samples of one prompt share its prefill: the row is forked. Rows of finished sequences are filled from the end, so that a step costs
only what the live rows cost. Every row sees only itself, so what a prompt gives does not depend on its neighbours,
except that kernels may round differently for another number of rows: where two logits are nearly equal, a greedy token
may then differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .backend import Backend, Cache
from .errors import DeviceError, UserError
from .sampling import Sampler, TokenLogprobs, token_logprobs

if TYPE_CHECKING:
    from .speculation.drafter import Drafter

PREFILL_TOKENS = 512              # padded tokens of one call
CAPACITY_STEP = 64                # capacities are multiples of this
FIRST_TOKENS = 256                # room for new tokens that a cache begins with; it grows when a reply outlasts it
BURST_S = 0.02                    # how long a lone sequence may go on before its tokens are shown


@dataclass(eq=False)
class Sequence:
    """One reply in the making.

    prompt: int64 [n], n >= 1. stop_tokens end the reply and are not part of it. finish_reason: None while it goes on,
    "stop" (a stop token, or the end of what the sampler's constraint allows), or "length" at max_new_tokens; whoever consumes
    the loop may set it, and the sequence ends there.
    """

    prompt: np.ndarray
    sampler: Sampler
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)      # time.perf_counter() at each token
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    drafter: Drafter | None = None                        # who guesses its next tokens (speculation/drafter.py); None: nobody

    @property
    def context(self) -> np.ndarray:
        """The prompt and the tokens so far: int64 [n]."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int64)])

    def accept(self, found: np.ndarray | tuple[np.ndarray, np.ndarray]) -> None:
        """Choose the next token from float32 logits [vocab], or from ids and logits of `sampler.candidates` candidates; append it or
        finish."""
        if isinstance(found, tuple):
            self._append(self.sampler.choose_among(*found))
        elif self._append(self.sampler.choose(found)) and self.sampler.options.logprobs is not None:
            self.logprobs.append(token_logprobs(found, self.tokens[-1], self.sampler.options.logprobs))

    def _append(self, token: int) -> bool:
        if token in self.stop_tokens:
            self.finish_reason = "stop"
            return False
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        if len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.sampler.constraint is not None and self.sampler.constraint.done:
            self.finish_reason = "stop"
        return True


def first_capacity(sequences: list[Sequence]) -> int:
    """Slots a cache for these sequences begins with."""
    return _rounded(max(len(s.prompt) + min(s.max_new_tokens, len(s.tokens) + FIRST_TOKENS) for s in sequences))


def last_capacity(sequences: list[Sequence]) -> int:
    """Slots it has grown to when every sequence is as long as it may become."""
    return _rounded(max(len(s.prompt) + s.max_new_tokens for s in sequences))


def run(backend: Backend, cache: Cache, sequences: list[Sequence], samples: int = 1) -> Iterator[Sequence]:
    """Decode all sequences to their end; yields a sequence each time it gained a token (a lone one: or several) or finished.

    A sequence that has tokens already goes on after them. cache: empty, one row for each sequence. With several samples of
    each of P prompts, `sequences` holds all first samples, then all second ones: sequences[i] continues the prompt of
    sequences[i % P].
    """
    prompts = len(sequences) // samples
    found = prefill(backend, cache.view(0, prompts), [s.context for s in sequences[:prompts]])
    for row in range(prompts, len(sequences)):
        cache.fork(row % prompts, row)
    if samples > 1:
        found = found[np.arange(len(sequences)) % prompts]
    live, rows = list(sequences), cache
    errors = [accept(sequence, found[row]) for row, sequence in enumerate(live)]
    while True:
        for sequence, error in zip(live, errors):
            if error:
                raise error
            yield sequence
        if any(sequence.finish_reason for sequence in live):
            _close_gaps(cache, live)
            if not live:
                return
            rows = cache.view(0, len(live))
        if int(rows.lengths.max()) >= rows.capacity:
            cache.grow(min(2 * cache.capacity, last_capacity(live)))
            rows = cache.view(0, len(live))
        alone = len(live) == 1 and hasattr(backend, "step_rows")         # as fast as that, showing each token would cost
        errors = [burst(backend, rows, live[0])] if alone else advance(backend, rows, live)


def prefill(backend: Backend, cache: Cache, prompts: list[np.ndarray]) -> np.ndarray:
    """Append prompts[r] (int64, not empty) to row r of `cache`; float32 logits [rows, vocab] after each last token.

    The result is valid until the next call with `cache`.
    """
    parts, start = [], 0
    while start < len(prompts):
        stop, longest = start + 1, len(prompts[start])
        while stop < len(prompts) and _together(backend, cache, start, stop + 1, max(longest, len(prompts[stop]))):
            longest, stop = max(longest, len(prompts[stop])), stop + 1
        parts.append((cache.view(start, stop), prompts[start:stop]))
        start = stop
    if len(parts) == 1:
        return _feed(backend, *parts[0])
    return np.concatenate([_feed(backend, view, some).copy() for view, some in parts])


def step(backend: Backend, cache: Cache, tokens: np.ndarray) -> np.ndarray:
    """Append one token (int64 [rows]) to every row; float32 logits [rows, vocab], valid until the next call with `cache`."""
    return append(backend, cache, tokens[:, None], 1, np.zeros((len(tokens), 1), np.int64))[:, 0]


def choices(backend: Backend, cache: Cache, sequences: list[Sequence]) -> list | np.ndarray:
    """Append the last token of sequences[r] to row r; what `sequences[r].accept` chooses the next one from, for each."""
    tokens = np.array([sequence.tokens[-1] for sequence in sequences])
    if hasattr(backend, "step_rows"):
        return backend.step_rows(cache, tokens, [sequence.sampler for sequence in sequences])
    return step(backend, cache, tokens)


def accept(sequence: Sequence, found: np.ndarray | tuple[np.ndarray, np.ndarray]) -> UserError | None:
    """`sequence.accept`; gives what it raises, which ends this reply and no other."""
    try:
        sequence.accept(found)
    except DeviceError:
        raise
    except UserError as error:
        return error


def advance(backend: Backend, cache: Cache, sequences: list[Sequence], most: int | None = None) -> list[UserError | None]:
    """One pass: sequences[r], which row r holds but for its last token, gains a token, or as many as were guessed right.

    most: tokens that a row may take in. Gives for each what ends it, or None: then it goes on, or has a `finish_reason`.
    """
    if any(sequence.drafter for sequence in sequences):
        from .speculation.turn import advance as speculate       # which who never guesses need not load
        return speculate(backend, cache, sequences, most)
    return [accept(sequence, found) for sequence, found in zip(sequences, choices(backend, cache, sequences))]


def burst(backend: Backend, cache: Cache, sequence: Sequence, most: int | None = None) -> UserError | None:
    """Steps of a lone sequence for about BURST_S, until `most` tokens are taken in or the cache is full: its tokens are in `sequence`.
    Gives what ends it, or None."""
    end = cache.capacity if most is None else min(cache.capacity, int(cache.lengths[0]) + most)

    def steps() -> UserError | None:
        until = time.perf_counter() + BURST_S
        while (left := end - int(cache.lengths[0])) > 0:
            error, = advance(backend, cache, [sequence], left)
            if error or sequence.finish_reason or sequence.times[-1] > until:
                return error

    within = getattr(backend, "within", None)     # where steps have a thread of their own
    return within(steps) if within else steps()


def logits(backend: Backend, tokens: np.ndarray, first: int = 0, cache: Cache | None = None) -> np.ndarray:
    """Append tokens (int64 [n]) in one call, or as many as the backend's chunk asks for, to the one row of `cache` (None: a new one);
    float32 logits [n - first, vocab] after each token from index `first` on, valid until the next call with `cache`."""
    cache = backend.new_cache(1, len(tokens)) if cache is None else cache
    step, parts = backend.chunk or len(tokens), []
    for start in range(0, len(tokens), step):
        chunk = tokens[start:start + step]
        found = append(backend, cache, chunk[None], len(chunk), np.arange(max(first - start, 0), len(chunk))[None])[0]
        parts.append(found if len(chunk) == len(tokens) else found.copy())
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def append(backend: Backend, cache: Cache, tokens: np.ndarray, counts: np.ndarray | int,
            wanted: np.ndarray) -> np.ndarray:
    """Append to every row its first `counts` of tokens [rows, s]; logits [rows, k, vocab] at `wanted` [rows, k]."""
    positions = cache.lengths[:, None] + np.arange(tokens.shape[1])
    found = backend.forward(tokens, positions, cache.lengths, wanted, cache, counts + np.zeros_like(cache.lengths))
    cache.lengths += counts
    return found


def _together(backend: Backend, cache: Cache, start: int, stop: int, longest: int) -> bool:
    """Whether one call may take these rows' prompts, padded to `longest`."""
    if (stop - start) * longest > PREFILL_TOKENS or longest > _widest(backend):
        return False
    return not cache.lengths[start:stop].any() or backend.max_chunk_rows is None or stop - start <= backend.max_chunk_rows


def _feed(backend: Backend, cache: Cache, prompts: list[np.ndarray]) -> np.ndarray:
    """`prefill` of rows that go together, in chunks where they (then it) are too long for one call."""
    longest, step = max(map(len, prompts)), _widest(backend)
    for start in range(0, longest, step):
        chunks = [prompt[start:start + step] for prompt in prompts]
        counts = np.array([len(chunk) for chunk in chunks])
        tokens = np.zeros((len(chunks), counts.max()), np.int64)
        for row, chunk in enumerate(chunks):
            tokens[row, :len(chunk)] = chunk
        found = append(backend, cache, tokens, counts, counts[:, None] - 1)
    return found[:, 0]


def _widest(backend: Backend) -> int:
    """Tokens of a row that one call may take."""
    return min(PREFILL_TOKENS, backend.chunk or PREFILL_TOKENS)


def _close_gaps(cache: Cache, live: list[Sequence]) -> None:
    """Drop finished sequences from `live`, and move the last rows into theirs, so that live rows come first."""
    for row in reversed(range(len(live))):
        if live[row].finish_reason:
            last = live.pop()
            if row < len(live):                   # everything behind `row` is live by now
                cache.fork(len(live), row)
                live[row] = last


def _rounded(tokens: int) -> int:
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
