"""LFM2: <|tool_call_start|>[f(a="x", n=3), g()]<|tool_call_end|>, calls as Python writes them, or (asked so) as JSON."""

import re

from ..text import Tokenizer
from .syntax import Call, Kind, Miss, Schemas, Unfinished, checked, delimited, quoted
from .values import MOST_NESTED, Shape, arguments_grammar, as_json, calls_of, json_grammar, read_json, typed

OPENING, END = "<|tool_call_start|>", "<|tool_call_end|>"
_CALL = re.compile(r"\s*([\w.:/-]{1,200})\s*\(")
_KEYWORD = re.compile(r"\s*(\w{1,200})\s*=")
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*('?)|"(?:[^"\\]|\\.)*("?)""", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": "", "\\": "\\", "'": "'", '"': '"'}
_BARE = re.compile(r"[^\s,()\[\]{}:='\"]{1,400}")
_SPACE = re.compile(r"\s*")
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def parse(text: str, schemas: Schemas) -> list[Call]:
    bare = text.strip()
    if bare.startswith(("{", '[{')):
        return calls_of(read_json(bare))
    listed = bare.startswith("[")
    calls, place = [], int(listed)
    while found := _CALL.match(bare, place):
        name, place, arguments = checked(found[1]), found.end(), {}
        shape = Shape(schemas.get(name))
        while not _at(bare, place, ")"):
            if (found := _KEYWORD.match(bare, place)) is None:
                raise Miss("an argument without a name")
            arguments[found[1]], place = _value(bare, found.end(), shape.property(found[1]), 0)
            place = _comma(bare, place, ")")
        calls.append(Call(name, as_json(arguments)))
        place = _comma(bare, _SPACE.match(bare, place).end() + 1, "]")
    if listed and not _at(bare, place, "]"):
        raise Miss("a list that does not end")
    if not calls or bare[_SPACE.match(bare, place).end() + int(listed):].strip():
        raise Miss("no call")
    return calls


def _value(text: str, place: int, shape: Shape, depth: int) -> tuple[object, int]:
    """The value at `place`, and where it ends."""
    place = _SPACE.match(text, place).end()
    start = text[place:place + 1]
    if start in ("'", '"') and start:
        found = _STRING.match(text, place)
        if not (found[1] or found[2]):
            raise Unfinished("a text that does not end")
        value = _string(found[0])
        return (value if shape.takes(value) else typed(value, shape)), found.end()
    if start not in _CLOSING:
        if (found := _BARE.match(text, place)) is None:
            raise Miss("no value")
        return typed(found[0], shape), found.end()
    if depth >= MOST_NESTED:
        raise Miss("nested too deep")
    values, mapping, place = [], {}, place + 1
    while not _at(text, place, _CLOSING[start]):
        if start == "{":
            key, place = _value(text, place, Shape({"type": "string"}), depth + 1)
            if not _at(text, place, ":") or not isinstance(key, str):
                raise Miss("no key")
            mapping[key], place = _value(text, _SPACE.match(text, place).end() + 1, shape.property(key), depth + 1)
        else:
            value, place = _value(text, place, shape.items(), depth + 1)
            values.append(value)
        place = _comma(text, place, _CLOSING[start])
    return (mapping if start == "{" else values), _SPACE.match(text, place).end() + 1


def _string(token: str) -> str:
    """The text that a Python string stands for."""
    def escaped(found: re.Match) -> str:
        code = found[1]
        if code[0] in "xuU" and len(code) > 1:
            return chr(int(code[1:], 16))
        return _ESCAPES.get(code, found[0])
    return _ESCAPE.sub(escaped, token[1:-1])


def _at(text: str, place: int, what: str) -> bool:
    return text.startswith(what, _SPACE.match(text, place).end())


def _comma(text: str, place: int, close: str) -> int:
    """Behind the comma at `place`; where `close` or the end is there, that place. Raises Miss."""
    place = _SPACE.match(text, place).end()
    if text.startswith(",", place):
        return place + 1
    if place < len(text) and not text.startswith(close, place):
        raise Miss("no comma")
    return place


def grammar(functions, mark) -> tuple[str, str]:
    """One list of one call. Values are as JSON writes them, which reads the same."""
    def call(name: str, schema: dict) -> str:
        arguments = arguments_grammar(schema, lambda key, own: f"{quoted(f'{key}=')} {json_grammar(own, schema)}", '", "')
        return f'{quoted(f"[{name}(")} {arguments} ")]"'

    return f"{mark(OPENING)} ({' | '.join(call(name, schema) for name, schema in functions)}) {mark(END)}", ""


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return OPENING in template or tokenizer.token_id(OPENING) is not None


KIND = Kind(OPENING, delimited(OPENING, END, parse), (OPENING, END), knows, grammar)
