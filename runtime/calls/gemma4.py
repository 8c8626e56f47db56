"""Gemma 4: <|tool_call>call:NAME{key:<|"|>text<|"|>,n:5,flag:true,list:[1,2],inner:{...}}<tool_call|>, once for each call."""

import re

from ..text import Tokenizer
from .syntax import Call, Kind, Miss, Schemas, Unfinished, checked, delimited, quoted
from .values import MOST_NESTED, Shape, arguments_grammar, as_json, json_grammar, typed

OPENING, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_DEEP = 4                         # levels of lists and objects to which a reply is held
_HEAD = re.compile(r"\s*call:\s*([^\s{]{1,200})\s*(?=\{)")
_KEY = re.compile(r"\s*([^\s:,{}\[\]<>]{1,200})\s*:")
_BARE = re.compile(r"[^,{}\[\]]*")
_SPACE = re.compile(r"\s*")


def parse(text: str, schemas: Schemas) -> list[Call]:
    if (head := _HEAD.match(text)) is None:
        raise Miss("no call:")
    name = checked(head[1])
    value, place = _value(text, head.end(), Shape(schemas.get(name)), 0)
    if text[place:].strip():
        raise Miss("something behind the call")
    return [Call(name, as_json(value))]


def _value(text: str, place: int, shape: Shape, depth: int) -> tuple[object, int]:
    """The value at `place`, and where it ends."""
    place = _SPACE.match(text, place).end()
    if text.startswith(QUOTE, place):
        return _string(text, place)
    if text[place:place + 1] not in ("{", "["):
        bare = _BARE.match(text, place)
        return typed(bare[0].strip(), shape), bare.end()
    if depth >= MOST_NESTED:
        raise Miss("nested too deep")
    mapping, close = ({}, "}") if text[place] == "{" else (None, "]")
    values, place = [], place + 1
    while not text.startswith(close, _SPACE.match(text, place).end()):
        if mapping is not None:
            key, place = _key(text, place)
        value, place = _value(text, place, shape.items() if mapping is None else shape.property(key), depth + 1)
        if mapping is None:
            values.append(value)
        else:
            mapping[key] = value
        place = _SPACE.match(text, place).end()
        if text.startswith(",", place):
            place += 1
        elif not text.startswith(close, place):
            raise Miss("no comma")
    return (values if mapping is None else mapping), _SPACE.match(text, place).end() + 1


def _key(text: str, place: int) -> tuple[str, int]:
    start = _SPACE.match(text, place).end()
    if text.startswith(QUOTE, start):
        key, place = _string(text, start)
        if not text.startswith(":", place):
            raise Miss("no value")
        return key, place + 1
    if (found := _KEY.match(text, place)) is None:
        raise Miss("no key")
    return found[1], found.end()


def _string(text: str, place: int) -> tuple[str, int]:
    start = place + len(QUOTE)
    if (end := text.find(QUOTE, start)) < 0:
        raise Unfinished("a text that does not end")
    return text[start:end], end + len(QUOTE)


def grammar(functions, mark) -> tuple[str, str]:
    quote = mark(QUOTE)

    def value(own: object, schema: dict, depth: int) -> str:
        shape = Shape(own, schema)
        types, choices = shape.types(), shape.choices()
        if choices and all(isinstance(choice, str) for choice in choices):
            return f"{quote} ({' | '.join(map(quoted, choices))}) {quote}"
        if types == {"array"} and depth < _DEEP:
            item = value(shape.items().schema, schema, depth + 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        if types == {"object"} and depth < _DEEP:
            def pair(name: str, part: object) -> str:
                return f'{quote} {quoted(name)} {quote} ":" {value(part, schema, depth + 1)}'
            inner = arguments_grammar(shape.schema, pair, '","')
            return f'"{{" {inner} "}}"'
        if types is None or types & {"string", "array", "object"}:
            return f"{quote} text {quote}"
        return json_grammar(own, schema)

    def call(name: str, schema: dict) -> str:
        inner = arguments_grammar(schema, lambda key, own: f"{quoted(f'{key}:')} {value(own, schema, 0)}", '","')
        return f"{quoted(f'call:{name}{{')} {inner} {quoted('}')}"

    one = " | ".join(call(name, schema) for name, schema in functions)
    text = "[^<]*" if quote.startswith('"') else r"(.|\n)*"              # up to the token that no text holds
    return f"{mark(OPENING)} ({one}) {mark(END)}\ntext: /{text}/", ""


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return OPENING in template and END in template


KIND = Kind(OPENING, delimited(OPENING, END, parse), (OPENING, END, QUOTE), knows, grammar)
