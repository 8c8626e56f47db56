"""HTTP connections that do not wait for ever, and the server that owns them.

uvicorn's protocol has a time limit between requests only. This one has `patience_s` too for a request to arrive whole, from
the first byte on or from when the connection was made, and for a client that does not read what it is sent. Headers may
have 64 KB. What is refused here, before there is a request, is refused in the API's error shape as well.

A client that has closed its sending side is taken for gone after _HALF_CLOSED_S: quick answers still reach it, and a
generation that nobody may be waiting for ends.
"""

import asyncio
import contextlib
import errno
import functools
import json
import socket
from http import HTTPStatus

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import UserError
from .errors import ApiError
from .guard import Guard
from .logs import say
from .service import Service

_MOST_HEAD = 64 << 10             # bytes of a request's line and headers
_HALF_CLOSED_S = 0.5
_KEEP_ALIVE_S = 60
_SPARE_FILES = 64                 # beside connections


class Connection(HttpToolsProtocol):
    """patience_s: see above. most_bytes: of one request, all overhead counted. most: connections at once."""

    def __init__(self, *args, patience_s: float, most_bytes: int, most: int, **kwargs):
        super().__init__(*args, **kwargs)
        self._patience_s, self._most_bytes, self._most = patience_s, most_bytes, most
        self._waiting: asyncio.TimerHandle | None = None          # for the rest of a request
        self._stalled: asyncio.TimerHandle | None = None          # for the client to read
        self._in_head, self._begun, self._bytes = False, False, 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)                      # whatever the kernel does not take is a stall
        self._wait()
        if len(self.connections) > self._most:
            self._refuse(ApiError(503, "the server has all the connections it can have; try again later", code="too_many_connections",
                                  retry_s=1))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._waiting, self._stalled):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:
        self.loop.call_later(_HALF_CLOSED_S, self.transport.close)
        return True

    def data_received(self, data: bytes) -> None:
        self._wait()
        self._bytes += len(data)
        super().data_received(data)
        if self._bytes > (_MOST_HEAD if self._in_head else self._most_bytes) and not self.transport.is_closing():
            self._refuse(ApiError(431, f"the request's line and headers have more than {_MOST_HEAD >> 10} KB", code="headers_too_large"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._begun, self._bytes = True, True, 0
        self._wait()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._begun, self._bytes = False, 0
        self._waiting.cancel()
        self._waiting = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no request of HTTP/1.1", code="invalid_http"))

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._patience_s, self._too_slow)

    def _too_slow(self) -> None:
        self._waiting = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or answering and not self.cycle.more_body:     # it is the server that takes its time
            self._wait()
        elif self._begun:
            self._refuse(ApiError(408, f"the request did not arrive within {self._patience_s:g} s", code="too_slow"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless that would fall into another answer, and close."""
        cycle, anew = self.cycle, self._in_head or not self._begun               # else it is about the cycle's own body
        if not self.pipeline and (cycle is None or (cycle.response_complete if anew else not cycle.response_started)):
            body = json.dumps(error.body).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n" + "".join(
                f"{name}: {value}\r\n" for name, value in error.headers.items())
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Until `stop` is asked for, and then until what is in work has ended."""

    def __init__(self, app, guard: Guard, service: Service):
        options = service.options
        connection = functools.partial(Connection, patience_s=options.client_timeout, most_bytes=4 * guard.most_body + _MOST_HEAD,
                                       most=max(1, most_files() - _SPARE_FILES))
        super().__init__(uvicorn.Config(app, http=connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
                                        server_header=False, proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE_S,
                                        timeout_graceful_shutdown=5))
        self._guard, self._service = guard, service

    @contextlib.contextmanager
    def capture_signals(self):
        """None: the command has its own."""
        yield

    def stop(self) -> None:
        """Finish what is in work, refuse what is new, and end; asked twice: end now."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        say("stopping", active=self._guard.active)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self._service.draining and not self._guard.active
        return await super().on_tick(counter)


def most_files() -> int:
    """Files and sockets that this process may have open, once its soft limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:                                           # not a Unix
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return 65536 if soft == resource.RLIM_INFINITY else soft


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address of `host`. Raises UserError where there is none, or it is taken."""
    sockets = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named; else each would wait for the client's
            # acknowledgement of the one before, 40 ms where that is delayed.
            sockets.append(one := socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            one.listen(2048)                                      # so that a second server finds the port taken at once
            port = one.getsockname()[1]                           # where 0 was asked for
    except OSError as error:
        for one in sockets:
            one.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use already: stop what listens there, or give another --port") from None
        raise UserError(f"cannot listen at port {port} of {host} ({error.strerror}): give another --host or --port") from None
    return sockets
