"""Values of arguments: JSON read strictly, and texts taken for what a tool's JSON schema says they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ..grammar_trial import WHITE_SPACE
from .syntax import Call, Miss, Unfinished, checked

MOST_NESTED = 32
_PARTS = re.compile(r'"(?:[^"\\]|\\.)*("?)|[{}\[\]]', re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None}
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def read_json(text: str):
    """The value. Raises Unfinished for a text that ends inside a string, and Miss for any other that is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse, strict=False)
    except json.JSONDecodeError as error:
        raise (Unfinished if error.msg.startswith("Unterminated string") else Miss)(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Miss(str(error)) from None


def as_json(value: object) -> str:
    """JSON that any reader takes. Raises Miss for what JSON has no name for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(value)
    except (ValueError, RecursionError) as error:
        raise Miss(str(error)) from None


def json_end(text: str, start: int) -> int | None:
    """Where the object or list that begins at `start` ends; None: not in this text."""
    depth = 0
    for found in _PARTS.finditer(text, start):
        if found[0][0] == '"':
            if not found[1]:
                return None                       # an unfinished string
        else:
            depth += 1 if found[0] in "{[" else -1
            if not depth:
                return found.end()
    return None


def json_grammar(schema: object, root: dict | None = None) -> str:
    """The part of a grammar that is JSON as `schema` has it; root: the schema that it is a part of, and whose definitions it names."""
    defined = {key: root[key] for key in ("$defs", "definitions") if root and key in root}
    own = schema if isinstance(schema, dict) else {}
    return "%json " + as_json({**defined, **own, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def arguments_grammar(schema: dict, value: Callable[[str, object], str], between: str) -> str:
    """The part of a grammar that is an object's arguments: what is required, then any of the others. value(name, schema): of one."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    needed = [name for name in properties if name in (schema.get("required") or ())]
    more = [value(name, properties[name]) for name in properties if name not in needed]
    if needed:
        return f" {between} ".join(value(name, properties[name]) for name in needed) + "".join(f" ({between} {one})?" for one in more)
    some = [one + "".join(f" ({between} {other})?" for other in more[number + 1:]) for number, one in enumerate(more)]
    return f"({' | '.join(some)})?" if some else '""'


def calls_of(value: object) -> list[Call]:
    """Calls in JSON: {"name", "arguments"} or {"name", "parameters"}, or a list of them. Raises Miss."""
    return [_call_of(one) for one in (value if isinstance(value, list) and value else [value])]


def _call_of(value: object) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise Miss("no object")
    name, arguments = checked(value.get("name")), value.get("arguments", value.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(arguments, dict):
        raise Miss("arguments that are no object")
    return Call(name, as_json(arguments))


class Shape:
    """What a JSON schema says of a value's type, as far as it is needed to tell a number from a text."""

    def __init__(self, schema: object, root: dict | None = None):
        self._root = root if root is not None else schema if isinstance(schema, dict) else {}
        for _ in range(8):                        # references to references
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            schema = self._resolve(schema["$ref"])
        self.schema = schema if isinstance(schema, dict) else {}

    def property(self, name: str) -> Shape:
        properties = self.schema.get("properties")
        own = properties.get(name) if isinstance(properties, dict) else None
        return Shape(self.schema.get("additionalProperties") if own is None else own, self._root)

    def items(self) -> Shape:
        return Shape(self.schema.get("items"), self._root)

    def types(self, depth: int = 0) -> set[str] | None:
        """Names of the types it may have; None: any."""
        schema = self.schema
        if "type" in schema:
            listed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            return {one for one in listed if isinstance(one, str)}
        for key in ("enum", "const"):
            if key in schema:
                listed = schema[key] if key == "enum" and isinstance(schema[key], list) else [schema[key]]
                return {_KINDS.get(type(one), "object") for one in listed}
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and depth < 8:
                some = [Shape(one, self._root).types(depth + 1) for one in schema[key]]
                return None if None in some else set().union(*some)
        return None

    def choices(self) -> list | None:
        """The values of an enum or a const; None: it has none."""
        schema = self.schema
        return [schema["const"]] if "const" in schema else schema["enum"] if isinstance(schema.get("enum"), list) else None

    def takes(self, value: object) -> bool:
        """Whether a value is of a type that it may have."""
        types, kind = self.types(), _KINDS[type(value)]
        return types is None or kind in types or kind == "integer" and "number" in types

    def _resolve(self, reference: str) -> object:
        value: object = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            value = value.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(value, dict) else None
        return value


def typed(text: str, shape: Shape):
    """The value that a bare text stands for: a number, true, a list, ... where the schema takes one, else the text itself."""
    if shape.types() == {"string"}:
        return text
    try:
        word = text.strip()
        value = _WORDS[word] if word in _WORDS else read_json(word)
    except Miss:
        return text
    if isinstance(value, float) and value.is_integer() and not shape.takes(value):
        value = int(value)
    return value if not isinstance(value, str) and shape.takes(value) else text


def _refuse(name: str):
    raise Miss(f"{name} is no JSON")
