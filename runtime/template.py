"""Chat templates: a list of messages becomes the text of a prompt.

A template is Jinja, as `transformers` renders it (`apply_chat_template`): the same whitespace rules, `raise_exception`,
`strftime_now`, `tojson`, `break` and `continue`, and the `generation` tag, which marks the assistant's part and shows
as its contents. It is data from a stranger, so it runs in Jinja's ImmutableSandboxedEnvironment: no underscore
attributes, no changing of what it is given. And within limits, which stop what would never end: turns of loops and
calls of macros, characters of the prompt, length of a repeated string, no powers. They do not bound memory exactly: a
template that sets out to can hold some gigabytes for a moment before it is refused.

Imported only when a chat begins: Jinja costs 50 ms.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from runtime.errors import UserError
from runtime.files import read_json

MAX_CHARACTERS = 4_000_000
MAX_TURNS = 1_000_000             # of all loops and macro calls together


def template_source(folder: Path, name: str = "chat_template.jinja") -> str | None:
    """The chat template of a checkpoint or bundle: the file `name` there, else what tokenizer_config.json says; None: it
    has none. Raises UserError where the file cannot be read."""
    file, config = folder / name, folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text("utf-8")
        found = read_json(config, strict=False).get("chat_template") if config.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the chat template cannot be read ({error}); mend {name} or {config.name} there") from None
    if isinstance(found, list):                   # several by name, an older form
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found


def open_template(folder: Path, special_tokens: dict[str, str | None], name: str = "chat_template.jinja") -> ChatTemplate | None:
    """`template_source` compiled, None where there is none. special_tokens: what templates know as bos_token, eos_token,
    pad_token; those that are None are left out."""
    source = template_source(folder, name)
    tokens = {key: text for key, text in special_tokens.items() if text}
    return None if source is None else ChatTemplate(source, str(folder / name), tokens)


class ChatTemplate:
    """A compiled chat template. Raises UserError where it is not valid Jinja."""

    def __init__(self, source: str, name: str, special_tokens: dict[str, str] | None = None):
        """special_tokens: what templates know as bos_token, eos_token, pad_token."""
        self._name, self._special_tokens = name, special_tokens or {}
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"{name}: not a valid chat template: {error}") from None

    def render(self, messages: list[dict], **variables) -> str:
        """The prompt for `messages` (dicts with "role" and "content"), ready for the assistant's reply.

        variables: what a template may know besides, such as tools or enable_thinking. Raises UserError for messages
        that are none, and where the template raises, goes past its limits, or reaches for what the sandbox forbids.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise UserError(f"messages is {messages!r:.60}; it must be a list of at least one message")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise UserError(f'message {message!r:.60} must be a dict with a "role" and a "content"')
        values = {"messages": messages, "add_generation_prompt": True, **self._special_tokens, **variables}
        self._environment.turns = 0
        pieces, length = [], 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise jinja2.exceptions.SecurityError(f"the prompt exceeds {MAX_CHARACTERS} characters")
        except Exception as error:      # a template can fail in every way an expression of Python can
            raise UserError(f"{self._name}: the chat template refuses these messages: "
                            f"{error or type(error).__name__}") from None
        return "".join(pieces)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a count of turns and a limit on strings made by repetition."""

    intercepted_binops = frozenset(["*", "**"])
    turns = 0

    def __init__(self, **options):
        super().__init__(**options)
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise, strftime_now=_strftime_now, _count_turn=self._count_turn,
                            dict=lambda *args, **kwargs: dict(*args, **kwargs), namespace=_Namespace)
        self.filters["tojson"] = _to_json

    def _count_turn(self) -> str:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise jinja2.exceptions.SecurityError(f"more than {MAX_TURNS} turns of its loops")
        return ""

    def _parse(self, source, name, filename):
        """Every loop and macro begins with a call of `_count_turn`."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro)):
            call = jinja2.nodes.Call(jinja2.nodes.Name("_count_turn", "load"), [], [], None, None)
            node.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(node.lineno, override=True))
        return tree

    def unsafe_undefined(self, obj, attribute):
        """Jinja's would print as nothing and be refused only in use."""
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def call_binop(self, context, operator, left, right):
        if operator == "**" or operator == "*" and any(
                hasattr(value, "__len__") and isinstance(times, int) and len(value) * times > MAX_CHARACTERS
                for value, times in ((left, right), (right, left))):
            raise jinja2.exceptions.SecurityError(f"`{operator}` may not be used for that")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which `transformers` uses to mark what to train on: just its contents."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: some of those mean something to Python. (`dict` above is a
    function for a like reason: the class would bring `dict.update`, which changes what the sandbox protects.)"""

    def __init__(*args, **kwargs):
        self, values = args[0], dict(*args[1:], **kwargs)
        jinja2.utils.Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace name {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _raise(message):
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
