"""Many requests on one opened bundle: continuous batching, above the backend interface, and nothing of HTTP.

    scheduler = Scheduler(lambda: backend, backend.cache_bytes, limits=Limits(rows=16))
    scheduler.submit(Pending(draft))             # from any thread; see pending.py for how its reply is read

One thread takes turns: give up what was cancelled or is too late; admit who waits, the highest priority first, then whose
user has the fewest rows, then who came first; read one chunk of one prompt (prompts being read take turns); one step of all
rows that are being answered. Nobody's reply depends on the others', near ties of logits aside (decode.py). A lone row with
nobody else about goes through the backend's own loop, several tokens a turn.

Which rows of the backend's cache they have, and who is admitted, is told in rows.py. When nobody has asked for IDLE_S, cache
and thread are given up.

Prompts that begin as earlier prompts or replies did pay for the difference alone (prefixes.py); one that begins as a prompt
that is just being read waits until that part is there.

Where a device fails, the next backend goes on from the tokens so far. A request that fails (a model whose logits are no
numbers, a grammar) ends alone, with its sentence.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import decode, prefix_file
from .backend import BLOCK, Backend
from .errors import DeviceError, UserError, shown
from .pending import Busy, Expired, Pending, wake_all
from .prefixes import Prefixes
from .rows import Row, Rows
from .sampling import token_logprobs

CHUNK = 128                       # tokens of a prompt between two steps of the others
IDLE_S = 5.0
_WORTH_WAITING = 64               # tokens in common with a prompt that is being read
_MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """rows: sequences at once; queue: requests that may wait; cache_mb, prefix_mb: of running rows and of kept prefixes (None:
    a part of what is free)."""

    rows: int = 16
    queue: int = 64
    cache_mb: float | None = None
    prefix_mb: float | None = None

    def __post_init__(self):
        for name, least in (("rows", 1), ("queue", 0), ("cache_mb", 0), ("prefix_mb", 0)):
            value = getattr(self, name)
            whole = name in ("rows", "queue")
            if (value is None and not whole) or isinstance(value, int if whole else (int, float)) and least <= value <= 1e12:
                continue
            raise UserError(f"{name} is {shown(value)}; it must be a {'whole ' if whole else ''}number of at least {least}")


@dataclass
class Stats:
    """What a scheduler has done since it was made, and (the first four) what it is doing."""

    queued: int = 0
    rows: int = 0
    prefix_bytes: int = 0
    cache_bytes: int = 0
    steps: int = 0
    step_rows: int = 0            # summed over the steps: by `steps`, the mean batch
    prompt_tokens: int = 0        # read or restored
    cached_tokens: int = 0        # of these restored
    new_tokens: int = 0
    guessed_tokens: int = 0       # checked in passes, of rows that have ended or waited again
    held_tokens: int = 0          # of these, right
    evictions: int = 0            # of blocks of prefixes
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    refused: int = 0              # the queue was full


class Scheduler:
    """backend: gives the present one. bytes_of(rows, capacity): of its caches. cache_bytes: what these may take (None: no limit);
    prefix_bytes: what prefixes may. step_down(failed backend, error): puts another one in its place, or raises."""

    def __init__(self, backend: Callable[[], Backend], bytes_of: Callable[[int, int], int], *, limits: Limits = Limits(),
                 cache_bytes: int | None = None, prefix_bytes: int = 512 * _MB,
                 step_down: Callable[[Backend, DeviceError], None] | None = None):
        self.limits, self.pid = limits, os.getpid()
        self._present, self._bytes_of, self._budget, self._step_down = backend, bytes_of, cache_bytes, step_down
        self._news = threading.Condition()
        self._waiting: list[Pending] = []
        self._jobs: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._closed: UserError | None = None
        self._numbers = itertools.count()
        # Of the thread alone:
        self._rows: Rows | None = None            # of the backend that was present at the last turn
        self._prefixes, self._stats = Prefixes(prefix_bytes), Stats()
        self._kept_by: Backend | None = None      # whose slots the prefixes are

    def submit(self, pending: Pending) -> Pending:
        """Take a request. Raises UserError where it could never run, or all is closed, and Busy where too many wait."""
        capacity = decode.last_capacity([pending.draft.sequence])
        if self._budget is not None and (needed := self._bytes_of(1, capacity)) > self._budget:
            raise UserError(f"the KV cache of {capacity} tokens needs {needed / _MB:.0f} MB, but requests may have {self._budget / _MB:.0f} "
                            "MB; lower max_new_tokens or shorten the prompt")
        with self._news:
            if self._closed:
                raise self._closed
            if len(self._waiting) >= self.limits.queue + self.limits.rows - len(self._running):
                self._stats.refused += 1
                raise Busy(f"{len(self._waiting)} requests wait already; try again later")
            pending.scheduler, pending.order = self, next(self._numbers)
            self._waiting.append(pending)
            self._begin()
        return pending

    def stats(self) -> Stats:
        """A copy of the counters as they are."""
        rows, prefixes = self._rows, self._prefixes
        return dataclasses.replace(self._stats, queued=len(self._waiting), rows=len(self._running), prefix_bytes=prefixes.nbytes,
                                   evictions=prefixes.evictions, cache_bytes=rows.nbytes if rows else 0)

    def save(self, path: Path | str, identity: str) -> int:
        """Write the kept prefixes to a file; returns their tokens. identity: names the model they are of. Raises UserError."""
        return self._between_turns(lambda: prefix_file.save(Path(path), f"{identity} on {self._present().name}", self._prefixes))

    def load(self, path: Path | str, identity: str) -> int:
        """Take in the prefixes of a file, as many as fit; returns their tokens. Raises UserError for a file of another model."""
        def load() -> int:
            probe = self._present().new_cache(1, BLOCK)
            return prefix_file.load(Path(path), f"{identity} on {probe.backend.name}", self._prefixes, probe)
        return self._between_turns(load)

    def forget(self) -> None:
        """Drop all kept prefixes."""
        self._between_turns(self._prefixes.clear)

    def wake(self) -> None:
        """Have a look at what was cancelled."""
        with self._news:
            self._news.notify_all()

    def close(self, error: UserError) -> None:
        """End everything with `error`, and refuse what comes; returns when the thread has ended."""
        with self._news:
            self._closed, thread = error, self._thread
            self._news.notify_all()
        if thread and thread is not threading.current_thread() and self.pid == os.getpid():
            thread.join()

    @property
    def _running(self) -> list[Row]:
        return self._rows.all if self._rows else []

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="edgewright-scheduler", daemon=True)
            self._thread.start()
        self._news.notify_all()

    def _between_turns(self, work: Callable[[], int | None]):
        """What `work` gives, run by the thread."""
        done = concurrent.futures.Future()

        def job() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        with self._news:
            if self._closed:
                raise self._closed
            self._jobs.append(job)
            self._begin()
        return done.result()

    def _run(self) -> None:
        while True:
            with self._news:
                if not (busy := self._running):
                    self._news.wait_for(lambda: self._waiting or self._jobs or self._closed, IDLE_S)
                jobs, self._jobs = self._jobs, []
                over = self._closed or not (busy or self._waiting or jobs)
                if over:
                    self._thread = None
                    self._rows = self._rows if busy else None            # with its cache
            for job in jobs:
                job()
            wake: dict = {}
            try:
                if self._closed:
                    self._end_all(self._closed, wake)
                elif not over:
                    self._turn(wake)
            except Exception as error:            # whatever it is, nobody may wait for ever
                self._end_all(error, wake)
            wake_all(wake)
            if over:
                return

    def _turn(self, wake: dict) -> None:
        self._give_up(wake)
        try:
            if self._rows is None or self._rows.backend is not self._present():
                self._start_over()
            self._admit()
            if self._rows.reading:
                self._rows.reading.append(row := self._rows.reading.pop(0))
                self._read(row, wake)
                wake_all(wake)                    # a first token need not wait for the next step
                wake.clear()
            while self._rows.live and not self._rows.extend():
                self._put_back()
            if self._rows.live:
                self._step(wake)
        except DeviceError as error:
            if self._step_down is None or self._rows is None:
                raise
            self._step_down(self._rows.backend, error.with_traceback(None))

    def _start_over(self) -> None:
        """With the present backend: where it is another than before, everybody's tokens are read again."""
        backend, running = self._present(), self._running
        if backend is not self._kept_by:
            self._prefixes.clear()
        self._kept_by, self._rows = backend, Rows(backend, self.limits.rows, self._bytes_of, self._budget)
        with self._news:
            self._waiting += [row.pending for row in running]

    def _give_up(self, wake: dict) -> None:
        now = time.monotonic()

        def over(pending: Pending) -> bool:
            return pending.cancelled or pending.deadline is not None and now > pending.deadline

        with self._news:
            late = [pending for pending in self._waiting if over(pending)]
            self._waiting = [pending for pending in self._waiting if pending not in late]
        for pending in late:
            self._count_end(pending, wake)
        for row in [row for row in self._running if over(row.pending)]:
            self._leave(row)
            self._count_end(row.pending, wake)

    def _count_end(self, pending: Pending, wake: dict) -> None:
        """Of one who was cancelled or is late."""
        self._stats.cancelled += pending.cancelled
        self._stats.expired += not pending.cancelled
        pending.end(None if pending.cancelled else Expired("the deadline has passed before the reply was whole"), wake)

    def _admit(self) -> None:
        while True:
            running = Counter(row.pending.user for row in self._rows.all)
            waiting = [pending for pending in self._waiting if not self._in_common(pending)]
            first = min(waiting, key=lambda p: (-p.priority, running[p.user], p.order), default=None)
            if first is None or not self._rows.admit(first):
                return
            with self._news:
                self._waiting.remove(first)

    def _put_back(self) -> None:
        """Replies have outgrown the memory: the last to come of the lowest priority waits again, and will go on where it is."""
        row = min(self._rows.all, key=lambda row: (row.pending.priority, -row.pending.order))
        self._leave(row)
        with self._news:
            self._waiting.append(row.pending)

    def _in_common(self, pending: Pending) -> bool:
        """Whether a prompt that is being read begins alike, so that waiting for it costs less than reading the same again."""
        if not self._prefixes.most_bytes or pending.wants_prompt is not None:
            return False
        context, most = pending.draft.sequence.context, 0
        for row in self._rows.reading:
            if row.scores:
                continue                          # which is not kept
            n = min(len(context), len(row.context))
            differs = np.flatnonzero(context[:n] != row.context[:n])
            most = max(most, int(differs[0]) if len(differs) else n)
        if most < _WORTH_WAITING:
            return False
        have = len(self._prefixes.find(context, bool(self._rows.cache.states))) * BLOCK
        return most - have >= _WORTH_WAITING

    def _read(self, row: Row, wake: dict) -> None:
        """The next chunk of its prompt; after the last one, its first token."""
        rows, cache, pending = self._rows, self._rows.cache, row.pending
        if row.read is None:
            row.read = 0 if row.scores else self._prefixes.restore(row.context, cache, row.index)
            if not row.sequence.tokens:                                  # else it had begun before
                pending.cached_tokens, pending.prompt_logprobs = row.read, []
            self._stats.prompt_tokens += len(row.context)
            self._stats.cached_tokens += row.read
        alone = not rows.live and not cache.states                       # states are kept between chunks
        most = min(decode.PREFILL_TOKENS if alone else CHUNK, rows.backend.chunk or decode.PREFILL_TOKENS)
        chunk = row.context[row.read:row.read + most]
        wanted = np.arange(len(chunk))[None] if row.scores else np.array([[len(chunk) - 1]])
        found = decode.append(rows.backend, cache.view(row.index, row.index + 1), chunk[None], len(chunk), wanted)[0]
        row.read += len(chunk)
        if row.scores:
            following = row.context[row.read - len(chunk) + 1:row.read + 1]
            pending.prompt_logprobs += [] if pending.prompt_logprobs else [None]
            pending.prompt_logprobs += pending.draft.told([token_logprobs(logits, int(token), pending.wants_prompt)
                                                           for logits, token in zip(found, following)])
        now = cache.states or self._waiting                              # who waits may begin alike
        if now:
            self._keep(row)
        if row.read == len(row.context):
            rows.answer(row)
            self._gain(row, decode.accept(row.sequence, found[-1]), wake)
            if not now and row in rows.live:                             # the first token need not wait for it
                self._keep(row)

    def _step(self, wake: dict) -> None:
        """One more token for every row that is being answered; for a lone one, some."""
        live, view, backend = list(self._rows.live), self._rows.view, self._rows.backend
        most = CHUNK - int((view.lengths % CHUNK).max()) if view.states else None      # states are kept at multiples alone
        self._stats.steps += 1
        self._stats.step_rows += len(live)
        if len(live) == 1 and not self._rows.reading and hasattr(backend, "step_rows"):
            self._gain(live[0], decode.burst(backend, view, live[0].sequence, most), wake)
        else:
            for row, error in zip(live, decode.advance(backend, view, [row.sequence for row in live], most)):
                self._gain(row, error, wake)
        for row in self._rows.live if view.states else ():               # which only these places bring back
            if self._rows.cache.lengths[row.index] % CHUNK == 0:
                self._keep(row)

    def _gain(self, row: Row, error: UserError | None, wake: dict) -> None:
        """Its sequence has a token more, or some: their text is told, and where it has ended, or with `error`, its row is free."""
        before = row.pending.draft.shown
        try:
            row.pending.gain(wake)
        except DeviceError:
            raise
        except UserError as failed:
            error = error or failed
        self._stats.new_tokens += row.pending.draft.shown - before
        if error or row.pending.finished:
            self._stats.failed += error is not None
            self._stats.finished += error is None
            self._leave(row)
            if error:
                row.pending.end(error, wake)

    def _keep(self, row: Row) -> None:
        if not row.scores:
            cache = self._rows.cache
            self._prefixes.keep(row.sequence.context[:int(cache.lengths[row.index])], cache, row.index)

    def _leave(self, row: Row) -> None:
        """It has ended: what its row holds is kept, and the row is free."""
        if row.read is not None:
            self._keep(row)
        if drafter := row.sequence.drafter:
            guessed, held = drafter.counted()
            self._stats.guessed_tokens += guessed
            self._stats.held_tokens += held
        self._rows.leave(row)

    def _end_all(self, error: Exception, wake: dict) -> None:
        with self._news:
            pending, self._waiting = [row.pending for row in self._running] + self._waiting, []
        self._rows = None
        for one in pending:
            self._stats.failed += 1
            one.end(error, wake)

