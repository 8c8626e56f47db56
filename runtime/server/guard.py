"""Who may ask, and how much: what stands before every route.

Keys: one a line in a file; all are compared, each in constant time, by their SHA-256, so that neither a key's beginning nor
its length shows in how long the answer takes. Given as `Authorization: Bearer KEY` or `x-api-key: KEY`.

Without keys, a page of anywhere in a browser on this machine could ask too. So then a request must call the server by an
address, by a local name or by one of --hosts (else its name may have been rebound to us), and one that changes anything must
come from the server's own page or from an origin of --cors.

Limits: the body's bytes (413), those of all bodies together, and the requests in work (429 with Retry-After).
"""

import hashlib
import hmac
import ipaddress
import logging
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError
from .errors import ApiError
from .logs import say
from .service import Service

_MB = 1 << 20
_MOST_BODIES = 16                 # of the largest, held at once
_LOCAL_ENDS = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
_QUIET = ("/health", "/v1/health", "/metrics")      # which are asked for all the time: no line in the log
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
            "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
                                       "frame-ancestors 'none'"}


def read_keys(path: Path) -> list[bytes]:
    """SHA-256 of every key in a file: one a line; empty lines and those that begin with # do not count. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a file of API keys, one a line ({error})") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{path}: line {lines.index(key) + 1} is no API key: printable ASCII without blanks is one")
    if not keys:
        raise UserError(f"{path}: no API key in it; write one a line")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


class Guard:
    """ASGI around the routes. open_paths: what needs no key."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str]):
        options = service.options
        self._app, self._service, self._open = app, service, open_paths
        self._keys = read_keys(options.api_keys) if options.api_keys else []
        self._cors, self._hosts = options.cors, options.hosts
        self.most_body, self.most_active = int(options.max_body_mb * _MB), options.max_active
        self.held = 0                     # bytes of bodies
        self.active = 0                   # requests in work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status, whole = time.monotonic(), 0, False
        identity, method, path = f"req_{uuid.uuid4().hex}", scope["method"], scope["path"][:200]

        async def answer(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in (_HEADERS | {"x-request-id": identity}).items():
                    headers.setdefault(name, value)
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        self.active += 1
        self._service.metrics.active.inc()
        body = _Body(self, receive)
        try:
            headers = Headers(scope=scope)
            self._check(method, path, headers)
            await body.read(headers.get("content-length", ""))
            await self._app(scope, body.receive, answer)
        except ClientGone:
            pass
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception as error:                        # a bug, which the routes' own handler has answered if it could
            say("a request has failed", logging.ERROR, error, id=identity, path=path)
            if not whole:
                raise                                     # the connection breaks off
        finally:
            self.active -= 1
            self.held -= body.size
            self._service.metrics.active.dec()
            self._service.metrics.requests.labels(method if method in ("GET", "POST") else "other", status or 499).inc()
            if path not in _QUIET or status != 200:
                say("request", id=identity, client=(scope.get("client") or ["unix"])[0], method=method, path=path, status=status or 499,
                    ms=round((time.monotonic() - begun) * 1e3, 1))

    def _check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError for a request that is not to be answered."""
        if self._service.draining:
            raise ApiError(503, "the server is stopping; it finishes what it has and takes nothing new", code="stopping", retry_s=5)
        if self._keys:
            if path not in self._open and not self._knows(headers):
                raise ApiError(401, "this server needs an API key: send Authorization: Bearer KEY", code="invalid_api_key",
                               headers={"www-authenticate": "Bearer"})
        else:
            self._check_origin(method, headers)
        if method not in _SAFE and self.active > self.most_active:
            raise ApiError(429, f"{self.most_active} requests are in work already; try again later", code="too_many_requests", retry_s=1)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(key.encode("latin-1")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._keys])       # a list: all are compared

    def _check_origin(self, method: str, headers: Headers) -> None:
        for host in headers.getlist("host"):
            name = _host_name(host)
            if not (_is_local(name) or name in self._hosts):
                raise ApiError(403, f"this server is not known as {name[:100]!r}: start it with --hosts {name[:100]}, or with --api-keys",
                               code="unknown_host")
        origin = headers.get("origin")
        if method in _SAFE or origin is None or origin in self._cors or "*" in self._cors:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ApiError(403, f"a page of {origin[:100]} may not ask here: start the server with --cors {origin[:100]}, or with "
                                "--api-keys", code="unknown_origin")


class ClientGone(Exception):
    """Whoever asked has gone before the request was whole."""


class _Body:
    """A request's body, read whole before the routes see it, so that its size and pace are one place's concern."""

    def __init__(self, guard: Guard, receive: Receive):
        self._guard, self._receive, self._parts, self.size = guard, receive, [], 0

    async def read(self, declared: str) -> None:
        """Raises ApiError 413 (at once where Content-Length says so), 429, and ClientGone."""
        if declared.isdecimal() and len(declared) < 20:
            self._check(int(declared))
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            self._parts.append(part)
            self.size += len(part)
            self._guard.held += len(part)
            self._check(self.size)
            if not message.get("more_body"):
                return

    def _check(self, size: int) -> None:
        most = self._guard.most_body
        if size > most:
            raise ApiError(413, f"the body is larger than the {most / _MB:g} MB that this server takes", code="body_too_large")
        if self._guard.held > _MOST_BODIES * most:
            raise ApiError(429, "the bodies of other requests fill the memory for them; try again later", code="too_many_requests",
                           retry_s=1)

    async def receive(self) -> Message:
        """For the routes: the body once, then what the connection says."""
        if self._parts is None:
            return await self._receive()
        body, self._parts = b"".join(self._parts), None
        return {"type": "http.request", "body": body, "more_body": False}


def _host_name(host: str) -> str:
    """Without its port, in lower case."""
    name = host.strip().lower()
    return name[:name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


def _is_local(name: str) -> bool:
    """An address, or a name that no public name server gives out: none can have been rebound."""
    try:
        ipaddress.ip_address(name.strip("[]"))
        return True
    except ValueError:
        return "." not in name.rstrip(".") or name.endswith(_LOCAL_ENDS)
