"""The replies of one request: submitted, read together as they are made, counted, and given up together."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable

from fastapi import Request

from ..pending import Busy, Pending, Piece
from ..reply import Reply

TOGETHER = 16                     # replies of one request that wait or run at a time
_RETRY_S = 0.05


def user_of(request: Request) -> str:
    """Who asks, as far as turns are concerned: by key, else by address."""
    key = request.headers.get("authorization") or request.headers.get("x-api-key")
    return hashlib.sha256(key.encode()).hexdigest() if key else request.client.host if request.client else ""


class Run:
    """Replies to one request. Made, it has submitted the first; raises what `Engine.submit` does.

    jobs: each submits one reply. observe: called once with each reply's Pending when it has ended, or was given up.
    Use it in a `with`: whatever is still going on at its end is cancelled.
    """

    def __init__(self, jobs: list[Callable[[], Pending]], observe: Callable[[Pending], None]):
        self._jobs, self._observe = jobs, observe
        self.pendings: list[Pending | None] = [None] * len(jobs)
        self.replies: list[Reply | None] = [None] * len(jobs)
        self._stopped: set[int] = set()
        try:
            for number in range(min(TOGETHER, len(jobs))):
                self._submit(number)
        except BaseException as error:
            if not isinstance(error, Busy) or number == 0:
                self.close()
                raise                             # else the others have their turn later

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for pending, reply in zip(self.pendings, self.replies):
            if pending is not None and reply is None:
                pending.cancel()
                self._observe(pending)
        self._observe = lambda pending: None

    def stop(self, number: int) -> None:
        """Reply `number` needs no more tokens."""
        self._stopped.add(number)
        self.pendings[number].cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """What the replies gain, each with the number of its job; None where one has ended. Raises what any ended with."""
        if len(self._jobs) == 1:
            async for piece in self._read(0):
                yield 0, piece
            return
        gate, queue = asyncio.Semaphore(TOGETHER), asyncio.Queue()

        async def pump(number: int) -> None:
            try:
                async with gate:
                    while self.pendings[number] is None:
                        try:
                            self._submit(number)
                        except Busy:              # a request that has begun is not turned away halfway
                            await asyncio.sleep(_RETRY_S)
                    async for piece in self._read(number):
                        queue.put_nowait((number, piece))
            except Exception as error:
                queue.put_nowait((number, error))

        tasks = [asyncio.create_task(pump(number)) for number in range(len(self._jobs))]
        try:
            left = len(tasks)
            while left:
                number, piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece is None
                yield number, piece
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, number: int) -> AsyncIterator[Piece | None]:
        pending = self.pendings[number]
        try:
            async for piece in pending.pieces():
                yield piece
        except Exception:
            if number not in self._stopped:
                raise
        self.replies[number] = pending.reply
        self._observe(pending)
        yield None

    def _submit(self, number: int) -> None:
        self.pendings[number] = self._jobs[number]()

    def usage(self, samples: int = 1) -> dict:
        """Of the replies so far; samples: how many replies are to the same prompt, one after the other, which counts once."""
        prompts = [pending for pending in self.pendings[::samples] if pending]
        read, made = sum(pending.prompt_tokens for pending in prompts), sum(len(reply.tokens) for reply in self.replies if reply)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
                "prompt_tokens_details": {"cached_tokens": sum(pending.cached_tokens for pending in prompts)}}

    def timings(self) -> dict:
        """Of all replies that have ended, with llama.cpp's names; times are those of the slowest."""
        pendings = [pending for pending, reply in zip(self.pendings, self.replies) if reply]
        token_ms = [reply.timings.token_ms for reply in self.replies if reply and reply.timings.token_ms]
        cached, made = sum(pending.cached_tokens for pending in pendings), sum(map(len, token_ms))
        read = sum(pending.prompt_tokens for pending in pendings) - cached
        read_ms = max((times[0] for times in token_ms), default=0.0)
        made_ms = max((times[-1] - times[0] for times in token_ms), default=0.0)
        steps = max(made - len(token_ms), 0)      # the first token of each came with the prompt

        def rates(kind: str, count: int, over: int, ms: float) -> dict:
            return {f"{kind}_n": count, f"{kind}_ms": round(ms, 3), f"{kind}_per_token_ms": round(ms / over, 3) if over else 0.0,
                    f"{kind}_per_second": round(over / ms * 1e3, 3) if ms else 0.0}

        return {"cache_n": cached, **rates("prompt", read, read, read_ms), **rates("predicted", made, steps, made_ms)}
