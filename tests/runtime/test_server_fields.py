"""What requests may say, and log probabilities as clients read them: against the `openai` package's own types."""

import asyncio
import json
import re

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from fastapi.exceptions import RequestValidationError
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from runtime.engine import GenerationOptions
from runtime.sampling import TokenLogprobs
from runtime.server import logprobs
from runtime.server.errors import ApiError, describe
from runtime.server.fields import Chat, Completion, _escaped, read

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


class Body:
    def __init__(self, data: bytes):
        self._data = data

    async def body(self) -> bytes:
        return self._data


def parse(kind, **fields):
    return asyncio.run(read(Body(json.dumps(fields).encode()), kind))


def refused(kind, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        try:
            body = parse(kind, **fields)
            body.generation(), body.constraint(), body.told, body.limit, kind is Completion and body.prompts()
        except RequestValidationError as error:
            raise describe(error) from None
    assert caught.value.status == 400
    return caught.value


def test_every_field_of_openai_s_client_is_taken():
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase
    given = {name: None for name in CompletionCreateParamsBase.__annotations__}
    body = parse(Chat, **given | HELLO, nonsense={"a": 1})
    assert body.generation() == {} and body.constraint() is None and body.limit is None and body.told is None


def test_sampling_goes_to_the_engine_under_its_own_names():
    body = parse(Chat, **HELLO, temperature=1, top_p=0, top_k=-1, min_p=0.1, repeat_penalty=1.1, presence_penalty=-0.5, seed=-2,
                 frequency_penalty=0.25, logit_bias={"42": -100, "7": 1.5}, stop="END", stop_token_ids=[3], ignore_eos=True)
    options = GenerationOptions(**body.generation())
    assert (options.temperature, options.top_k, options.min_p, options.repetition_penalty) == (1, 0, 0.1, 1.1)
    assert options.seed == 2 ** 64 - 2 and options.logit_bias == {42: -100, 7: 1.5} and options.stop == ("END",)
    assert 0 < options.top_p < 1e-6 and options.stop_tokens == (3,) and options.ignore_model_stop
    assert parse(Chat, **HELLO, seed=-1).generation() == {"seed": None}
    assert parse(Chat, **HELLO, max_tokens=5.0).limit == 5 and parse(Chat, **HELLO, max_tokens=5, max_completion_tokens=7).limit == 7
    assert parse(Chat, **HELLO, max_tokens=-1).limit is None


@pytest.mark.parametrize("fields, param", [
    ({"temperature": "warm"}, "temperature"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -5}, "max_completion_tokens"), ({"stop": 3}, "stop"),
    ({"stop": ["a", 1]}, "stop"), ({"stop": ["a"] * 257}, "stop"), ({"stream": "yes"}, "stream"),
    ({"n": 0}, "n"), ({"n": 1000}, "n"), ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": [[1, 2]]}, "logit_bias"),
    ({"messages": "Hi"}, "messages"), ({"messages": []}, "messages"), ({"messages": ["Hi"]}, "messages"), ({"tools": {}}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format"), ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "b"}}}, "response_format"),
    ({"grammar": "root ::= a", "guided_regex": "a"}, "guided_regex"), ({"structured_outputs": {"nonsense": 1}}, "structured_outputs.nonsense"),
    ({"guided_json": "{"}, "guided_json"), ({"seed": 1.5}, "seed"), ({"stream_options": {"include_usage": 1}}, "stream_options")])
def test_what_is_wrong_is_named(fields, param):
    error = refused(Chat, **HELLO | fields)
    assert error.param.startswith(param) and param.split(".")[-1] in str(error)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"messages": [}', b"{" * 100_000])
def test_bodies_that_are_no_object(data):
    with pytest.raises((ApiError, RequestValidationError)) as caught:
        asyncio.run(read(Body(data), Chat))
    error = describe(caught.value)
    assert error.status == 400 and "JSON" in str(error) and error.code == "invalid_json"


def test_a_missing_field_is_named():
    assert refused(Chat, model="a").param == "messages"


@pytest.mark.parametrize("prompt, parsed", [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
                                            ("", [""])])
def test_prompts(prompt, parsed):
    assert parse(Completion, prompt=prompt).prompts() == parsed


@pytest.mark.parametrize("prompt", [None, [], 3, {"a": 1}, ["a", 1], [1, "a"], [True], [[]], [1.5], ["a"] * 3000])
def test_prompts_that_are_none(prompt):
    assert refused(Completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("fields, found", [
    ({"response_format": {"type": "text"}}, None), ({"response_format": {"type": "json_object"}}, ("json", None)),
    ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, ("json_schema", {"type": "array"})),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}}, ("json_schema", {"type": "object"})),
    ({"grammar": "root ::= 'a'"}, ("grammar", "root ::= 'a'")), ({"grammar": ""}, None), ({"json_schema": {}}, ("json_schema", {})),
    ({"guided_json": '{"type": "null"}'}, ("json_schema", {"type": "null"})), ({"guided_regex": "a+"}, ("regex", "a+")),
    ({"structured_outputs": {"regex": "b"}}, ("regex", "b")), ({"structured_outputs": {"json_object": True}}, ("json", None))])
def test_forms_of_replies(fields, found):
    assert parse(Chat, **HELLO, **fields).constraint() == found


def test_choices_become_an_expression_for_just_these():
    texts = ["a.b", "c|d", "(e)", "f\\g", "[h]^$ +*?{1}", "ü&&~-#", ""]
    assert parse(Chat, **HELLO, guided_choice=texts).constraint() == ("regex", "|".join(map(_escaped, texts)))
    for text in texts:
        assert re.fullmatch(_escaped(text), text) and not re.fullmatch(_escaped(text), text + "x")


def test_logprobs_are_openai_s(tiny_bundle):
    from runtime.text import Tokenizer
    tokenizer = Tokenizer(tiny_bundle()[1] / "tokenizer.json")
    smiley = tokenizer.encode("🙂").tolist()
    alone = [tokenizer.alone(token) for token in smiley]
    assert len(smiley) > 1 and all("\ufffd" in text for text in alone)         # parts of one character
    told = [TokenLogprobs(token, -1.5, [(5, -0.5), (token, -1.5)], text, ["#", text]) for token, text in zip(smiley, alone)]
    chat = ChoiceLogprobs.model_validate(logprobs.of_chat(tokenizer, told), strict=True)
    assert bytes(byte for one in chat.content for byte in one.bytes).decode() == "🙂"
    assert [(one.token, one.logprob) for one in chat.content[0].top_logprobs] == [("#", -0.5), (alone[0], -1.5)]
    told[0] = TokenLogprobs(smiley[0], float("-inf"), [(5, -0.5)], alone[0], ["#"])
    made = Logprobs.construct(**logprobs.of_completion(tokenizer, [None, *told], 5, 10))         # as the client does
    assert made.tokens[0] == tokenizer.alone(5) and made.token_logprobs[:2] == [None, -9999.0] and made.top_logprobs[0] is None
    assert max(made.top_logprobs[1].values()) == -0.5 and len(made.top_logprobs[1]) == 2       # the chosen token is among them
    assert len(set(made.tokens)) == len(made.tokens) and made.text_offset[:2] == [10, 11]
    Logprobs.model_validate(logprobs.of_completion(tokenizer, told, 5), strict=True)
    json.dumps(made.model_dump(), allow_nan=False)
