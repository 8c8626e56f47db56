"""--soak: a server that does well passes, and one that errs in any of the ways that a soak is for does not."""

import asyncio
import json
import random
import threading
import time

import pytest

import runtime.bench
from runtime.benching import soak as soaking
from runtime.benching.http import Answer
from runtime.benching.soak import grown
from runtime.benching.soak_requests import Known, known, reply_of

SOAK = ["--minutes", ".02", "--clients", "3", "--prompt-tokens", "8", "--new-tokens", "6"]


class Server:
    """Answers everything with a text made of the request; fault: what it does wrong after the first REFERENCE requests."""

    REFERENCE = 3 * len(known(8))

    def __init__(self, fault: str = ""):
        self.fault, self.asked, self.began, self.ready = fault, 0, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    async def run(self):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.ready.set()
        await self.over.wait()
        server.close()

    def close(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    async def serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            status, kind, said = self.answer(head, body)
            if status:
                writer.write(b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(said)) + said)
                await reader.read(1)                              # until the client goes
            else:
                await self.over.wait()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    def answer(self, head: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        if head.startswith(b"get /metrics"):
            grows = 1e6 * (time.monotonic() - self.began) if self.fault == "grows" else 0     # clients may all be waiting for a while
            lines = f'edgewright_queued{{model="a"}} {int(self.fault == "queued")}.0\nprocess_resident_memory_bytes {1e6 + grows}\n'
            return 200, b"text/plain", lines.encode()
        self.asked += 1
        fault = self.fault if self.asked > self.REFERENCE else ""
        try:
            asked = json.loads(body)
            messages = asked["prompt"] if "prompt" in asked else asked["messages"][-1]["content"]
            assert isinstance(messages, str) and len(messages) < 10000 and asked.get("max_tokens", 1) > 0 and "model" not in asked
            assert asked.get("temperature") != "hot" and "type\": 5" not in json.dumps(asked)
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            return (500, b"text/plain", b"oh") if fault == "breaks" else (400, b"application/json", b'{"error": {"message": "bad"}}')
        if fault == "stuck" and self.asked % 7 == 0:
            return 0, b"", b""
        text = messages[::-1][:9] + "!" * (fault == "errs" and self.asked % 5 == 0 or fault == "varies" and asked["temperature"] > 0)
        chat = "messages" in asked
        one = {"finish_reason": "length", "index": 0}
        if asked.get("stream"):
            events = [{"choices": [{**one, **({"delta": {"content": text}} if chat else {"text": text})}]}]
            events += [{"error": {"message": "no memory"}}] if fault == "breaks off" else []
            said = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"
            return 200, b"text/event-stream", said
        return 200, b"application/json", json.dumps({"choices": [{**one, **({"message": {"content": text}} if chat else {"text": text})}]}).encode()


@pytest.mark.parametrize("fault, said", [
    ("", None), ("errs", "where it was"), ("varies", "sampled not as"), ("breaks", "answered 500"),
    ("breaks off", "no memory"), ("stuck", "without a byte"), ("queued", "queue not as"), ("grows", "memory not as")])
def test_every_fault_is_found(fault, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(soaking, "STUCK_S", 1)
    monkeypatch.setattr(soaking, "REST_S", 1)
    random.seed(0)
    server = Server(fault)
    longer = ["--minutes", ".06"] if fault == "grows" else []     # a machine that stops for half a second still reads in every fifth
    code = runtime.bench.main(["--soak", server.url, *SOAK, *longer, "--json", str(tmp_path / "found.json")])
    server.close()
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"]["replies same"] > Server.REFERENCE / 2 and (code, all(found["good"].values())) == ((1, False) if said else (0, True)), out
    assert said is None or said in out + err and "Traceback" not in err


def test_our_server_passes(server, capsys):
    assert runtime.bench.main(["--soak", server.url, *SOAK]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "0 wrong" in out and "queue                0 left" in out and "MiB" in out


def test_nobody_there_and_one_who_cannot(capsys):
    assert runtime.bench.main(["--soak", "http://127.0.0.1:1"]) == 2 and "127.0.0.1:1" in capsys.readouterr().err
    server = Server()
    server.answer = lambda head, body: (404, b"application/json", b'{"error": {"message": "no such route"}}')
    assert runtime.bench.main(["--soak", server.url]) == 2 and "404: no such route" in capsys.readouterr().err
    server.close()


def test_what_is_a_near_tie():
    one = Known("x", "", {"temperature": 0}, " the cat sat", "stop", [(" the", 2.0), (" cat", .05), (" sat", 3.0)])
    assert one.judge(" the cat sat", "stop") == "same"
    assert one.judge(" the dog sat", "stop") == one.judge(" the cats", "stop") == "near tie"     # " cats" is another token than " cat"
    assert one.judge(" a cat sat", "stop") == one.judge(" the cat sat", "length") == one.judge(" the cat sat down", "stop") == "wrong"
    assert Known("x", "", {"temperature": 1}, "a", "stop").judge("b", "stop") == "sampled"


def test_gaps_are_read_from_both_kinds_of_answers():
    def answer(choice):
        return Answer(0.0, head=b"HTTP/1.1 200 OK", pieces=[json.dumps({"choices": [choice]}).encode()], whole=True)
    chat, whole = Known("x", "", {"temperature": 0}), Known("x", "", {"temperature": 0})
    chat.learn(answer({"message": {"content": "ab"}, "finish_reason": "stop"}), answer({"logprobs": {"content": [
        {"token": "a", "top_logprobs": [{"logprob": -1.0}, {"logprob": -3.0}]}, {"token": "b", "top_logprobs": [{"logprob": -1.0}]}]}}))
    assert (chat.text, chat.finish, chat.tokens) == ("ab", "stop", [("a", 2.0), ("b", 0)])
    whole.learn(answer({"text": "ab"}), answer({"logprobs": {"tokens": ["ab"], "top_logprobs": [{"ab": -.5, "c": -.75}]}}))
    assert (whole.text, whole.tokens) == ("ab", [("ab", .25)])
    assert reply_of(answer({"message": {"content": None, "reasoning_content": "hm"}})) == ("hm", None)


def test_growth_is_from_the_second_fifth_to_the_last():
    assert grown([(share / 100, 50 + min(share, 20)) for share in range(100)]) == 0
    assert grown([(share / 100, 100.0 if share < 50 else 104.0) for share in range(100)]) == pytest.approx(.04)
    assert grown([(.1, 5.0)]) is None
