"""Ministral and Mistral: [TOOL_CALLS]NAME[ARGS]{...} for each call, with a [CALL_ID] in between in some; the older ones write
[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]."""

import re

from ..text import Tokenizer
from .syntax import Call, Kind, Miss, Schemas, checked, quoted
from .values import as_json, calls_of, json_end, json_grammar, read_json

OPENING, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"\[TOOL_CALLS\]\s{0,9}([\w.:/-]{1,200})\s{0,9}(?:\[CALL_ID\][\w-]{0,64}\s{0,9})?\[ARGS\]\s{0,9}(?=\{)")
_LONGEST_HEAD = 400


def read(text: str, last: bool, schemas: Schemas) -> tuple[int, list[Call]] | None:
    if bare := text[len(OPENING):].lstrip():
        start = len(text) - len(bare)
        head = None if bare[0] == "[" else _HEAD.match(text)
        if head is None and bare[0] != "[" and ("{" in bare or len(text) > _LONGEST_HEAD):
            raise Miss("no name and [ARGS]")
        if head or bare[0] == "[":
            start = head.end() if head else start
            if end := json_end(text, start):
                value = read_json(text[start:end])
                return end, [Call(checked(head[1]), as_json(value))] if head else calls_of(value)
    if last:
        raise Miss("no call")
    return None


def grammar(functions, mark) -> tuple[str, str]:
    one = " | ".join(f"{quoted(name)} {mark(ARGUMENTS)} {json_grammar(schema)}" for name, schema in functions)
    return f"{mark(OPENING)} ({one})", ""


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return OPENING in template


KIND = Kind(OPENING, read, (OPENING, ARGUMENTS, CALL_ID), knows, grammar)
