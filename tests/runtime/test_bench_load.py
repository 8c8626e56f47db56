"""--load against a server of known delays, and against ours."""

import asyncio
import json
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import runtime.bench
from runtime.benching import load
from runtime.benching.http import Address, Answer, Connection
from runtime.errors import UserError

FIRST, EACH, PIECES = .06, .01, 8


class Fake:
    """A server whose first text comes after FIRST seconds, and PIECES - 1 further pieces each EACH later."""

    def __init__(self):
        self.bodies, self.fails, self.slots, self.ready, self.most = [], False, None, threading.Event(), 1000
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    async def run(self):
        self.slots, self.loop, self.over = asyncio.Semaphore(100), asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self.answer, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self.ready.set()
            await self.over.wait()

    def close(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    async def answer(self, reader, writer):
        for _ in range(self.most):                # requests of a connection, which then ends as the next is on its way
            if not (head := await reader.read(1)):
                break
            head += await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            self.bodies.append(json.loads(body))
            if self.fails:
                said = b'{"error": {"message": "too busy"}}'
                writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
                continue
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            async with self.slots:
                for number in range(PIECES):
                    await asyncio.sleep(EACH if number else FIRST)
                    self.event(writer, {"choices": [{"delta": {"content": "x0"}}]})
            words = len(self.bodies[-1]["messages"][0]["content"].split())
            self.event(writer, {"choices": [], "usage": {"prompt_tokens": 30 + 2 * words, "completion_tokens": PIECES}})
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()

    @staticmethod
    def event(writer, data):
        data = b"data: " + json.dumps(data).encode() + b"\n\n"
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.close()


def measured(tmp_path, *words):
    file = tmp_path / "out.json"
    assert runtime.bench.main(["--load", *words, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_closed_loop_tells_the_servers_delays(fake, tmp_path, capsys):
    found = measured(tmp_path, fake.url, "--clients", "3", "--seconds", "1.5", "--prompt-tokens", "230", "--new-tokens", str(PIECES))
    whole = FIRST + EACH * (PIECES - 1)
    for name, least in (("ttft_ms_p50", FIRST), ("tpot_ms_p50", EACH), ("reply_ms_p50", whole)):        # a busy machine adds to them
        assert .95e3 * least < found[name] < 3e3 * least, name
    assert found["reply_ms_p50"] == pytest.approx(found["ttft_ms_p50"] + (PIECES - 1) * found["tpot_ms_p50"], rel=.2)
    assert 1 / whole < found["requests_per_s"] < 3.1 / whole
    assert found["new_tokens_per_s"] == pytest.approx(PIECES * found["requests_per_s"], rel=.2)
    assert found["total_tokens_per_s"] == pytest.approx((PIECES + 230) * found["requests_per_s"], rel=.25)
    assert (found["prompt_tokens"], found["new_tokens"], found["errors"]) == (230, PIECES, 0)    # usage: 30 + 2 tokens a word
    texts = [body["messages"][0]["content"] for body in fake.bodies[3:]]
    assert all(len(text.split()) == 100 for text in texts) and len({text[:60] for text in texts}) == len(texts)
    body = fake.bodies[-1]
    assert body["stream_options"] == {"include_usage": True} and body["max_tokens"] == PIECES and body["temperature"] == 0 and body["ignore_eos"]
    assert "ttft_ms_p99" in capsys.readouterr().out


def test_a_connection_that_had_its_time_is_no_error(fake, tmp_path):
    fake.most = 2
    found = measured(tmp_path, fake.url, "--clients", "2", "--seconds", ".6", "--new-tokens", str(PIECES))
    assert found["errors"] == 0 and found["requests_per_s"] > 2


def test_open_loop_counts_from_when_a_request_was_due(fake, tmp_path):
    """A server of one slot, asked more often than it can answer: waiting shows, though nobody waits for a reply before asking."""
    fake.slots = asyncio.Semaphore(1)
    random.seed(5)
    found = measured(tmp_path, fake.url, "--rate", "30", "--seconds", ".7", "--new-tokens", str(PIECES))
    asked = len(fake.bodies) - 3
    assert 8 < asked < 35 and found["ttft_ms_p95"] > 3e3 * FIRST and found["requests_per_s"] < 1.2 / (FIRST + EACH * (PIECES - 1))


def test_a_shared_prefix_and_servers_in_turns(fake, tmp_path):
    found = measured(tmp_path, fake.url, fake.url + "/", "--clients", "2", "--seconds", ".3", "--repeat", "2", "--prompt-tokens", "130",
                     "--same-prefix", "80", "--new-tokens", str(PIECES))
    assert list(found["systems"]) == [fake.url, fake.url + "/"] and len(found["samples"]["ttft_ms_p50"]) == 2
    assert .95e3 * FIRST < found["first_ttft_ms"] < 3e3 * FIRST and .95e3 * FIRST < found["again_ttft_ms"] < 3e3 * FIRST
    texts = [tuple(body["messages"][0]["content"].split()) for body in fake.bodies if len(body["messages"][0]["content"].split()) == 50]
    beginnings = {text[:40] for text in texts[2:]}
    assert len(beginnings) <= 6 and len({text[40:] for text in texts}) == len(texts)                 # each round's own, and two warm-ups


def test_errors_are_counted_and_shown(fake, tmp_path, capsys):
    ask = load.Ask(Address.of(fake.url), None, 4, 0, 10)
    fake.fails = True
    got, start, end = asyncio.run(load.drive(ask, SimpleNamespace(clients=2, seconds=.35, rate=None, same_prefix=0)))
    found = load.figures(got, start, end)
    assert found["errors"] >= 4 and found["requests_per_s"] == 0 and "ttft_ms_p50" not in found and got[0].error == "429: too busy"
    assert runtime.bench.main(["--load", fake.url]) == 2
    assert "answers: 429: too busy" in capsys.readouterr().err
    assert runtime.bench.main(["--load", "http://127.0.0.1:1"]) == 2 and "127.0.0.1:1" in capsys.readouterr().err
    with pytest.raises(UserError, match="no address of a server"):
        Address.of("localhost:80")


def test_a_reply_that_breaks_off_is_an_error():
    def answer(head, body, whole):
        return Answer(0.0, head=head, pieces=[body], whole=whole)
    ok = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"
    event = b'data: {"error": {"message": "no memory"}}\n\n'
    assert load.error_of(answer(ok, b"", False)) == "the reply breaks off" and load.error_of(answer(b"", b"", False)) == "no answer"
    assert load.error_of(answer(ok, b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event), True)) == "no memory"
    assert load.error_of(answer(b"HTTP/1.1 500 Oh", b"oops", True)) == "500: b'oops'"


@pytest.mark.parametrize("cuts", [(), (5,), (70, 73), range(1, 150)], ids=["whole", "in the head", "after it", "every byte"])
def test_answers_are_read_however_they_are_cut(cuts):
    """The end is not taken for one where a piece looks like it."""
    events = b'data: {"choices": [{"delta": {"content": "10"}}]}\r\n\r\n', b": ping 0\r\n\r\n", b"data: [DONE]\r\n\r\n"
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"

    async def read():
        connection = Connection()
        connection.connection_made(SimpleNamespace(write=lambda data: None))
        answer = connection.send(b"")
        places = [0, *cuts, len(raw)]
        for first, last in zip(places, places[1:]):
            assert not answer.whole
            connection.data_received(raw[first:last])
        return answer

    answer = asyncio.run(read())
    assert len(raw) >= 150 and answer.first and answer.whole and answer.status == 200 and answer.body == b"".join(events)
    assert answer.events() == [{"choices": [{"delta": {"content": "10"}}]}]


def test_load_on_our_server(server, tmp_path):
    found = measured(tmp_path, server.url, "--clients", "2", "--seconds", "1", "--prompt-tokens", "150", "--new-tokens", "12")
    assert found["errors"] == 0 and found["new_tokens"] == 12 and found["prompt_tokens"] == pytest.approx(150, rel=.2)
    assert found["new_tokens_per_s"] > 0 and np.isfinite(found["tpot_ms_p99"])
