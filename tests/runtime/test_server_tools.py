"""Tools, thoughts and structured output through the server, with clients that parse them: a random model is held to what it says."""

import json
from typing import Literal

import httpx
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")

from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    city: Literal["Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    utc: bool


WEATHER, CLOCK = ({"type": "function", "function": {"name": kind.__name__.lower(), "parameters": kind.model_json_schema()}} for kind in (Weather, Clock))
HELLO = [{"role": "user", "content": "How is the weather?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(thinking):
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def said(text: str) -> dict:
    """What holds the model to this very text."""
    return {"extra_body": {"guided_choice": [text]}, "max_tokens": 400}


def streamed(client, **how):
    """The message that a client puts together from a stream, with its finish_reason and the kinds of deltas that came."""
    message, reason, calls = {"content": "", "reasoning_content": ""}, None, {}
    for chunk in client.chat.completions.create(model="thinker", messages=HELLO, stream=True, **how):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.index not in calls:
                assert call.id and call.type == "function" and call.function.arguments == ""
                calls[call.index] = {"name": call.function.name, "arguments": "", "id": call.id}
            else:
                assert call.id is None and call.function.name is None
            calls[call.index]["arguments"] += call.function.arguments
    return message, reason, list(calls.values())


@pytest.mark.parametrize("text, content, calls", [
    (CALL, None, [("weather", {"city": "Rome", "days": 2})]),
    ("Let me see.\n" + CALL, "Let me see.", [("weather", {"city": "Rome", "days": 2})]),
    (CALL + "\n" + CALL.replace("Rome", "Oslo"), None, [("weather", {"city": "Rome", "days": 2}), ("weather", {"city": "Oslo", "days": 2})]),
    ("No <tool_call> here", "No <tool_call> here", []), ('<tool_call>\n{"name": weather}\n</tool_call>',) * 2 + ([],)])
def test_calls_come_as_clients_want_them(client, text, content, calls):
    choice, = client.chat.completions.create(model="thinker", messages=HELLO, tools=[WEATHER], **said(text)).choices
    assert choice.message.content == content
    assert [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls or []] == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    message, reason, found = streamed(client, tools=[WEATHER], **said(text))
    assert message["content"] == (content or "") and reason == choice.finish_reason
    assert [(one["name"], json.loads(one["arguments"])) for one in found] == calls
    assert len({one["id"] for one in found}) == len(found)


def test_one_call_where_parallel_ones_are_not_wanted(client):
    text = CALL + "\n" + CALL.replace("Rome", "Oslo")
    choice, = client.chat.completions.create(model="thinker", messages=HELLO, tools=[WEATHER], parallel_tool_calls=False, **said(text)).choices
    assert [json.loads(one.function.arguments)["city"] for one in choice.message.tool_calls] == ["Rome"]
    assert choice.finish_reason == "tool_calls"


def test_without_tools_a_call_is_content(client):
    for how in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice, = client.chat.completions.create(model="thinker", messages=HELLO, **how, **said(CALL)).choices
        assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"


@pytest.mark.parametrize("choice, names", [("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "clock"}}, {"clock"})])
def test_a_required_call_is_one_and_fits_its_schema(client, choice, names):
    for seed in range(3):
        made, = client.chat.completions.create(model="thinker", messages=HELLO, tools=[WEATHER, CLOCK], tool_choice=choice, temperature=1.0,
                                               seed=seed, max_tokens=300, parallel_tool_calls=False).choices
        call, = made.message.tool_calls
        assert call.function.name in names and made.finish_reason == "tool_calls" and made.message.content is None
        {"weather": Weather, "clock": Clock}[call.function.name].model_validate_json(call.function.arguments)


def test_a_call_and_its_result_go_back_to_the_model(client, thinking):
    history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {
        "name": "weather", "arguments": '{"city": "Rome", "days": 1}'}}]}, {"role": "tool", "tool_call_id": "a", "content": "sunny"}]
    made = client.chat.completions.create(model="thinker", messages=history, tools=[WEATHER], max_tokens=3)
    engine = thinking.service.models["thinker"].engine
    prompt = engine.tokenizer.decode(engine.chat_tokens(history, template={"tools": [WEATHER]}))
    assert '{"name": "weather", "arguments": {"city": "Rome", "days": 1}}' in prompt and "sunny" in prompt
    assert made.usage.prompt_tokens == len(engine.chat_tokens(history, template={"tools": [WEATHER]}))


def test_thoughts_are_told_apart(client):
    how = {"extra_body": {"enable_thinking": True}, "max_tokens": 30}
    choice, = client.chat.completions.create(model="thinker", messages=HELLO, **how).choices
    assert choice.message.reasoning_content and choice.message.reasoning == choice.message.reasoning_content
    assert choice.message.content == ""                                   # the thought has not ended
    message, _, _ = streamed(client, **how)
    assert message["reasoning_content"] == choice.message.reasoning_content and message["content"] == ""
    for off in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}, {}, {"reasoning_effort": "none"}):
        choice, = client.chat.completions.create(model="thinker", messages=HELLO, max_tokens=9, extra_body=off).choices
        assert not hasattr(choice.message, "reasoning_content") and choice.message.content


def test_a_form_begins_where_the_thought_ends(client):
    made, = client.chat.completions.create(model="thinker", messages=HELLO, max_tokens=200, temperature=1.0, seed=1, extra_body={
        "enable_thinking": True, "guided_regex": "(yes|no)!"}).choices
    assert len(made.message.reasoning_content) > 4 and made.message.content in ("", "yes!", "no!")


def test_schemas_hold_a_reply(client):
    schema = Weather.model_json_schema()
    for form in ({"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}, {"type": "json_object", "schema": schema}):
        for seed in range(3):
            made, = client.chat.completions.create(model="thinker", messages=HELLO, response_format=form, temperature=1.0, seed=seed, max_tokens=300).choices
            if made.finish_reason == "stop":
                Weather.model_validate_json(made.message.content)
    made, = client.chat.completions.create(model="thinker", messages=HELLO, response_format={"type": "json_object"}, max_tokens=50).choices
    assert made.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("first, reason", [("<", "tool_calls"), ("{", "stop")])
def test_with_tools_a_schema_leaves_the_choice(client, thinking, first, reason):
    tokens = {i for text, i in thinking.service.models["thinker"].engine.tokenizer.vocabulary().items() if text.startswith(first)}
    schema = {"type": "json_schema", "json_schema": {"name": "it", "schema": Clock.model_json_schema()}}
    made, = client.chat.completions.create(
        model="thinker", messages=HELLO, tools=[WEATHER], response_format=schema, parallel_tool_calls=False, max_tokens=300,
        logit_bias={str(token): 50 for token in tokens}).choices
    assert made.finish_reason == reason
    if reason == "stop":
        Clock.model_validate_json(made.message.content)
    else:
        Weather.model_validate_json(made.message.tool_calls[0].function.arguments)


def test_openai_s_own_parse(client):
    made = client.chat.completions.parse(model="thinker", messages=HELLO, response_format=Weather, max_tokens=500, temperature=0.5, seed=4)
    assert isinstance(made.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(model="thinker", messages=HELLO, response_format=Weather, max_tokens=500, temperature=0.5, seed=4) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == made.choices[0].message.parsed


@pytest.mark.parametrize("body, text", [({"guided_regex": "[ab]{3}c"}, 4), ({"grammar": 'root ::= "ab" | "cd"'}, 2),
                                        ({"grammar": 'start: "xyz"'}, 3), ({"structured_outputs": {"choice": ["one", "six"]}}, 3)])
def test_expressions_and_grammars(thinking, body, text):
    answer = httpx.post(f"{thinking.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 20, **body}).json()
    assert len(answer["choices"][0]["message"]["content"]) == text and answer["choices"][0]["finish_reason"] == "stop"
    answer = httpx.post(f"{thinking.url}/v1/completions", json={"prompt": "So", "max_tokens": 20, **body}).json()
    assert len(answer["choices"][0]["text"]) == text and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("body", [
    {"guided_regex": "(a"}, {"grammar": "start: nothing"}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/nowhere"}}}}, {"guided_regex": "(a{1000}){1000}{1000}"},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, {"tools": [WEATHER], "tool_choice": "sometimes"},
    {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}])
def test_forms_that_cannot_be_are_400(thinking, body):
    answer = httpx.post(f"{thinking.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 5, **body}, timeout=30)
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


# Marks that are control tokens: a reply's text shows them to the parser alone.

@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A server of a tiny model with LFM2's marks of calls, and Mistral's of thoughts, among its control tokens."""
    from server_fixtures import THINKING, running
    from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

    from export import onnx
    folder, marks = tmp_path_factory.mktemp("marked"), ["<|tool_call_start|>", "<|tool_call_end|>", "[THINK]", "[/THINK]"]
    tiny_model("smollm2", max_position_embeddings=4096, vocab_size=VOCAB_SIZE + len(marks)).save_pretrained(folder / "checkpoint")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.save_pretrained(folder / "checkpoint")
    template = THINKING.replace("<tool_call>", marks[0]).replace("</tool_call>", marks[1]).replace("<think>", marks[2]).replace("</think>", marks[3])
    (folder / "checkpoint" / "chat_template.jinja").write_text(template)
    assert onnx.main([str(folder / "checkpoint"), "-o", str(folder / "thinker")]) == 0
    with running(folder / "thinker") as one:
        yield one


@pytest.mark.parametrize("thinks", [False, True])
def test_marks_that_are_control_tokens_are_read_and_not_shown(marked, thinks):
    vocabulary = marked.service.models["thinker"].engine.tokenizer.vocabulary()
    with openai.OpenAI(base_url=f"{marked.url}/v1", api_key="none") as client:
        for seed in range(3):
            how = dict(tools=[WEATHER, CLOCK], tool_choice="required", temperature=0.7, seed=seed, max_tokens=600, parallel_tool_calls=False, extra_body={
                "enable_thinking": thinks}, logit_bias={str(vocabulary["[/THINK]"]): 3})
            made, = client.chat.completions.create(model="thinker", messages=HELLO, **how).choices
            call, = made.message.tool_calls
            {"weather": Weather, "clock": Clock}[call.function.name].model_validate_json(call.function.arguments)
            assert made.message.content is None and bool(getattr(made.message, "reasoning_content", "")) == thinks
            message, reason, calls = streamed(client, **how)
            assert reason == "tool_calls" and message["content"] == "" and calls[0]["arguments"] == call.function.arguments
