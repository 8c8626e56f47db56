"""Qwen 3.5 and Qwen3-Coder: each call is

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is text as it stands; what it is says the tool's schema.
"""

import re

from ..text import Tokenizer
from . import hermes
from .hermes import END, OPENING
from .syntax import Call, Kind, Miss, Schemas, Unfinished, checked, delimited
from .values import Shape, as_json, typed

_FUNCTION = re.compile(r"\s*<function=([^>\n]{1,200})>\s*")
_FUNCTION_END = re.compile(r"</function>\s*|\Z")
_PARAMETER = re.compile(r"<parameter=([^>\n]{1,200})>")
_PARAMETER_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>|\Z)")


def parse(text: str, schemas: Schemas) -> list[Call]:
    if text.lstrip().startswith("{"):
        return hermes.parse(text, schemas)
    calls, place = [], 0
    while found := _FUNCTION.match(text, place):
        name, place, arguments = checked(found[1].strip()), found.end(), {}
        shape = Shape(schemas.get(name))
        while found := _PARAMETER.match(text, place):
            end = _PARAMETER_END.search(text, found.end())
            if end is None or OPENING in (value := text[found.end():end.start()]):
                raise (Unfinished if end is None and OPENING not in text else Miss)("a parameter that does not end")
            arguments[found[1].strip()] = typed(value.removeprefix("\n").removesuffix("\n"), shape.property(found[1].strip()))
            place = end.end()
        if (found := _FUNCTION_END.match(text, place)) is None:
            raise Miss("a function that does not end")
        calls.append(Call(name, as_json(arguments)))
        place = found.end()
    if not calls or place < len(text):
        raise Miss("no function")
    return calls


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return "<function=" in template and OPENING in template


KIND = Kind(OPENING, delimited(OPENING, END, parse), (OPENING, END), knows)
