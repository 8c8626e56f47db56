"""Replies that keep to a form: whatever a random model would say, what it does say is valid; hostile forms get a sentence."""

import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer as HfTokenizer, decoders, models, normalizers, pre_tokenizers

from runtime import structured
from runtime.engine import Engine
from runtime.errors import UserError
from runtime.structured import after_thought, constraint_for
from runtime.text import Tokenizer
from runtime.thoughts import KNOWN

pytest.importorskip("llguidance")

WORD = {"type": "string", "maxLength": 4}
SMALL = {"type": "integer", "minimum": -9, "maximum": 99}
SCHEMAS = [
    {"type": "object", "properties": {"a": SMALL}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": WORD, "b": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": WORD, "b": SMALL}, "required": ["a", "b"], "additionalProperties": {"type": "null"}, "maxProperties": 3},
    {"enum": ["red", "green", 3, None, {"x": [1]}]}, {"const": {"v": "ä\"\\\n"}},
    {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [SMALL, WORD], "items": False, "minItems": 2},
    {"anyOf": [SMALL, WORD, {"type": "null"}]}, {"type": ["boolean", "null"]},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"], "additionalProperties": False},
               {"type": "object", "properties": {"k": {"const": "b"}, "n": SMALL}, "required": ["k", "n"], "additionalProperties": False}]},
    {"allOf": [{"type": "object", "properties": {"a": SMALL}, "required": ["a"]}, {"properties": {"b": WORD}, "required": ["b"]}],
     "additionalProperties": False, "properties": {"a": True, "b": True}},
    {"$defs": {"p": {"type": "object", "properties": {"n": WORD, "k": {"type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 1}},
                     "required": ["n", "k"], "additionalProperties": False}}, "$ref": "#/$defs/p"},
    {"$defs": {"c": {"enum": ["on", "off"]}}, "type": "object", "properties": {"l": {"$ref": "#/$defs/c"}, "r": {"$ref": "#/$defs/c"}},
     "required": ["l", "r"], "additionalProperties": False, "title": "T", "description": "d"},
    {"definitions": {"n": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}, "type": "array", "items": {"$ref": "#/definitions/n"},
     "maxItems": 2},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"}, {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "string", "format": "date"},
    {"type": "integer", "minimum": 10, "maximum": 20, "multipleOf": 5}, {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    {"type": "object", "patternProperties": {"^x[0-9]$": SMALL}, "additionalProperties": False, "maxProperties": 2},
    {"type": "object", "properties": {"deep": {"type": "object", "properties": {"er": {"type": "object", "properties": {"v": {"const": 1}},
     "required": ["v"], "additionalProperties": False}}, "required": ["er"], "additionalProperties": False}}, "required": ["deep"],
     "additionalProperties": False},
    {"type": "object", "properties": {"x": {"anyOf": [{"type": "array", "items": SMALL, "maxItems": 2}, {"type": "object",
     "properties": {"y": WORD}, "additionalProperties": False}]}}, "required": ["x"], "additionalProperties": False},
    {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(6)}, "required": ["p5"], "additionalProperties": False},
]


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    with Engine(tiny_bundle("smollm2", 4)[1]) as engine:
        yield engine


def said(engine, kind, source=None, **options):
    options = {"max_new_tokens": 150, "temperature": 1.0} | options
    return engine.submit("Once upon", constraint=constraint_for(engine, kind, source), **options)


def test_every_reply_is_valid(engine):
    jsonschema = pytest.importorskip("jsonschema")
    whole = 0
    for schema in SCHEMAS:
        check = jsonschema.Draft202012Validator(schema)
        for pending in [said(engine, "json_schema", schema, seed=seed) for seed in range(6)]:
            reply = pending.result(60)
            if reply.finish_reason == "stop":
                check.validate(json.loads(reply.text))
                whole += 1
    assert whole > 0.9 * 6 * len(SCHEMAS)


def test_json_mode_gives_an_object(engine):
    replies = [said(engine, "json", seed=seed, logit_bias={engine.tokenizer.token_id("}"): 6.0}).result(60) for seed in range(8)]
    whole = [json.loads(reply.text) for reply in replies if reply.finish_reason == "stop"]
    assert len(whole) >= 4 and all(isinstance(value, dict) for value in whole)
    assert not any(re.search(r"\s{35}", reply.text) for reply in replies)


@pytest.mark.parametrize("kind, source, pattern", [
    ("regex", r"[0-9]{3}-[a-z]{2,4}(x|yz)?", r"[0-9]{3}-[a-z]{2,4}(x|yz)?"), ("regex", "今天[好天]", "今天[好天]"),
    ("grammar", 'start: A ("," A){1,3} "."\nA: /[ab]{2}/', r"[ab]{2}(,[ab]{2}){1,3}\."),
    ("grammar", 'root ::= "yes" | "no, " why\nwhy ::= [a-z] [a-z]?\n', "yes|no, [a-z]{1,2}")])
def test_expressions_and_grammars(engine, kind, source, pattern):
    for reply in [said(engine, kind, source, seed=seed).result(60) for seed in range(5)]:
        assert reply.finish_reason == "stop" and re.fullmatch(pattern, reply.text), reply.text


def test_the_end_comes_when_the_form_says_so(engine):
    """Not before it is complete, however likely it is; at once where nothing else may follow; else where the model wants it."""
    end, = engine.bundle.model["eos_token_ids"]
    assert said(engine, "regex", "[ab]{30}", logit_bias={end: 100.0}).result(60).text.strip("ab") == ""
    assert len(said(engine, "regex", "[ab]{30}", logit_bias={end: 100.0}).result(60).text) == 30
    assert len(said(engine, "regex", "[ab]{3,30}", logit_bias={end: 100.0}).result(60).text) == 3
    reply = said(engine, "regex", "[ab]{3,30}", logit_bias={end: -100.0}).result(60)
    assert len(reply.text) == 30 and reply.finish_reason == "stop"
    assert said(engine, "regex", "[ab]{30}", max_new_tokens=2).result(60).finish_reason == "length"


def test_works_with_what_else_chooses_tokens(engine):
    a, b = (engine.tokenizer.token_id(letter) for letter in "ab")
    both = [i for text, i in engine.tokenizer.vocabulary().items() if set(text) <= {"a", "b"} and "a" in text]
    assert said(engine, "regex", "[ab]{9}", suppress_tokens=both).result(60).text == "b" * 9
    assert said(engine, "regex", "[ab]{9}", temperature=0, logit_bias={a: 90.0}).result(60).text == "a" * 9
    for options in ({"top_k": 40}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"temperature": 0}, {"stop_tokens": (b,)}):
        reply = said(engine, "regex", "a[ab]{9}", seed=1, **options).result(60)
        assert re.fullmatch("a[ab]{0,9}", reply.text) and reply.finish_reason == "stop"
        assert len(reply.text) == 10 or "stop_tokens" in options
    told = said(engine, "regex", "[ab]{3}", logprobs=3).result(60).logprobs
    assert len(told[0].top) == 3 and told[0].logprob <= told[0].top[0][1]                 # the model's own, of all tokens
    with pytest.raises(UserError, match="forbid all that its grammar allows"):
        said(engine, "regex", "b+", suppress_tokens=[i for text, i in engine.tokenizer.vocabulary().items() if set(text) == {"b"}]).result(60)


def test_neighbours_do_not_matter(engine):
    """Each its own constraint, or none; a failing one ends alone."""
    class Fails:
        done = False

        def mask(self, allowed):
            raise UserError("this one fails")

    free = [engine.submit("Once upon", max_new_tokens=20) for _ in range(3)]
    failing = engine.submit("Once upon", constraint=Fails())
    bound = [said(engine, "regex", letter + "{20}") for letter in "abc"]
    assert [pending.result(60).text for pending in bound] == [letter * 20 for letter in "abc"]
    assert {pending.result(60).text for pending in free} == {engine.generate("Once upon", max_new_tokens=20)[0].text}
    with pytest.raises(UserError, match="this one fails"):
        failing.result(60)


def test_after_a_thought_that_the_prompt_opens(engine):
    known, end = KNOWN[0], engine.bundle.model["eos_token_ids"][0]
    opened, closed = (engine.tokenizer.encode(text) for text in ("hm <think>\n", "hm <think>\n</think>\n"))
    inner = constraint_for(engine, "regex", "[ab]{4}")
    assert after_thought(inner, engine, known, closed) is inner and after_thought(inner, engine, None, opened) is inner
    constraint = after_thought(inner, engine, known, opened)
    words = np.zeros(12, np.int32)
    for token in engine.tokenizer.encode("I must.</think>").tolist():
        constraint.mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert bits.sum() == 383 and not bits[end] and not constraint.done
        constraint.accept(token)
    constraint.mask(words)
    assert set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()) == {
        i for text, i in engine.tokenizer.vocabulary().items() if set(text) <= {"a", "b"} and len(text) <= 4}
    for token in engine.tokenizer.encode("abab").tolist():
        constraint.accept(token)
    assert constraint.done


@pytest.mark.parametrize("kind", ["gemma", "unigram"])
def test_sentencepieces_tokenizers(kind, tmp_path):
    """Bytes in tokens of their own, and spaces that are no spaces."""
    tokens = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *map(chr, range(33, 127))]
    if kind == "gemma":
        made = HfTokenizer(models.BPE({token: i for i, token in enumerate([*tokens, "\u2581a", "ab"])}, [("\u2581", "a"), ("a", "b")],
                                      unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer, made.pre_tokenizer = normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made = HfTokenizer(models.Unigram([(token, -float(i > 1) * 3) for i, token in enumerate(tokens)], 0, True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, rng = Tokenizer(tmp_path / "tokenizer.json"), np.random.default_rng(0)
    vocab = len(tokenizer) + 3                            # a table with padding
    engine = SimpleNamespace(tokenizer=tokenizer, bundle=SimpleNamespace(model={"config": {"vocab_size": vocab}, "eos_token_ids": [1]}))
    for _ in range(8):
        constraint, said, words = constraint_for(engine, "regex", "x[ab é日]{8}"), [], np.zeros(-(-vocab // 32), np.int32)
        while not constraint.done:
            constraint.mask(words)
            said.append(int(rng.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")))))
            constraint.accept(said[-1])
        assert re.fullmatch("x[ab é日]{8}", tokenizer.decode(said))


def chain(n):
    return {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)} | {f"d{n}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("kind, source, why", [
    ("xml", "", "the kinds are json"), ("json_schema", "{", "EOF"), ("json_schema", [1], "object"), ("json_schema", {"type": "objekt"}, "objekt"),
    ("json_schema", {"type": "object", "not": {"required": ["a"]}}, "not"), ("json_schema", {"$ref": "#"}, "no text satisfies"),
    ("json_schema", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text satisfies"),
    ("json_schema", {"$ref": "https://example.com/s.json"}, "example.com"), ("json_schema", {"$ref": "#/$defs/none"}, "does not exist"),
    ("json_schema", {"minimum": 5, "maximum": 3, "type": "integer"}, "greater"), ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"enum": [f"{i:099}" for i in range(6000)]}, "characters"), ("json_schema", {"n": float("nan")}, "no JSON"),
    ("json_schema", '{"type":"array","items":' * 5000 + "{}" + "}" * 5000, "recursion"), ("json_schema", chain(4000), "nesting"),
    ("json_schema", {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 25)]}, "too much time"),
    ("regex", "([", "unclosed"), ("regex", "(?=a)b", "look-ahead"), ("regex", "[^\\s\\S]", "no text satisfies"), ("regex", 3, "must be a text"),
    ("regex", "(" * 3000 + "a" + ")" * 3000, "regex"), ("regex", "\ud800", "surrogates"), ("grammar", "", "root"), ("grammar", "start: start", "no text"),
    ("grammar", "root ::= " + "(" * 3000, "recursion"), ("grammar", 'start: <|nobody|> "a"', "special token"), ("grammar", "%import /etc/passwd", "Expected name"),
    ("grammar", "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(60)) + 'R60: "a"', "too big"),
    ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(6000)) + 'r6000: "a"', "nesting"),
])
def test_hostile_forms_get_a_sentence(engine, kind, source, why):
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"(?i){re.escape(why)}") as refused:
        constraint_for(engine, kind, source)
    assert len(str(refused.value)) < 320 and "\n" not in str(refused.value) and time.monotonic() - begun < 12


def test_a_schema_that_holds_itself(engine):
    schema = {"type": "object"}
    schema["properties"] = {"a": schema}
    with pytest.raises(UserError, match="no JSON"):
        constraint_for(engine, "json_schema", schema)


@pytest.mark.parametrize("kind, source", [("regex", "a{0,100000}"), ("regex", "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})+"), ("regex", ".*a.{300}"),
                                          ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'),
                                          ("json_schema", {"enum": [f"value{i}" for i in range(20_000)]}),
                                          ("json_schema", {"type": "string", "minLength": 100_000_000})])
def test_large_forms_work_or_end_alone(engine, kind, source):
    """Nothing that is taken holds up the others: a step is either made or refused."""
    neighbour, begun = engine.submit("Once upon", max_new_tokens=40), time.monotonic()
    try:
        reply = said(engine, kind, source, max_new_tokens=30).result(30)
        assert reply.finish_reason in ("stop", "length")
    except UserError as error:
        assert "\n" not in str(error)
    assert len(neighbour.result(30).tokens) > 0 and time.monotonic() - begun < 12


def test_a_slow_mask_ends_its_reply(engine, monkeypatch):
    monkeypatch.setattr(structured, "SLOWEST_S", 0.0)
    with pytest.raises(UserError, match="took more than 0.0 s"):
        said(engine, "regex", "[ab]{4}").result(60)


def test_a_form_is_compiled_once(engine, monkeypatch):
    begun = constraint_for(engine, "regex", "once[ab]{3}")
    monkeypatch.setattr(structured.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    first, second = (constraint_for(engine, "regex", "once[ab]{3}") for _ in range(2))
    words, after = np.zeros(12, np.int32), np.zeros(12, np.int32)
    begun.mask(words)
    first.accept(int(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0]))
    second.mask(after)                                    # which the other's token has not moved
    assert words.any() and (after == words).all()


def test_threads_compile_side_by_side(engine):
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(said(engine, "regex", f"n{n % 3}[ab]{{3}}").result(60).text)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text[:2] for text in found) == ["n0", "n0", "n1", "n1", "n2", "n2"]


def test_without_llguidance_it_says_what_installs_it(engine, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    monkeypatch.setattr(structured, "_of_tokenizer", {})
    with pytest.raises(UserError, match=r"pip install '.\[serve\]'"):
        constraint_for(engine, "json")


def test_a_flood_of_slow_forms_is_turned_away(engine, monkeypatch):
    """They wait for two turns at most so long, then are told to come again; what is compiled already needs no turn."""
    from runtime.pending import Busy
    constraint_for(engine, "regex", "known[ab]")
    monkeypatch.setattr(structured, "_TURN_S", 0.1)
    with structured._trying, structured._trying:
        with pytest.raises(Busy, match="try again later"):
            constraint_for(engine, "regex", "unknown[ab]")
        constraint_for(engine, "regex", "known[ab]")
    constraint_for(engine, "regex", "unknown[ab]")
