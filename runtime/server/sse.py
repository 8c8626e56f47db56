"""Answers over HTTP that end when the client does: streams of server-sent events, and whole replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from .errors import ApiError, describe
from .logs import say

T = TypeVar("T")
PING_S = 15.0                     # of silence after which a comment goes out, for proxies that close what is silent
_PING, DONE = b": ping\n\n", b"data: [DONE]\n\n"


def event(data: dict, name: str | None = None) -> bytes:
    """One event; name: of its `event:` line, where the API has such."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """A stream of `events` (bytes of whole events).

    held: what is to be closed when the stream has ended, however it has: the replies' rows, the model's lease. error_name: of
    the event that says what went wrong, the status being sent already; None: as OpenAI's clients know it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack, error_name: str | None = None):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held, self._error_name = events, held, error_name

    async def __call__(self, scope, receive, send) -> None:
        async with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _first(self._write(send), gone(receive))

    async def _write(self, send) -> None:
        sent = time.monotonic()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal sent
            sent = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(sent + PING_S - time.monotonic(), 0.01))
                if time.monotonic() - sent >= PING_S:
                    await write(_PING)

        pinging = asyncio.create_task(ping())
        try:
            async for data in self._events:
                await write(data)
        except Exception as error:
            body = failure(error).body
            await write(event({"type": "error", **body}, self._error_name) if self._error_name else event(body) + DONE)
        finally:
            pinging.cancel()
        await write(b"", more=False)


def failure(error: Exception) -> ApiError:
    """The answer to an exception that a route keeps to itself; a bug goes to the log."""
    answer = describe(error)
    if answer.code == "internal_error":
        say("a request has failed", logging.ERROR, error)
    return answer


async def while_connected(request: Request, work: Awaitable[dict]) -> Response:
    """What `work` makes, as JSON. Where the client goes away first, `work` is cancelled; 499 is for the log alone then."""
    reply = await _first(work, gone(request.receive))
    return Response(status_code=499) if reply is None else JSONResponse(reply)


async def gone(receive) -> None:
    """Waits until the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Awaitable[T], other: Awaitable[None]) -> T | None:
    """The result of `work`, or None where `other` ended first; the one that did not is cancelled and has ended."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
