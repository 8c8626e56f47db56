"""Bad requests, bad connections and bad luck: each is answered in the API's error shape or cut off, and nobody else is harmed.

While each test runs, another client asks the same server for a stream over and over, which must stay what it was.
"""

import concurrent.futures
import contextlib
import json
import resource
import shutil
import socket
import struct
import threading
import time

import httpx
import pytest
from server_fixtures import Running, running

from runtime import serve as command

ASKED = {"prompt": "The capital of France is", "max_tokens": 24, "temperature": 0, "stream": True, "ignore_eos": True}
PATIENCE_S = 0.7


@pytest.fixture(scope="module")
def strict(served_bundle):
    """A server of little patience."""
    with running(served_bundle, client_timeout=PATIENCE_S, max_body_mb=1) as one:
        yield one


@pytest.fixture(autouse=True)
def others(strict):
    """Another client of the same server."""
    def ask() -> str:
        answer = httpx.post(f"{strict.url}/v1/completions", json=ASKED, timeout=30)
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    want, got, over = ask(), [], threading.Event()
    assert len(want) > 20

    def again() -> None:
        while not over.is_set() or not got:
            try:
                got.append(ask())
            except Exception as error:
                got.append(error)
            over.wait(0.05)

    thread = threading.Thread(target=again)
    thread.start()
    yield
    over.set()
    thread.join(60)
    assert not thread.is_alive() and set(got) == {want}


@pytest.fixture
def unlogged(monkeypatch):
    """For commands in this process: their log would go to a stderr that is gone when they end."""
    from runtime.server import logs
    monkeypatch.setattr(logs, "configure", lambda: None)


def connect(server: Running, data: bytes = b"") -> socket.socket:
    one = socket.create_connection(("127.0.0.1", server.port), 30)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):      # by a server that has answered before it had all
        one.sendall(data)
    return one


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    connection.close()
    return b"".join(parts)


def said(server: Running, data: bytes) -> tuple[int, dict]:
    """Status and error of the answer to these bytes."""
    return read(rest(connect(server, data)))


def read(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return int(head.split()[1]), error


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def wait_until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def stats(server: Running, model: str = "tiny"):
    return server.service.models[model].engine.scheduler.stats()


NO_JSON = [b"", b"{", b"nul", b"[1, 2]", b"\"text\"", b"\xff\xfe{}", b"{\"prompt\": \"a\"", b"[" * 100_000, b"{\"a\":" * 50_000,
           b"{'prompt': 'a'}", b"{\"prompt\": \"a\"} {}", b"\0", b"{\"tokens\": [" + b"9" * 10_000 + b"]}"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_no_json(strict, path):
    for body in NO_JSON:
        status, error = said(strict, post(path, body, "Content-Type: application/json"))
        assert status == 400 and error["type"] == "invalid_request_error", (body[:20], error)


def test_wrong_types_are_named(strict):
    for path, body, param in [("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {}, "prompt"),
                              ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
                              ("/detokenize", {"tokens": [1, 10**6]}, "tokens"), ("/detokenize", {"tokens": [True]}, "tokens[0]"),
                              ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
                              ("/slots/0?action=destroy", {}, "action"), ("/slots/zero?action=save", {}, "number")]:
        answer = httpx.post(strict.url + path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_lone_surrogate_is_no_text(strict):
    for path in ("/tokenize", "/v1/completions"):
        status, error = said(strict, post(path, b'{"prompt": "\\ud800"}', "Content-Type: application/json"))
        assert status == 400, error


def test_models_and_fields_that_nobody_knows(strict):
    for path in ("/v1/completions", "/tokenize"):
        answer = httpx.post(strict.url + path, json={"prompt": "a", "model": "gpt-9"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found" and "tiny" in answer.text
    assert httpx.get(f"{strict.url}/v1/models/gpt-9").status_code == 404
    assert httpx.post(f"{strict.url}/tokenize", json={"prompt": "a", "nobody": [1], "model": "tiny"}).status_code == 200


@pytest.fixture
def patient(serve):
    """One that waits for what takes a slow machine long to send."""
    return serve(client_timeout=20, max_body_mb=1)


def test_bodies_that_are_too_large(strict, patient):
    large = json.dumps({"prompt": "a" * 10_000_000})
    parts = (b"x" * 100_000 for _ in range(100))
    for content in (large, parts):                        # with Content-Length, and chunked
        answer = httpx.post(f"{patient.url}/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    status, _ = said(strict, b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n")
    assert status == 413                                  # without having asked for the body


def test_a_prompt_past_the_context(strict):
    answer = httpx.post(f"{strict.url}/v1/completions", json={"prompt": "word " * 50_000})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("beginning, status", [
    (b"", None), (b"\r\n", None), (b"POST /tok", 408), (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nX-", 408),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{", 408),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{", 408)])
def test_clients_that_send_slowly(strict, beginning, status):
    connection, start = connect(strict, beginning), time.monotonic()
    connection.settimeout(0.1)
    answer = b""
    while time.monotonic() < start + 10:                  # a byte now and then is no excuse
        try:
            if not (part := connection.recv(4096)):
                break
            answer += part
        except TimeoutError:
            with contextlib.suppress(OSError):
                connection.sendall(b"a" if status else beginning)
        except ConnectionResetError:                      # our byte met a closed connection; what was answered before has been read
            break
    assert PATIENCE_S * 0.8 < time.monotonic() - start < PATIENCE_S + 3
    assert read(answer)[0] == status if status else answer == b""


def test_a_kept_connection_is_no_way_around(strict):
    connection = connect(strict, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        answer += connection.recv(4096)
    connection.sendall(b"GET /hea")
    assert read(rest(connection))[0] == 408


def test_a_client_that_does_not_read(strict):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", strict.port))
    server_side = {one for one in strict.server.server_state.connections}
    body = json.dumps(ASKED | {"max_tokens": 200, "n": 128, "logprobs": 20}).encode()
    connection.sendall(post("/v1/completions", body, "Content-Type: application/json"))
    wait_until(lambda: any(one.flow.write_paused for one in strict.server.server_state.connections - server_side) or
               any(one.flow.write_paused for one in server_side), 20)
    wait_until(lambda: not any(one.flow.write_paused for one in strict.server.server_state.connections), 20)
    wait_until(lambda: stats(strict).rows <= 1)           # the other client's
    assert len(rest(connection)) > 0


def test_half_closed_sockets(strict):
    connection = connect(strict, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    assert b'{"status":"ok"}' in rest(connection)
    before = stats(strict).cancelled
    connection = connect(strict, post("/v1/completions", json.dumps(ASKED | {"n": 128, "max_tokens": 200}).encode()))
    connection.shutdown(socket.SHUT_WR)
    rest(connection)
    wait_until(lambda: stats(strict).cancelled > before)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away(strict, stream):
    before = stats(strict).cancelled
    connection = connect(strict, post("/v1/completions", json.dumps(ASKED | {"n": 128, "max_tokens": 200, "stream": stream}).encode()))
    wait_until(lambda: stats(strict).rows > 4)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))        # a reset
    connection.close()
    wait_until(lambda: stats(strict).rows <= 1 and stats(strict).cancelled > before)


def test_a_thousand_idle_connections(strict, serve):
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft >= 4096                                   # which the server has raised it to
    patient = serve(client_timeout=60)
    idle = [connect(patient) for _ in range(1000)]
    wait_until(lambda: len(patient.server.server_state.connections) >= 1000)
    start = time.monotonic()
    answer = httpx.post(f"{patient.url}/v1/completions", json=ASKED)
    assert answer.status_code == 200 and time.monotonic() - start < 5
    for one in idle:
        one.close()
    wait_until(lambda: len(patient.server.server_state.connections) <= 1)


def test_more_connections_than_there_may_be(strict, serve, monkeypatch):
    from runtime.server import connection
    monkeypatch.setattr(connection, "most_files", lambda: connection._SPARE_FILES + 3)
    small = serve()
    idle = [connect(small) for _ in range(3)]
    wait_until(lambda: len(small.server.server_state.connections) == 3)
    assert said(small, b"")[0] == 503
    idle.pop().close()
    wait_until(lambda: len(small.server.server_state.connections) == 2)
    assert httpx.get(f"{small.url}/health").status_code == 200
    [one.close() for one in idle]


PATHS = ["/nothing", "//v1/models", "/v1//models", "/v1/models/", "/../etc/passwd", "/v1/../v1/models", "/%2e%2e/%2e%2e/etc/passwd",
         "/v1/models%00", "/v1/models%0d%0aX-Injected:%20a", "/V1/MODELS", "/" + "a" * 10_000, "/%ff%fe", "/v1/models/..%2f..%2fetc", "/docs", "/redoc"]


def test_path_tricks(strict):
    for path in PATHS:
        status, error = said(strict, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert status == 404, (path, error)
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"):
        status, error = said(strict, f"{method} /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert status == 405, (method, error)


HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
NO_HTTP = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
           HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", HEAD + b"Content-Length: -1\r\n\r\n",
           HEAD + b"Content-Length: 1e3\r\n\r\n", HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
           HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
           HEAD + b"X: a\0b\r\n\r\n", HEAD + b" folded: a\r\n\r\n", HEAD + b"no colon\r\n\r\n", b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n",
           b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]


def test_header_tricks(patient):
    for data in NO_HTTP:
        status, error = said(patient, data)
        assert status == 400 and error["type"] == "invalid_request_error", data
    for head in (b"X-Large: " + b"a" * 300_000, b"\r\n".join(b"X-%d: a" % i for i in range(30_000))):
        assert said(patient, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")[0] == 431
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    assert said(patient, HEAD + chunked + b"Trailer: " + b"a" * 9_000_000 + b"\r\n\r\n")[0] in (400, 431)
    ahead = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3          # of the answers
    assert rest(connect(patient, ahead + b"GET /health HTTP/1.0\r\n\r\n")).count(b'{"status":"ok"}') == 4
    assert rest(connect(patient, ahead + b"GARBAGE\r\n\r\n")) == b""            # no error where an answer is awaited
    for upgrade in (b"Upgrade: websocket\r\nConnection: upgrade", b"Upgrade: h2c\r\nConnection: upgrade, close"):
        answer = connect(patient, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n\r\n").recv(4096)
        assert answer.startswith(b"HTTP/1.1 200")


def test_names_and_pages_that_are_not_ours(strict, serve, tmp_path):
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example"):
        answer = httpx.get(f"{strict.url}/v1/models", headers={"host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "unknown_host"
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "jetson", "jetson.local", "192.168.1.7:80"):
        assert httpx.get(f"{strict.url}/v1/models", headers={"host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://localhost:9999"):
        answer = httpx.post(f"{strict.url}/tokenize", json={"prompt": "a"}, headers={"origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "unknown_origin"
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.post(f"{strict.url}/tokenize", json={"prompt": "a"}, headers={"origin": strict.url}).status_code == 200
    friend = serve(cors=("https://app.example",), hosts=("edge.example",))
    asking = {"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert httpx.options(f"{friend.url}/v1/completions", headers=asking).headers["access-control-allow-origin"] == "https://app.example"
    answer = httpx.post(f"{friend.url}/tokenize", json={"prompt": "a"}, headers={"origin": "https://app.example", "host": "edge.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"


def test_keys(serve, tmp_path, monkeypatch):
    from runtime.server import guard
    (tmp_path / "keys").write_text("# of the house\nsk-one\n\n  sk-two  \n")
    server, compared = serve(api_keys=tmp_path / "keys"), []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or compare(a, b))
    for headers in ({}, {"authorization": "Bearer sk-three"}, {"authorization": "sk-one"}, {"authorization": "Basic sk-one"},
                    {"x-api-key": ""}, {"authorization": "Bearer " + "a" * 10_000}, {"authorization": "Bearer sk-onesk-two"},
                    {"x-api-key": b"\xff\xfe"}, {"authorization": "Bearer # of the house"}, {"authorization": "Bearer"}):
        compared.clear()
        answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert compared == [32, 32]                       # every key, and equally long ones
    for headers in ({"authorization": "Bearer sk-one"}, {"authorization": "bearer  sk-two"}, {"x-api-key": "sk-two"},
                    {"authorization": "Bearer sk-one", "host": "any.example", "origin": "https://any.example"}):
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}, headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == httpx.get(f"{server.url}/nothing").status_code == 401


@pytest.mark.parametrize("text, words", [("", "no API key"), ("# only\n", "no API key"), ("a b\n", "line 1"), ("ok\nschlüssel\n", "line 2")])
def test_files_of_keys_that_are_none(served_bundle, tmp_path, text, words, capsys, unlogged):
    (tmp_path / "keys").write_text(text)
    assert command.main([str(served_bundle), "--port", "0", "--api-keys", str(tmp_path / "keys")]) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_two_servers_on_one_port(strict, served_bundle, capsys, unlogged):
    assert command.main([str(served_bundle), "--port", str(strict.port)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"port {strict.port} of 127.0.0.1 is in use" in err


def test_more_than_there_is_room_for(serve):
    one, go_on = serve(rows=1, queue=0, max_active=3), threading.Event()
    scheduler = one.service.models["tiny"].engine.scheduler
    holding = threading.Thread(target=scheduler._between_turns, args=(lambda: go_on.wait(30) and None,))
    holding.start()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, f"{one.url}/v1/completions", json=ASKED, timeout=30)
        wait_until(lambda: scheduler.stats().queued == 1)
        answer = httpx.post(f"{one.url}/v1/completions", json=ASKED)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "queue_full"
        dragging = [connect(one, post("/v1/completions", b"{}")[:-1]) for _ in range(2)]
        wait_until(lambda: one.service.metrics.active._value.get() == 3)
        answer = httpx.post(f"{one.url}/v1/completions", json=ASKED)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "too_many_requests"
        assert httpx.get(f"{one.url}/health").status_code == 200
        go_on.set()
        assert first.result().status_code == 200
        [connection.close() for connection in dragging]
    wait_until(lambda: one.service.metrics.active._value.get() == 0 == stats(one).rows)
    assert httpx.post(f"{one.url}/v1/completions", json=ASKED).status_code == 200


def test_a_bundle_that_disappears(serve, served_bundle, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(served_bundle, tmp_path / name)
    server = serve(tmp_path / "one", tmp_path / "two")

    def ask(model):
        body = {"prompt": "The capital", "max_tokens": 8, "temperature": 0, "model": model}
        return httpx.post(f"{server.url}/v1/completions", json=body)

    want = ask("one").json()["choices"][0]["text"]
    shutil.rmtree(tmp_path / "one")
    assert ask("one").json()["choices"][0]["text"] == want            # it is in memory
    (tmp_path / "two" / "weights.bin").unlink()
    assert ask("two").status_code == 404 and str(tmp_path) not in ask("two").text
    shutil.rmtree(tmp_path / "two")
    assert ask("two").json()["error"]["code"] == "model_not_found"
    assert [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["one"]
    assert ask("one").status_code == 200
