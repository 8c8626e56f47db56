"""Clients as they are, against a real server: LangChain, simonw's `llm`, and what Open WebUI sends."""

import asyncio
import json
from typing import Literal

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from test_server_tools import HELLO, WEATHER, Weather


def weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"{city}: sunny for {days} days"


# LangChain

@pytest.fixture(scope="module")
def langchain(thinking):
    made = pytest.importorskip("langchain_openai").ChatOpenAI
    return lambda **how: made(model="thinker", base_url=f"{thinking.url}/v1", api_key="none", max_retries=0, **{"max_tokens": 300, **how})


def test_langchain_invokes_and_streams(langchain):
    model = langchain(max_tokens=12, stream_usage=True)
    whole = model.invoke([("system", "Short."), ("human", "How is the weather?")])
    assert whole.content and whole.usage_metadata["output_tokens"] == 12 and whole.response_metadata["finish_reason"] == "length"
    chunks = list(model.stream([("system", "Short."), ("human", "How is the weather?")]))
    joint = chunks[0]
    for chunk in chunks[1:]:
        joint += chunk
    assert joint.content == whole.content and joint.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in langchain(max_tokens=12).stream("Hi")) == langchain(max_tokens=12).invoke("Hi").content

    async def asked() -> list:
        return await asyncio.gather(*(model.ainvoke(f"Number {n}") for n in range(4)))
    assert all(reply.content for reply in asyncio.run(asked()))


def test_langchain_reads_logprobs_and_stops(langchain):
    made = langchain(max_tokens=4, logprobs=True, top_logprobs=2).invoke("Hi")
    assert [len(one["top_logprobs"]) for one in made.response_metadata["logprobs"]["content"]] == [2] * 4
    text = langchain(max_tokens=20).invoke("Hi").content
    assert langchain(max_tokens=20).invoke("Hi", stop=[text[4:6]]).content == text[:text.index(text[4:6])]


@pytest.mark.parametrize("choice", ["any", "weather", True])
def test_langchain_binds_tools(langchain, choice):
    from langchain_core.messages import HumanMessage, ToolMessage
    bound = langchain(temperature=0.7, seed=3, model_kwargs={"parallel_tool_calls": False}).bind_tools([weather], tool_choice=choice)
    asked = [HumanMessage("How is the weather?")]
    made = bound.invoke(asked)
    call, = made.tool_calls
    assert call["name"] == "weather" and set(call["args"]) == {"city", "days"} and isinstance(call["args"]["days"], int)
    joint = None
    for chunk in bound.stream(asked):
        joint = chunk if joint is None else joint + chunk
    assert [(one["name"], one["args"]) for one in joint.tool_calls] == [(call["name"], call["args"])]
    told = langchain(max_tokens=5).bind_tools([weather]).invoke([*asked, made, ToolMessage("sunny", tool_call_id=call["id"])])
    assert told.usage_metadata["input_tokens"] > made.usage_metadata["input_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(langchain, method):
    for seed in range(3):
        made = langchain(temperature=0.7, seed=seed).with_structured_output(Weather, method=method).invoke("How is the weather?")
        assert isinstance(made, Weather)


# llm, by simonw

@pytest.fixture(scope="module")
def llm(thinking, tmp_path_factory):
    found = pytest.importorskip("llm")
    folder = tmp_path_factory.mktemp("llm")
    (folder / "extra-openai-models.yaml").write_text(f"""
- model_id: served
  model_name: thinker
  api_base: "{thinking.url}/v1"
  supports_schema: true
  supports_tools: true
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(folder))
        patch.setattr("llm.plugins.LLM_LOAD_PLUGINS", "")         # none of those that happen to be installed
        yield found


@pytest.mark.parametrize("stream", [True, False])
def test_llm_prompts(llm, stream):
    model = llm.get_model("served")
    response = model.prompt("How is the weather?", system="Short.", max_tokens=10, stream=stream, key="none")
    assert response.text() and response.usage().output == 10 and response.usage().input > 5


def test_llm_keeps_a_conversation(llm):
    talk = llm.get_model("served").conversation()
    first = talk.prompt("How is the weather?", max_tokens=5, key="none")
    first.text()
    second = talk.prompt("And tomorrow?", max_tokens=5, key="none")
    assert second.text() and second.usage().input > first.usage().input


def test_llm_asks_for_a_schema(llm):
    response = llm.get_model("served").prompt("How is the weather?", schema=Weather, temperature=0.7, seed=1, max_tokens=300, key="none")
    Weather.model_validate_json(response.text())


# Open WebUI, as its backend asks

def open_webui(url: str, **more) -> tuple[list[dict], dict, dict]:
    """What its middleware makes of a stream: the deltas, the usage that it merges, and the timings."""
    body = {"stream": True, "model": "thinker", "messages": [{"role": "system", "content": "You help."}, *HELLO],
            "stream_options": {"include_usage": True}, "max_tokens": 20, "user": {"name": "u", "id": "1"}, "metadata": {"chat_id": "c"}, **more}
    deltas, usage, timings = [], {}, {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer sk-1234"}) as answer:
        assert answer.status_code == 200 and "text/event-stream" in answer.headers["content-type"]
        for line in answer.iter_lines():
            if not line.startswith("data:"):
                continue
            line = line.removeprefix("data:").strip()
            if line == "[DONE]":
                break
            data = json.loads(line)
            usage |= data.get("usage") or {}
            timings |= data.get("timings") or {}
            deltas += [choice["delta"] for choice in data["choices"]]
    return deltas, usage, timings


def test_open_webui_s_requests(thinking):
    assert [model["id"] for model in httpx.get(f"{thinking.url}/v1/models").json()["data"]] == ["thinker"]
    deltas, usage, timings = open_webui(thinking.url)
    assert "".join(delta.get("content") or "" for delta in deltas) and usage["completion_tokens"] == 20 and timings["predicted_n"] == 20
    deltas, _, _ = open_webui(thinking.url, enable_thinking=True)
    assert "".join(delta.get("reasoning_content") or delta.get("reasoning") or "" for delta in deltas)
    deltas, _, _ = open_webui(thinking.url, tools=[WEATHER], tool_choice="required", max_tokens=300, temperature=0.7, parallel_tool_calls=False)
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert calls[0]["function"]["name"] == "weather" and {call["index"] for call in calls} == {0}
    Weather.model_validate_json("".join(call["function"]["arguments"] for call in calls))
    title = httpx.post(f"{thinking.url}/v1/chat/completions", json={"model": "thinker", "messages": HELLO, "stream": False,
                                                                    "max_completion_tokens": 10, "metadata": {"task": "title_generation"}})
    assert title.json()["choices"][0]["message"]["content"]


# The real model

@pytest.mark.real
def test_smollm2_answers_a_conversation(smollm2_int4, tmp_path):
    """In int4: sense in a stream, a conversation whose beginning is read once, a schema kept, and replies side by side as alone."""
    openai = pytest.importorskip("openai")
    from server_fixtures import running

    from export import onnx
    assert onnx.main([str(smollm2_int4), "-o", str(tmp_path / "smollm2")]) == 0
    with running(tmp_path / "smollm2", threads=2) as one, openai.OpenAI(base_url=f"{one.url}/v1", api_key="none") as client:
        def ask(messages, **how):
            return client.chat.completions.create(model="smollm2", messages=messages, max_tokens=60, **how)

        talk = [{"role": "system", "content": "You are a helpful assistant who answers briefly and truthfully. " * 8},
                {"role": "user", "content": "What is the capital of France?"}]
        said = "".join(chunk.choices[0].delta.content or "" for chunk in ask(talk, stream=True))
        assert "Paris" in said
        again = ask([*talk, {"role": "assistant", "content": said}, {"role": "user", "content": "What is the capital of Italy?"}])
        assert "Rome" in again.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens > 0.6 * again.usage.prompt_tokens
        schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
        held = ask(talk, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}})
        assert json.loads(held.choices[0].message.content) == {"city": "Paris"}

        lands = [[talk[0], {"role": "user", "content": f"What is the capital of {land}?"}] for land in ("Italy", "Spain", "Japan", "Egypt", "Norway")]
        alone = [ask(messages).choices[0].message.content for messages in lands]

        async def together() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{one.url}/v1", api_key="none") as many:
                made = await asyncio.gather(*(many.chat.completions.create(model="smollm2", messages=messages, max_tokens=60) for messages in lands))
                return [reply.choices[0].message.content for reply in made]
        assert sum(a == b for a, b in zip(asyncio.run(together()), alone)) >= 4         # one near tie may fall otherwise
