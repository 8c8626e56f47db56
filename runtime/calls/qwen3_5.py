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
from .syntax import Call, Kind, Miss, Schemas, Unfinished, checked, delimited, quoted
from .values import Shape, arguments_grammar, as_json, json_grammar, typed

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


def grammar(functions, mark) -> tuple[str, str]:
    """A text goes on to the first end of a parameter, whatever else the schema says of it."""
    end = quoted("\n</parameter>\n")

    def argument(name: str, own: object, schema: dict) -> str:
        shape = Shape(own, schema)
        types, choices = shape.types(), shape.choices()
        if types and "string" not in types:
            value = f"{json_grammar(own, schema)} {end}"
        elif choices and all(isinstance(choice, str) for choice in choices):
            value = f"({' | '.join(map(quoted, choices))}) {end}"
        else:
            value = "text"
        return quoted(f"<parameter={name}>\n") + f" {value}"

    def function(name: str, schema: dict) -> str:
        arguments = arguments_grammar(schema, lambda key, own: argument(key, own, schema), "")
        return quoted(f"<function={name}>\n") + f" {arguments}"

    one = " | ".join(function(name, schema) for name, schema in functions)
    return f'{mark(OPENING)} "\\n" ({one}) "</function>\\n" {mark(END)}\ntext[suffix={end}]: /(.|\\n)*/', '"\\n"'


def knows(template: str, tokenizer: Tokenizer) -> bool:
    return "<function=" in template and OPENING in template


KIND = Kind(OPENING, delimited(OPENING, END, parse), (OPENING, END), knows, grammar)
