"""Llama 3: the reply is {"name": "f", "parameters": {...}}, some with <|python_tag|> before it; several calls stand one after the
other, with semicolons between. JSON that names no tool is an answer."""

from ..text import Tokenizer
from .hermes import named
from .syntax import Call, Kind, Miss, Schemas
from .values import calls_of, json_end, read_json

OPENING = "<|python_tag|>"


def read(text: str, last: bool, schemas: Schemas) -> tuple[int, list[Call]] | None:
    bare = text.removeprefix(OPENING).lstrip()
    if bare and bare[0] != "{":
        raise Miss("no object")
    start = len(text) - len(bare)
    if not bare or (end := json_end(text, start)) is None:
        if last:
            raise Miss("an object that does not end")
        return None
    calls = calls_of(read_json(text[start:end]))
    if schemas and not all(call.name in schemas for call in calls):
        raise Miss("no tool of that name")
    return end, calls


def grammar(functions, mark) -> tuple[str, str]:
    return " | ".join(named(name, schema, "parameters") for name, schema in functions), '"; "'


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return '"parameters"' in template and ("ipython" in template or OPENING in template)


KIND = Kind(OPENING, read, (OPENING,), knows, grammar, first=True, between=";")
