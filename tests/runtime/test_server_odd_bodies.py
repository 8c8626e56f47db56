"""Requests with odd values where sound ones have others: whatever they are, no answer is the server's fault."""

import copy
import json
import random

import httpx
import pytest

pytest.importorskip("fastapi")

from test_server_conversions import FLAT, THERE_AND_BACK, TOOL, TURNS
from test_server_tools import HELLO, WEATHER

HISTORY = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]},
           {"role": "assistant", "content": None, "reasoning_content": "x", "tool_calls": [{"id": "a", "type": "function", "function": {
               "name": "weather", "arguments": '{"city": "Rome"}'}}]}, {"role": "tool", "tool_call_id": "a", "content": "sun"}, *HELLO]
SAMPLING = {"model": "thinker", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "logit_bias": {"5": 1}, "max_tokens": 2, "n": 2,
            "max_completion_tokens": 2, "max_output_tokens": 2, "stream": False}
BODIES = {
    "chat/completions": SAMPLING | {"messages": HISTORY, "stop": ["q"], "logprobs": True, "top_logprobs": 2, "tools": [WEATHER], "tool_choice": "auto",
                                    "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": True}},
    "completions": SAMPLING | {"prompt": [[1, 2, 3], [4, 5]], "echo": True, "logprobs": 1},
    "responses": SAMPLING | {"input": THERE_AND_BACK, "tools": [FLAT], "tool_choice": "auto", "reasoning": {"effort": "low"}, "text": {}},
    "messages": SAMPLING | {"messages": TURNS, "tools": [TOOL], "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled"}}}
ODD = [None, True, False, 0, -1, 2 ** 31, 2 ** 63, 2 ** 70, 1.5, 1e308, "", "a", "\ud800", "\x00", "<|im_end|>", "<tool_call>", [], {}, [[]], [{}],
       {"a": 1}, {"type": "x"}, [None], [1], ["a"], "null", [1, "a"]]


def places(value, place=()):
    """The way to every value inside a value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(value[key], (*place, key))


@pytest.mark.parametrize("route", BODIES)
def test_no_answer_is_the_server_s_fault(thinking, serve, route):
    chance, one = random.Random(route), serve(*thinking.service.options.bundles, max_tokens=4)
    with httpx.Client(timeout=30) as client:
        assert client.post(f"{one.url}/v1/{route}", json=BODIES[route]).status_code == 200
        for _ in range(60):
            body = copy.deepcopy(BODIES[route])
            for _ in range(chance.choice((1, 1, 2))):
                *way, last = chance.choice(list(places(body)))
                inner = body
                for key in way:
                    inner = inner[key]
                inner[last] = copy.deepcopy(chance.choice(ODD))
            sent = json.dumps(body)
            answer = client.post(f"{one.url}/v1/{route}", content=sent)
            assert answer.status_code in (200, 400, 404) and "internal_error" not in answer.text, sent
            assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}, sent
