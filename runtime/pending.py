"""A submitted request, from any thread or event loop: its reply as it is made.

    pending = engine.submit("Once upon a time", max_new_tokens=64)
    for text in pending: ...                     # or: async for text in pending
    reply = pending.result(timeout=10)           # or: await pending.reply_async()
    pending.cancel()

The scheduler's thread feeds it; whoever reads takes all that came since the last look, so a slow reader holds nobody up and
keeps no queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import UserError
from .reply import Draft, Reply
from .sampling import TokenLogprobs

if TYPE_CHECKING:
    import asyncio                                # which an app without an event loop need not load

    from .scheduler import Scheduler


class Busy(UserError):
    """The queue is full: the request was not taken, and may be sent again later."""


class Expired(UserError):
    """The request's deadline has passed before its reply was whole."""


class Piece(NamedTuple):
    """What a reply has gained: text (which may be none yet), its tokens, and their log probabilities where asked for."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]


class Pending:
    """See the module. priority: the larger, the sooner; deadline: of time.monotonic(), or None; user: who shares turns;
    prompt_logprobs: likeliest tokens to tell at each of the prompt's, or None.

    Of the prompt, once it was read: `cached_tokens`, how many had been read before, and `prompt_logprobs`, one entry a
    token (the first None), if asked. `error`: what it ended with, or None.
    """

    def __init__(self, draft: Draft, *, priority: float = 0, deadline: float | None = None, user: str = "",
                 prompt_logprobs: int | None = None):
        draft.start = time.perf_counter()
        self.draft, self.priority, self.deadline, self.user, self.wants_prompt = draft, priority, deadline, user, prompt_logprobs
        self.order = 0                            # of arrival, from the scheduler that took it
        self.scheduler: Scheduler | None = None
        self.cached_tokens, self.prompt_logprobs = 0, []
        self.finished, self.error, self.cancelled = False, None, False
        self._changed = threading.Condition()
        self._texts: list[str] = []               # not yet taken
        self._taken = 0                           # tokens that were
        self._waiters: list[asyncio.Future] = []

    @property
    def prompt_tokens(self) -> int:
        return len(self.draft.sequence.prompt)

    @property
    def reply(self) -> Reply:
        """The reply so far; whole when `finished` and without error."""
        with self._changed:
            return self.draft.reply

    def cancel(self) -> None:
        """Give up what is still to come; its row is free after the present step, and `reply` keeps what there is."""
        self.cancelled = True
        if self.scheduler:
            self.scheduler.wake()

    def next_piece(self, timeout: float | None = None) -> Piece | None:
        """Waits for what comes next; None: the reply has ended. Raises what it ended with, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(self._has_news, timeout):
                raise TimeoutError(f"no token within {timeout:g} s")
            return self._take()

    def __iter__(self) -> Iterator[str]:
        while (piece := self.next_piece()) is not None:
            if piece.text:
                yield piece.text

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces as they come; raises what the request ended with. May be called again to go on after a wait was given up."""
        from asyncio import get_running_loop
        while True:
            with self._changed:
                news = self._has_news()
                piece = self._take() if news else None
                waiter = None if news else get_running_loop().create_future()
                if waiter:
                    self._waiters.append(waiter)
            if waiter:
                await waiter
            elif piece is None:
                return
            else:
                yield piece

    async def __aiter__(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text:
                yield piece.text

    def result(self, timeout: float | None = None) -> Reply:
        """Waits for the whole reply. Raises what it ended with instead, or TimeoutError (the reply is still being made)."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"the reply is not whole within {timeout:g} s")
            if self.error:
                raise self.error
            return self.draft.reply

    async def reply_async(self) -> Reply:
        """`result` for an event loop."""
        async for _ in self.pieces():
            pass
        return self.reply

    def _has_news(self) -> bool:
        return self.finished or self.draft.shown > self._taken or bool(self._texts)

    def _take(self) -> Piece | None:
        """All that came since the last time; None where it has ended and nothing is left. Raises its error after the last piece."""
        first, self._taken = self._taken, self.draft.shown
        sequence, text = self.draft.sequence, "".join(self._texts)
        self._texts.clear()
        if text or self._taken > first:
            return Piece(text, sequence.tokens[first:self._taken], self.draft.told(sequence.logprobs[first:self._taken]))
        if self.error:
            raise self.error
        return None

    # The scheduler's side.

    def gain(self, wake: dict) -> None:
        """The sequence has new tokens, or has finished: make text of them. wake: collects whom to wake (`wake_all`)."""
        with self._changed:
            if text := self.draft.advance():
                self._texts.append(text)
            self.finished = self.draft.sequence.finish_reason is not None
            self._tell(wake)

    def end(self, error: Exception | None, wake: dict) -> None:
        """It is over, whole or not."""
        with self._changed:
            self.finished, self.error = True, error
            self._tell(wake)

    def _tell(self, wake: dict) -> None:
        self._changed.notify_all()
        for waiter in self._waiters:
            wake.setdefault(waiter.get_loop(), []).append(waiter)
        self._waiters.clear()


def wake_all(wake: dict) -> None:
    """Wakes event loops, each once for all that came to its tasks."""
    for loop, waiters in wake.items():
        try:
            loop.call_soon_threadsafe(_wake, waiters)
        except RuntimeError:                      # the loop was closed, and nobody waits any more
            continue


def _wake(waiters: list[asyncio.Future]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
