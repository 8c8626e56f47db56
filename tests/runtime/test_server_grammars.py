"""Schemas, expressions and grammars that are wrong or out to do harm, through the server: 400 in the API's shape, and nobody else is harmed."""

import concurrent.futures
import time

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


def chain(n):
    return {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)} | {f"d{n}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


BAD = [
    (schema({"type": "objekt"}), "objekt"), (schema({"$ref": "#"}), "no text satisfies"), (schema({"$ref": "#/$defs/none"}), "does not exist"),
    (schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no text satisfies"),
    (schema({"$ref": "http://127.0.0.1:1/s.json"}), "fetch"), (schema({"not": {}}), "not"), (schema(chain(4000)), "nesting"), (schema("text"), "schema"),
    (schema({"enum": [f"{i:099}" for i in range(6000)]}), "characters"), (schema({"type": "object", "patternProperties": {"(": {}}}), "regex"),
    (schema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 25)]}), "too much time"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema"), ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_regex": "(["}, "regular expression"), ({"guided_regex": "(?<=a)b"}, "look-around"), ({"grammar": "root ::= ("}, "grammar"),
    ({"grammar": "root ::= x"}, "x"), ({"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(6000)) + 'r6000: "a"'}, "nesting"),
    ({"grammar": "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(60)) + 'R60: "a"'}, "too big"), ({"grammar": 3}, "grammar")]


@pytest.mark.parametrize("body, why", BAD, ids=[why for _, why in BAD])
def test_a_wrong_form_is_a_400(server, body, why):
    begun = time.monotonic()
    for route, request in (("chat/completions", CHAT), ("completions", {"prompt": "Hi", "max_tokens": 8})):
        reply = httpx.post(f"{server.url}/v1/{route}", json=request | body, timeout=30)
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["type"] == "invalid_request_error" and why in error["message"], reply.text[:500]
        assert "\n" not in error["message"] and len(error["message"]) < 400
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("body", [{"guided_regex": "a{0,100000}"}, {"guided_regex": "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})+"}, {"guided_regex": ".*a.{300}"},
                                  schema({"type": "string", "minLength": 100_000_000}), schema({"enum": [f"value{i}" for i in range(20_000)]}),
                                  {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'}], ids=repr)
def test_a_large_form_is_answered_or_refused(server, body):
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | body, timeout=30)
    assert reply.status_code == 200 or reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_others_go_on_meanwhile(server):
    """A stream that runs, and requests that come, beside a dozen hostile forms at once."""
    hostile = [schema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}{n}"} for i in range(1, 25)]}) for n in range(6)]
    hostile += [{"guided_regex": f".*a.{{30{n}}}"} for n in range(6)]
    alone = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"max_tokens": 30, "temperature": 0}).json()["choices"]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        harm = [pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=CHAT | body, timeout=60) for body in hostile]
        beside = [pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=CHAT | {"max_tokens": 30, "temperature": 0}, timeout=60)
                  for _ in range(4)]
        assert all(one.result().json()["choices"] == alone for one in beside)
        assert {one.result().status_code for one in harm} <= {200, 400, 429}
    assert httpx.get(f"{server.url}/health").status_code == 200
