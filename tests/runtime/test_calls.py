"""Calls of tools in texts: what each syntax writes is read back, cut anywhere; what misses it is content, to the letter."""

import ast
import json
import random
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer as HfTokenizer, decoders, models, pre_tokenizers

from runtime.calls import Call, CallArguments, CallBegun, Content, parser_of
from runtime.errors import UserError
from runtime.structured import constraint_for
from runtime.template import ChatTemplate
from runtime.text import ReplyText, Tokenizer

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "$defs": {"unit": {"enum": ["C", "F"]}}, "type": "object", "required": ["city"], "additionalProperties": False, "properties": {
        "city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "minimum": 0, "maximum": 9}, "unit": {"$ref": "#/$defs/unit"},
        "zip": {"anyOf": [{"type": "string"}, {"type": "null"}], "maxLength": 4}, "wind": {"type": "number", "minimum": 0, "maximum": 1},
        "hours": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
        "opts": {"type": "object", "properties": {"deep": {"type": "boolean"}, "note": {"type": "string", "maxLength": 3}}, "additionalProperties": False}}}}},
    {"type": "function", "function": {"name": "now"}}]
PYTHON = """{% macro py(v) %}{% if v is string %}{{ v | tojson }}{% elif v is true %}True{% elif v is false %}False{% elif v is none %}None\
{% elif v is mapping %}{ {%- for k, x in v.items() %}{{ k | tojson }}: {{ py(x) }}{% if not loop.last %}, {% endif %}{% endfor -%} }\
{% elif v is iterable %}[{% for x in v %}{{ py(x) }}{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"""
GEMMA = """{% macro g(v, quote) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is boolean %}{{ 'true' if v else 'false' }}{% elif v is none %}null\
{% elif v is mapping %}{ {%- for k, x in v | dictsort %}{{ '<|"|>' + k + '<|"|>' if quote else k }}:{{ g(x, true) }}{% if not loop.last %},{% endif %}{% endfor -%} }\
{% elif v is iterable %}[{% for x in v %}{{ g(x, true) }}{% if not loop.last %},{% endif %}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"""
EACH = "{% set m = messages[1] %}{{ m.content }}{% for c in m.tool_calls %}{% set f = c.function %}"
# As the templates of these models write an assistant's turn; what they say elsewhere tells which model it is.
TEMPLATES = {
    "hermes": EACH + '{% if not loop.first or m.content %}{{ "\\n" }}{% endif %}<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}',
    "qwen3_5": EACH + "{% if m.content and loop.first %}{{ '\\n\\n' }}{% elif not loop.first %}{{ '\\n' }}{% endif %}<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}"
               "<parameter={{ k }}>\n{{ v | tojson if v is mapping or v is sequence and v is not string or v is boolean or v is none else v }}\n</parameter>\n"
               "{% endfor %}</function>\n</tool_call>{% endfor %}",
    "gemma4": GEMMA + EACH + "<|tool_call>call:{{ f.name }}{{ g(f.arguments, false) }}<tool_call|>{% endfor %}",
    "lfm2": PYTHON + "{% if 0 %}<|tool_list_start|>{% endif %}" + EACH + "{{ '<|tool_call_start|>[' if loop.first else ', ' }}{{ f.name }}("
            "{% for k, v in f.arguments.items() %}{{ k }}={{ py(v) }}{% if not loop.last %}, {% endif %}{% endfor %}){{ ']<|tool_call_end|>' if loop.last else '' }}{% endfor %}",
    "ministral": EACH + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}",
    "llama": "{% if 0 %}<|start_header_id|>ipython<|end_header_id|>{% endif %}" + EACH + '{{ "" if loop.first else "; " }}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}'}
MARKS = ["<tool_call>", "</tool_call>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_call_start|>", "<|tool_call_end|>", "[TOOL_CALLS]", "[ARGS]",
         "[CALL_ID]", "<|python_tag|>", "<|end|>"]


def tokenizer_with(folder, special):
    marks = [mark for mark in MARKS if special or mark == "<|end|>"]
    made = HfTokenizer(models.BPE({token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("plain"), special=False)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("marked"), special=True)


@pytest.fixture(params=sorted(TEMPLATES))
def kind(request):
    return request.param


def syntax_of(kind, tokenizer):
    syntax = parser_of(TEMPLATES[kind], tokenizer)
    assert syntax.kind.knows.__module__ == f"runtime.calls.{kind}"
    return syntax


ARGUMENTS = [
    {"city": "Paris", "days": 3, "unit": "C", "zip": "75001", "wind": 0.5, "hours": [1, 2], "opts": {"deep": True, "note": "x, {y}: [z]"}},
    {"city": "12345", "zip": None}, {"city": "true"}, {}, {"city": 'a "quoted" \\ text', "hours": []}, {"city": "two\nlines\n\nmore", "opts": {}},
    {"city": "日本 🙂 é", "days": -7}, {"city": "O'Neil", "opts": {"deep": False}}, {"other": "free", "numbers": [1.5, "b", None, {"k": [True]}]}]


def written(kind, content, calls):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]}]
    return ChatTemplate(TEMPLATES[kind], kind).render(messages, add_generation_prompt=False)


def cut(stream, text, rng, longest=9):
    """(content, calls, events) of a text pushed in random pieces."""
    events, place = [], 0
    while place < len(text):
        step = rng.randint(1, longest)
        events += stream.push(text[place:place + step])
        place += step
    events += stream.finish()
    calls = []
    for event in events:
        if isinstance(event, CallBegun):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1][1] += event.piece
        else:
            assert event.text
    return "".join(event.text for event in events if isinstance(event, Content)), [Call(*call) for call in calls]


def test_what_a_template_writes_is_read_back(kind, plain):
    syntax, rng = syntax_of(kind, plain), random.Random(0)
    for number, arguments in enumerate(ARGUMENTS):
        calls = [("get_weather", arguments), ("now", {})][:1 + number % 2]
        for content in ("", "Let me see.") if kind != "llama" else ("",):
            text = written(kind, content, calls)
            assert syntax.parse(text, TOOLS) == cut(syntax.stream(TOOLS), text, rng), text
            said, found = syntax.parse(text, TOOLS)
            assert said == content and [(call.name, json.loads(call.arguments)) for call in found] == calls, text


def test_any_cut_gives_the_same(kind, plain):
    """Of anything: calls, halves of calls, marks and parts of marks, in any order."""
    rng, syntax, seen = random.Random(1), syntax_of(kind, plain), 0
    whole = [written(kind, "", [("get_weather", arguments)]) for arguments in ARGUMENTS]
    parts = [*whole, *MARKS, *(mark[:-1] for mark in MARKS), *(text[:rng.randint(1, len(text))] for text in whole), " ", "\n", "Hi.", "{", "}", "[",
             '{"name": "f", "parameters": {}}', "<function=f>", "</function>", "<parameter=a>", "</parameter>", "call:f{", ";", "f()", '"', "<"]
    for _ in range(600):
        text = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        content, calls = syntax.parse(text, TOOLS)
        assert (content, calls) == cut(syntax.stream(TOOLS), text, rng) == cut(syntax.stream(TOOLS), text, rng, 1), text
        if calls:
            seen += 1
            assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
        else:
            assert content == text
    assert seen > 30


@pytest.mark.parametrize("missed, text", [
    ("hermes", "<tool_call>{'name': 'f'}</tool_call> and more"), ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f g", "arguments": {}}</tool_call>'), ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'), ("hermes", "<tool_call>" + "[" * 100_000),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>"), ("hermes", "<tool_call> is what one writes"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "'), ("qwen3_5", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>"),
    ("qwen3_5", "<tool_call></tool_call>"), ("qwen3_5", "<tool_call><function=f>x</function></tool_call>"), ("qwen3_5", "<function=f></function>"),
    ("gemma4", "<|tool_call>call:f<tool_call|>"), ("gemma4", "<|tool_call>call:f{a:1,,}<tool_call|>"), ("gemma4", "<|tool_call>call:f{a:" + "[" * 5000),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x}<tool_call|>'), ("gemma4", "<|tool_call>call:f{a:1}}<tool_call|>"),
    ("lfm2", "<|tool_call_start|>[f(1)]<|tool_call_end|>"), ("lfm2", "<|tool_call_start|>[f(a=__import__('os').system('x'))]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[f(a=1 + 2)]<|tool_call_end|>"), ("lfm2", "<|tool_call_start|>[f(a='x]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>f(a=" + "(" * 9000), ("ministral", "[TOOL_CALLS]f[ARGS]{bad}"), ("ministral", "[TOOL_CALLS]f {}"),
    ("ministral", "[TOOL_CALLS]f[ARGS]{\"a\": 1"), ("ministral", "[TOOL_CALLS]" + "f" * 500), ("ministral", "[TOOL_CALLS] [1, 2]"),
    ("llama", '{"name": "unknown_tool", "parameters": {}}'), ("llama", '{"answer": 42}'), ("llama", '{"name": "now", "parameters": {}'),
    ("llama", 'Sure: {"name": "now", "parameters": {}}'), ("llama", "<|python_tag|>print(1)"), ("llama", "{}")])
def test_a_text_that_misses_its_syntax_is_content(missed, text, plain):
    syntax, rng = syntax_of(missed, plain), random.Random(0)
    for said in (text, f"So:\n{text}\n" if missed != "llama" else text + "\n"):
        assert syntax.parse(said, TOOLS) == (said, []) and cut(syntax.stream(TOOLS), said, rng, 4000) == (said, [])


def test_a_good_call_after_a_bad_one(plain):
    for kind, bad, good in (("hermes", "<tool_call>{no}</tool_call>", '<tool_call>{"name": "now"}</tool_call>'), ("ministral", "[TOOL_CALLS]f[ARGS]{no", "[TOOL_CALLS]now[ARGS]{}"),
                            ("gemma4", "<|tool_call>call:f{<tool_call|>", "<|tool_call>call:now{}<tool_call|>"), ("hermes", "<tool_call><tool_call>", '<tool_call>{"name": "now"}'),
                            ("qwen3_5", "<tool_call><function=f><parameter=a>1</function></tool_call>", "<tool_call><function=now></function></tool_call>")):
        assert syntax_of(kind, plain).parse(bad + good) == (bad, [Call("now", "{}")])


def test_other_ways_to_write_the_same(plain):
    for kind, text, expected in [
            ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}), ("hermes", '<tool_call>{"name": "f", "parameters": {"a": "x\ny"}}', {"a": "x\ny"}),
            ("qwen3_5", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', {"a": 1}), ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {"a": 1}}]', {"a": 1}),
            ("lfm2", "<|tool_call_start|>f(a=('x', {'k': -1.5e3}),)<|tool_call_end|>", {"a": ["x", {"k": -1500.0}]}),
            ("ministral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', {"a": 1}), ("ministral", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', {"a": 1}),
            ("llama", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', {"a": 1}), ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', {"a": "\ud800"})]:
        content, calls = syntax_of(kind, plain).parse(text)
        assert content == "" and [(call.name, json.loads(call.arguments)) for call in calls] == [("f", expected)], text
        calls[0].arguments.encode()


def test_the_schema_says_what_a_bare_value_is(plain):
    tools = [{"function": {"name": "f", "parameters": {"properties": {
        "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": ["number", "null"]}, "e": {"enum": [1, 2]}, "u": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "l": {"type": "array", "items": {"type": "string"}}}, "additionalProperties": {"type": "boolean"}}}}]
    given = {"s": "5", "i": "5.0", "n": "null", "e": "2", "u": "7", "x": "True", "y": "yes"}
    expected = {"s": "5", "i": 5, "n": None, "e": 2, "u": 7, "x": True, "y": "yes"}
    qwen = "<tool_call><function=f>" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in given.items()) + "</function></tool_call>"
    gemma = "<|tool_call>call:f{" + ",".join(f"{k}:{v}" for k, v in given.items()) + ",l:[1,2]}<tool_call|>"
    lfm = "<|tool_call_start|>[f(" + ", ".join(f"{k}={v}" for k, v in given.items()) + ", l=[1, 2])]<|tool_call_end|>"
    for kind, text, more in (("qwen3_5", qwen, {}), ("gemma4", gemma, {"l": ["1", "2"]}), ("lfm2", lfm, {"l": ["1", "2"]})):
        found, = syntax_of(kind, plain).parse(text, tools)[1]
        assert json.loads(found.arguments) == expected | more
    found, = syntax_of("qwen3_5", plain).parse(qwen)[1]
    assert json.loads(found.arguments) == {"s": 5, "i": 5.0, "n": None, "e": 2, "u": 7, "x": True, "y": "yes"}
    for schema in ({"$ref": "#"}, {"$ref": 3}, {"properties": []}, {"type": 5}, {"anyOf": "x"}, {"anyOf": [{"$ref": "#"}]}, True, {"enum": 3}):
        assert syntax_of("qwen3_5", plain).parse(qwen, [{"function": {"name": "f", "parameters": schema}}])[1]


def test_pythons_texts(plain):
    """Against Python's own reader."""
    rng, syntax = random.Random(0), syntax_of("lfm2", plain)
    pieces = ["a", "'", '"', "\\", "\n", "\t", "é", "🙂", "\x07", "\\n", ", b=", ")]", " ", "\0"]
    for _ in range(300):
        value = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        text = repr(value)
        found = syntax.parse(f"<|tool_call_start|>[f(a={text})]<|tool_call_end|>")[1]
        assert json.loads(found[0].arguments) == {"a": ast.literal_eval(text)}


def test_control_tokens_are_seen(kind, marked):
    """Through the tokenizer: their spelling stands in the text only where it is asked for."""
    syntax = syntax_of(kind, marked)
    text = written(kind, "", [("get_weather", ARGUMENTS[0]), ("now", {})])
    tokens, spelled = marked.encode(text, control_tokens=True).tolist(), syntax.spelled(marked)
    assert {marked.control_tokens[i] for i in spelled} == set(syntax.kind.marks)
    reply, stream, events = ReplyText(marked, (), spelled), syntax.stream(TOOLS), []
    for token in tokens:
        events += stream.push(reply.push(token)[0])
    events += stream.push(reply.finish()[0]) + stream.finish()
    assert [event.name for event in events if isinstance(event, CallBegun)] == ["get_weather", "now"]
    assert json.loads(next(event.piece for event in events if isinstance(event, CallArguments))) == ARGUMENTS[0]


def test_long_and_hostile_texts_take_no_time(kind, plain):
    syntax, begun = syntax_of(kind, plain), time.monotonic()
    whole = written(kind, "", [("get_weather", {"city": "x" * 20_000})])
    for text in (syntax.kind.opening * 2000, whole, whole[:-30], (syntax.kind.opening + '{"a": "') * 500, "<" * 20_000, "{" * 20_000, '"' * 20_000):
        content, calls = cut(syntax.stream(), text, random.Random(0), 12)
        assert content == text or calls
    assert time.monotonic() - begun < 20


def test_no_syntax_without_a_template_that_knows_one(plain):
    assert parser_of("{{ messages }}", plain) is None and parser_of('{"name", "parameters"}', plain) is None


ORDERED = {"city": "Paris", "days": 3, "unit": "C", "zip": "7500", "wind": 0.5, "hours": [1, 2], "opts": {"deep": True, "note": "x y"}}


def taken(constraint, tokenizer, text):
    """Whether a constraint allows every token of a text, and the end after it."""
    words = np.zeros(-(-len(tokenizer) // 32), np.int32)
    for token in [*tokenizer.encode(text, control_tokens=True).tolist(), tokenizer.token_id("<|end|>")]:
        if constraint.done:
            return token == tokenizer.token_id("<|end|>")
        constraint.mask(words)
        if not words[token // 32] >> token % 32 & 1:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("special", [False, True])
def test_held_to_calls(kind, special, plain, marked):
    """Whatever is drawn from what the grammar allows, it is calls with arguments as the schema has them."""
    pytest.importorskip("llguidance")
    tokenizer = marked if special else plain
    syntax = syntax_of(kind, tokenizer)
    grammar = syntax.grammar([tool["function"] for tool in TOOLS], several=False)
    end = tokenizer.token_id("<|end|>")
    engine = SimpleNamespace(tokenizer=tokenizer, bundle=SimpleNamespace(model={"config": {"vocab_size": len(tokenizer)}, "eos_token_ids": [end]}))
    allows = lambda text, grammar=grammar: taken(constraint_for(engine, "grammar", grammar), tokenizer, text)
    some = {key: value for key, value in ORDERED.items() if kind != "gemma4" or key not in ("unit", "zip", "wind")}       # its template sorts them
    some |= {"opts": {"note": "x y"}} if kind == "lfm2" else {}                       # its template writes True
    for text in (written(kind, "", [("get_weather", some)]), written(kind, "", [("now", {})]), written(kind, "", [("get_weather", {"city": "Oslo"})])):
        assert allows(text), text
    for text in ("Hello", written(kind, "", [("get_weathers", ORDERED)]), written(kind, "", [("get_weather", {"days": 1})]),
                 written(kind, "", [("get_weather", {"city": "Oslo", "unit": "K"})]), written(kind, "", [("get_weather", {"city": "Oslo", "days": "x"})])):
        assert not allows(text), text
    two = written(kind, "", [("now", {}), ("now", {})])
    assert kind == "lfm2" or allows(two, syntax.grammar([{"name": "now"}])) and not allows(two)
    if kind in ("qwen3_5", "gemma4"):                     # whose texts end where the model ends them: noise never would
        return
    rng, names = np.random.default_rng(0), set()
    for _ in range(12):
        constraint, tokens = constraint_for(engine, "grammar", grammar), []
        words = np.zeros(-(-len(tokenizer) // 32), np.int32)
        while not constraint.done and len(tokens) < 600:
            constraint.mask(words)
            token = int(rng.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))))
            if token == end:
                break
            constraint.accept(token)
            tokens.append(token)
        text = "".join(tokenizer.alone(token) if token in tokenizer.control_tokens else chr(0) + str(token) + chr(1) for token in tokens)
        text = re.sub("(\0\\d+\1)+", lambda run: tokenizer.decode([int(i) for i in re.findall(r"\d+", run[0])]), text)
        content, (call,) = syntax.parse(text, TOOLS)
        names.add(call.name)
        arguments = json.loads(call.arguments)
        assert content == "" and (call.name == "now" or set(arguments) <= set(TOOLS[0]["function"]["parameters"]["properties"]) and len(arguments["city"]) <= 5)
    assert names == {"get_weather", "now"}
    with pytest.raises(UserError):
        constraint_for(engine, "grammar", syntax.grammar([{"name": "f", "parameters": {"properties": {"a": {"type": "objekt"}}}}]))
