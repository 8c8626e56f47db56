"""/v1/chat/completions through the `openai` package and over bare HTTP: whole, streamed, cancelled, wrong."""

import asyncio
import json
import threading
import time

import httpx
import pytest

openai = pytest.importorskip("openai")

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtime import sampling
from runtime.engine import Engine
from runtime.errors import UserError

HELLO = [{"role": "user", "content": "The answer is 42."}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def engine(served_bundle):
    """Not the server's: the oracle."""
    with Engine(served_bundle, provider="native", threads=1) as made:
        yield made


def events(server, **body) -> list[dict]:
    """The JSON of a stream's events, without the last, which must be [DONE]."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "stream": True, **body})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def idle(server) -> bool:
    return server.call(lambda: [model.engine.scheduler.stats().rows for model in server.service.models.values()]) == [0]


def wait_until(condition, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def test_a_reply_is_the_engine_s(client, engine):
    answer = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=20)
    made, wanted = ChatCompletion.model_validate_json(answer.content, strict=True), engine.chat(HELLO, max_new_tokens=20)
    choice, = made.choices
    assert choice.message.content == wanted.text and choice.finish_reason == "length" and choice.message.role == "assistant"
    assert made.usage.prompt_tokens == wanted.timings.prompt_tokens and made.usage.completion_tokens == 20
    assert made.usage.total_tokens == made.usage.prompt_tokens + 20 and made.usage.prompt_tokens_details.cached_tokens >= 0
    assert made.model == "tiny" and abs(made.created - time.time()) < 60 and made.id.startswith("chatcmpl-")
    raw = json.loads(answer.content)
    assert raw["choices"][0]["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert {"cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "predicted_per_second"} <= set(raw["timings"])


def test_a_stream_joins_to_the_reply(server, engine):
    wanted = engine.chat(HELLO, max_new_tokens=30)
    found = events(server, max_completion_tokens=30)
    for one in found:
        ChatCompletionChunk.model_validate(one, strict=True)
        assert one["id"] == found[0]["id"] and "usage" not in one and isinstance(one["choices"][0]["delta"], dict)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in found) == wanted.text
    assert [one["choices"][0]["finish_reason"] for one in found] == [None] * (len(found) - 1) + ["length"]
    assert found[-1]["choices"][0]["delta"] == {} and found[-1]["timings"]["predicted_n"] == 30


def test_usage_comes_last_and_only_if_asked(server):
    *found, last = events(server, max_tokens=5, stream_options={"include_usage": True})
    assert all(one["usage"] is None and one["choices"] for one in found)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5 and last["timings"]["predicted_n"] == 5


def test_several_choices_are_the_engine_s_samples(server, client, engine):
    how = dict(temperature=1.0, seed=5, max_tokens=12)
    tokens = engine.chat_tokens(HELLO)
    wanted = [reply.text for reply in engine.generate([tokens], n=3, temperature=1.0, seed=5, max_new_tokens=12)]
    made = client.chat.completions.create(model="tiny", messages=HELLO, n=3, **how)
    assert [(one.index, one.message.content) for one in made.choices] == list(enumerate(wanted)) and len(set(wanted)) > 1
    assert made.usage.prompt_tokens == len(tokens) and made.usage.completion_tokens == 36
    texts = ["", "", ""]
    for one in events(server, n=3, **how):
        for choice in one["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == wanted


def test_logprobs_are_the_engine_s_streamed_too(server, client, engine):
    wanted = engine.chat(HELLO, max_new_tokens=8, logprobs=3).logprobs
    choice, = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=3).choices
    assert [one.token for one in choice.logprobs.content] == [one.text for one in wanted]
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx([one.logprob for one in wanted], abs=1e-3)
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [3] * 8
    streamed = [one["choices"][0]["logprobs"] for one in events(server, max_tokens=8, logprobs=True)]
    assert [entry["token"] for one in streamed if one for entry in one["content"]] == [one.text for one in wanted]


def test_messages_are_taken_as_clients_send_them(client, engine):
    parts = [{"type": "text", "text": "The answer"}, {"type": "text", "text": " is 42."}]
    wanted = engine.chat([{"role": "system", "content": "Be short."}, *HELLO], max_new_tokens=5).text
    made = client.chat.completions.create(model="tiny", max_tokens=5, messages=[
        {"role": "developer", "content": "Be short.", "name": "me", "nonsense": 1}, {"role": "user", "content": parts}])
    assert made.choices[0].message.content == wanted


def test_stop_strings_and_tokens(client, engine):
    text = engine.chat(HELLO, max_new_tokens=30).text
    stop = text[10:12]
    choice, = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, stop=stop).choices
    assert choice.message.content == text[:text.index(stop)] and choice.finish_reason == "stop"


def test_asyncio_clients_share_the_steps(server, engine):
    async def ask(count: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"Number {number}"}], max_tokens=10, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return await asyncio.gather(*map(one, range(count)))

    found = asyncio.run(ask(12))
    wanted = [engine.chat([{"role": "user", "content": f"Number {number}"}], max_new_tokens=10).text for number in range(12)]
    assert sum(a == b for a, b in zip(found, wanted)) >= 11                # a near tie may fall otherwise in a batch


@pytest.mark.parametrize("body, param", [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"), ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"logit_bias": {"1000000": 5}}, "logit_bias"), ({"tool_choice": "required"}, "tool_choice"), ({"tools": [{"type": "search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None), ({"stop": ["", "a"]}, "stop"), ({"chat_template_kwargs": {"foo": 1}}, None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None), ({"suffix": 1, "n": 500}, "n")])
def test_what_is_wrong_is_400_in_openai_s_shape(server, body, param):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps({"messages": HELLO, "max_tokens": 2, **body}))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None
    assert "/tmp" not in error["message"] and "\n" not in error["message"]


def test_a_prompt_past_the_context_has_its_code(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a 1 " * 500}])
    assert caught.value.code == "context_length_exceeded" and "256" in caught.value.message


def test_a_reply_may_be_asked_for_longer_than_the_context(client):
    made = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100_000, extra_body={"ignore_eos": True})
    assert made.usage.total_tokens == 256 and made.choices[0].finish_reason == "length"


def test_max_tokens_of_the_server_is_the_limit(serve):
    one = serve(max_tokens=3)
    answer = httpx.post(f"{one.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 50})
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_unknown_models_are_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_up_its_row(serve, stream):
    one = serve()
    body = json.dumps({"messages": HELLO, "stream": stream, "ignore_eos": True, "n": 8}).encode()
    cancelled = lambda: one.call(lambda: one.service.models["tiny"].engine.scheduler.stats().cancelled)     # noqa: E731
    slow = threading.Event()
    one.call(_slow_down, one.service.models["tiny"].engine, slow)
    import socket
    with socket.create_connection(("127.0.0.1", one.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
                           + str(len(body)).encode() + b"\r\n\r\n" + body)
        wait_until(lambda: not idle(one))
    wait_until(lambda: cancelled() == 8)
    slow.set()
    wait_until(lambda: idle(one))
    assert httpx.post(f"{one.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}).status_code == 200


def _slow_down(engine, until: threading.Event) -> None:
    """Have each turn of the scheduler take a while, so that a reply outlasts its client."""
    turn = engine.scheduler._turn

    def slow(wake):
        until.wait(0.1)
        turn(wake)
    engine.scheduler._turn = slow


@pytest.mark.parametrize("error, told", [(UserError("the model's largest logit is nan"), "largest logit is nan"),
                                         (ZeroDivisionError("secret"), "its log says where")])
def test_what_fails_in_a_stream_is_an_error_event(serve, monkeypatch, caplog, error, told):
    one = serve()

    def choose(self, *_):
        raise error
    for name in ("choose", "choose_among"):
        monkeypatch.setattr(sampling.Sampler, name, choose)
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError, match=told) as caught:
            for _ in client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
                pass
        assert "secret" not in str(caught.value)
        assert ("a request has failed" in caplog.text) == isinstance(error, ZeroDivisionError)
        monkeypatch.undo()
        wait_until(lambda: idle(one))
        assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).usage.completion_tokens == 2


def test_silence_is_filled_with_comments(serve, monkeypatch):
    from runtime.server import sse
    monkeypatch.setattr(sse, "PING_S", 0.05)
    one, slow = serve(), threading.Event()
    one.call(_slow_down, one.service.models["tiny"].engine, slow)
    pings = 0
    with httpx.stream("POST", f"{one.url}/v1/chat/completions", json={"messages": HELLO, "stream": True, "max_tokens": 10, "logprobs": True}) as answer:
        for line in answer.iter_lines():
            assert line == "" or line.startswith(("data: ", ": ping"))
            pings += line == ": ping"
    assert pings >= 1
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key="none") as client:          # which passes over them
        assert list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=5, logprobs=True))
