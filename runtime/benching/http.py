"""A client that costs little of the machine which it shares with the server: HTTP/1.1 over plain sockets, in one thread.

    connection = await Connection.open(address)
    answer = await connection.ask("POST", "/v1/completions", {"prompt": ...})      # keeps the connection, if the server does
    answer.status, answer.events(), answer.first, answer.arrivals ...              # first: when the first text was there

What comes is kept with the time of its coming, and read when the answer is whole; while it comes only its end is looked for, and
until it was seen its first text.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from dataclasses import dataclass, field

from ..errors import UserError

FIRST_TEXT = re.compile(rb'"(?:content|text|reasoning_content)": ?"[^"]|"tool_calls": ?\[')


@dataclass(frozen=True)
class Address:
    """Of a server of OpenAI's API. path: what stands before /v1, mostly nothing."""

    host: str
    port: int
    path: str
    key: str | None = None

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Address:
        """Raises UserError for what is no http:// address."""
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme == "http" and parts.hostname:
                return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/").removesuffix("/v1"), key)
        except ValueError:
            pass
        raise UserError(f"{url} is no address of a server, such as http://127.0.0.1:8080")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}{self.path}"

    def request(self, method: str, path: str, body: dict | bytes | None = None) -> bytes:
        """The request as it is sent."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return (f"{method} {self.path}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n").encode() + data


@dataclass
class Answer:
    """What came. Times are of time.perf_counter(). whole: whether it has come to its end."""

    sent: float
    arrivals: list[float] = field(default_factory=list)          # of each piece after the headers
    pieces: list[bytes] = field(default_factory=list)
    head: bytes = b""
    first: float | None = None                                   # the first text of a reply
    whole: bool = False

    @property
    def status(self) -> int:
        """0: there was no answer."""
        return int(self.head[9:12]) if self.head[:5] == b"HTTP/" else 0

    @property
    def body(self) -> bytes:
        raw = b"".join(self.pieces)
        if b"transfer-encoding: chunked" not in self.head.lower():
            return raw
        parts, at = [], 0
        while (end := raw.find(b"\r\n", at)) >= 0 and (size := int(raw[at:end].split(b";")[0], 16)):
            parts.append(raw[end + 2:end + 2 + size])
            at = end + size + 4
        return b"".join(parts)

    def json(self) -> dict:
        """The body; {} where it is no JSON object."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def events(self) -> list[dict]:
        """Of a stream, without [DONE]."""
        lines = (line[5:].strip() for line in self.body.splitlines() if line.startswith(b"data:"))
        return [json.loads(line) for line in lines if line and line != b"[DONE]"]


class Connection(asyncio.Protocol):
    """One at a time is asked on a connection."""

    def __init__(self):
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self._answer: Answer | None = None
        self._length: int | None = None                          # of the body, where the headers tell
        self._had, self._tail = 0, b""
        self._news, self._patient = asyncio.Event(), False

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Raises OSError where nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        return connection

    @property
    def used(self) -> bool:
        """Whether it was asked before."""
        return self._answer is not None

    async def ask(self, request: bytes, timeout: float = 600) -> Answer:
        """Send, and wait for the whole answer, or the connection's end. Raises TimeoutError."""
        answer = self.send(request)
        self._patient = True                                      # being woken for each piece would cost most of all
        try:
            await self.more(timeout)
        finally:
            self._patient = False
        return answer

    def send(self, request: bytes) -> Answer:
        """Send, and do not wait: see `more`."""
        self._answer, self._length, self._had, self._tail = Answer(time.perf_counter()), None, 0, b"\r\n"
        self.transport.write(request)
        return self._answer

    async def more(self, timeout: float) -> None:
        """Wait until more of the answer has come, or the connection has ended. Raises TimeoutError."""
        self._news.clear()
        if not self._answer.whole and not self.closed:
            await asyncio.wait_for(self._news.wait(), timeout)

    def close(self) -> None:
        """At once: what still comes is not taken any more."""
        self.closed = True
        if self.transport:
            self.transport.abort()

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        answer, now = self._answer, time.perf_counter()
        if answer is None:
            return
        if not answer.pieces:                                     # the head is not whole yet
            answer.head += data
            head, end, data = answer.head.partition(b"\r\n\r\n")
            if not end:
                return
            answer.head = head
            told = re.search(rb"(?i)content-length: *(\d+)", head)
            self._length = int(told[1]) if told else None
        answer.pieces.append(data)
        answer.arrivals.append(now)
        self._had += len(data)
        joined = self._tail + data
        self._tail = joined[-64:]
        if answer.first is None and FIRST_TEXT.search(joined):
            answer.first = now
        # No piece of JSON or of a stream holds a bare CR LF, so this is the end and nothing else.
        if self._had == self._length or self._length is None and joined.endswith(b"\r\n0\r\n\r\n"):
            answer.whole = True
            if b"connection: close" in answer.head.lower():
                self.close()
        if answer.whole or not self._patient:
            self._news.set()

    def connection_lost(self, error) -> None:
        self.closed = True
        if self._answer and self._length is None and b"chunked" not in self._answer.head.lower() and self._answer.head:
            self._answer.whole = error is None
        self._news.set()
