"""Hermes, Qwen 2.5 and 3, Granite 4 and most others: <tool_call>{"name": "f", "arguments": {...}}</tool_call>, once for each call."""

from ..text import Tokenizer
from .syntax import Call, Kind, Schemas, delimited, quoted
from .values import as_json, calls_of, json_grammar, read_json

OPENING, END = "<tool_call>", "</tool_call>"


def parse(text: str, schemas: Schemas) -> list[Call]:
    return calls_of(read_json(text))


def grammar(functions, mark) -> tuple[str, str]:
    one = " | ".join(named(name, schema, "arguments") for name, schema in functions)
    return f'{mark(OPENING)} "\\n" ({one}) "\\n" {mark(END)}', '"\\n"'


def named(name: str, schema: dict, key: str) -> str:
    """A grammar's alternative: {"name": ..., KEY: the arguments as the schema has them}."""
    before = quoted(f'{{"name": {as_json(name)}, "{key}": ')
    return f'{before} {json_grammar(schema)} "}}"'


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return OPENING in template


KIND = Kind(OPENING, delimited(OPENING, END, parse), (OPENING, END), knows, grammar)
