"""/v1/responses through the `openai` package, and /v1/messages over bare HTTP: the same replies as those of a chat."""

import json

import httpx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")

from openai.types.responses import Response
from test_server_tools import CALL, HELLO, WEATHER, Weather, client  # noqa: F401  (a fixture)

FLAT = {"type": "function", **WEATHER["function"]}
THERE_AND_BACK = [
    {"role": "user", "content": [{"type": "input_text", "text": "How is the weather?"}]},
    {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Rome", "days": 1}'},
    {"type": "function_call_output", "call_id": "a", "output": "sunny"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sunny.", "annotations": []}]},
    {"role": "user", "content": "And in Oslo?"}]
CHAT = [*HELLO, {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'}}]},
    {"role": "tool", "tool_call_id": "a", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And in Oslo?"}]


def chatted(client, messages=HELLO, **how):
    return client.chat.completions.create(model="thinker", messages=messages, **how)


def test_a_response_is_the_chat_s_reply(client):
    wanted = chatted(client, [{"role": "system", "content": "Short."}, *CHAT], tools=[WEATHER], max_tokens=12)
    made = client.responses.create(model="thinker", instructions="Short.", input=THERE_AND_BACK, tools=[FLAT], max_output_tokens=12)
    Response.model_validate(made.model_dump(mode="json"), strict=True)
    assert made.output_text == wanted.choices[0].message.content and made.status == "incomplete"
    assert made.incomplete_details.reason == "max_output_tokens"
    assert (made.usage.input_tokens, made.usage.output_tokens) == (wanted.usage.prompt_tokens, 12)
    assert client.responses.create(model="thinker", input="How is the weather?", max_output_tokens=5).output_text == \
        chatted(client, max_tokens=5).choices[0].message.content


def test_a_response_streams_what_the_client_puts_together(client):
    how = dict(model="thinker", input="How is the weather?", tools=[FLAT], max_output_tokens=400, extra_body={"guided_choice": ["Well.\n" + CALL]})
    with client.responses.stream(**how) as stream:
        kinds = [one.type for one in stream]
        final = stream.get_final_response()
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-1] == "response.completed" and "response.function_call_arguments.delta" in kinds
    whole = client.responses.create(**how)
    for made in (final, whole):
        said, call = made.output
        assert said.content[0].text == "Well." and made.status == "completed"
        assert call.name == "weather" and json.loads(call.arguments) == {"city": "Rome", "days": 2} and call.call_id
    thought = client.responses.create(model="thinker", input="How?", max_output_tokens=20, extra_body={"enable_thinking": True})
    assert thought.output[0].type == "reasoning" and thought.output[0].content[0].text


def test_a_response_is_parsed(client):
    made = client.responses.parse(model="thinker", input="How?", text_format=Weather, max_output_tokens=300, temperature=0.5)
    assert isinstance(made.output_parsed, Weather)


@pytest.mark.parametrize("body, param", [({"input": []}, "input"), ({"input": 3}, "input"), ({"input": ["a"]}, "input[0]"), ({}, "input"),
                                         ({"input": [{"type": "image"}]}, "input[0]"), ({"input": "a", "previous_response_id": "r"}, "previous_response_id"),
                                         ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"), ({"input": "a", "text": 3}, "text"),
                                         ({"input": "a", "text": {"format": 3}}, "response_format"), ({"input": [{"role": 3}]}, "messages[0].role")])
def test_responses_that_cannot_be(thinking, body, param):
    answer = httpx.post(f"{thinking.url}/v1/responses", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


TOOL = {"name": "weather", "description": "d", "input_schema": WEATHER["function"]["parameters"]}
TURNS = [{"role": "user", "content": "How is the weather?"},
         {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""},
                                           {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome", "days": 1}}]},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sunny"}]},
                                      {"type": "text", "text": "And in Oslo?"}]}]


def ask(server, messages=TURNS[:1], **more):
    return httpx.post(f"{server.url}/v1/messages", json={"model": "thinker", "max_tokens": 400, "messages": messages, **more},
                      headers={"x-api-key": "none", "anthropic-version": "2023-06-01"})


def test_a_message_is_the_chat_s_reply(client, thinking):
    chat = [{"role": "system", "content": "Short."}, *CHAT[:3], CHAT[-1]]
    wanted = chatted(client, chat, max_tokens=9)
    made = ask(thinking, TURNS, system=[{"type": "text", "text": "Short."}], max_tokens=9).json()
    assert made["type"] == "message" and made["role"] == "assistant" and made["stop_reason"] == "max_tokens" and made["stop_sequence"] is None
    assert made["content"] == [{"type": "text", "text": wanted.choices[0].message.content}]
    assert made["usage"]["input_tokens"] + made["usage"]["cache_read_input_tokens"] == wanted.usage.prompt_tokens
    counted = httpx.post(f"{thinking.url}/v1/messages/count_tokens", json={"model": "thinker", "messages": TURNS, "system": "Short."}).json()
    assert counted == {"input_tokens": wanted.usage.prompt_tokens}


def test_a_message_calls_tools_streamed_too(thinking):
    how = {"tools": [TOOL], "guided_choice": ["Well.\n" + CALL]}
    made = ask(thinking, **how).json()
    assert made["stop_reason"] == "tool_use" and made["content"][0] == {"type": "text", "text": "Well."}
    assert made["content"][1].pop("id") and made["content"][1] == {"type": "tool_use", "name": "weather", "input": {"city": "Rome", "days": 2}}
    blocks = {}
    lines = ask(thinking, stream=True, **how).text.split("\n\n")
    assert lines.pop() == ""
    kinds = []
    for line in lines:
        name, data = line.split("\n")
        data = json.loads(data.removeprefix("data: "))
        assert name == f"event: {data['type']}"
        kinds.append(data["type"])
        if data["type"] == "content_block_delta":
            blocks.setdefault(data["index"], []).append(data["delta"].get("text") or data["delta"].get("partial_json"))
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert "".join(blocks[0]) == "Well." and json.loads("".join(blocks[1])) == {"city": "Rome", "days": 2}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        forced = ask(thinking, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True}, temperature=1.0).json()
        assert [block["type"] for block in forced["content"]] == ["tool_use"]
        Weather.model_validate(forced["content"][0]["input"])


def test_a_message_says_what_stopped_it(thinking):
    text = ask(thinking, max_tokens=20).json()["content"][0]["text"]
    stop = text[5:7]
    made = ask(thinking, max_tokens=20, stop_sequences=["nowhere", stop]).json()
    assert made["stop_reason"] == "stop_sequence" and made["stop_sequence"] == stop
    assert made["content"] == ([{"type": "text", "text": text[:text.index(stop)]}] if text.index(stop) else [])
    assert ask(thinking, thinking={"type": "enabled", "budget_tokens": 100}, max_tokens=9).json()["content"][0]["type"] == "thinking"


@pytest.mark.parametrize("body", [{"messages": []}, {"messages": 3}, {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                                  {"model": "nobody"}, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"max_tokens": "a"}])
def test_wrong_messages_are_errors_in_anthropic_s_shape(thinking, body):
    answer = ask(thinking, **{"messages": TURNS[:1]} | body)
    assert answer.status_code in (400, 404) and answer.json()["type"] == "error" and answer.json()["error"]["message"]


def test_what_fails_in_a_stream_of_messages_is_an_error_event(thinking, monkeypatch):
    from runtime import sampling
    from runtime.errors import UserError

    def choose(self, *_):
        raise UserError("the model's largest logit is nan")
    for name in ("choose", "choose_among"):
        monkeypatch.setattr(sampling.Sampler, name, choose)
    *_, last, rest = ask(thinking, stream=True).text.split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error" and rest == ""
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "error": {
        "message": "the model's largest logit is nan", "type": "invalid_request_error", "param": None, "code": None}}
