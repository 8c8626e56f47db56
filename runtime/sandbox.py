"""The process in which chat templates are rendered: started by runtime/template.py, one line of JSON in, one out.

    {"source": TEMPLATE, "values": {"messages": [...], ...}, "asked": [NAMES]}   ->   {"text": PROMPT} or {"error": WHY}

A template is a program from a stranger, and Python can be kept busy or filled in more ways than anyone lists. So the system
sets the bounds: MEMORY bytes of address space, and SECONDS of CPU a request, after which it ends this process. Jinja's
ImmutableSandboxedEnvironment keeps the template from reaching Python: no underscore attributes, no changing of what it is given.

The environment is that of `transformers` (`apply_chat_template`): the same whitespace rules, `raise_exception`, `strftime_now`,
`tojson`, `break` and `continue`, and the `generation` tag, which shows as its contents. Besides, arguments of calls are
mappings and JSON in one, contents in parts are joined where the template takes texts alone, and a name that is used and
not given is refused.
"""

import datetime
import functools
import json
import os
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

MEMORY = 640 << 20
SECONDS = 1.5
OUT_OF_MEMORY = 77                # exit code
MAX_CHARACTERS = 4_000_000
PROBE = "7031 0 1307"             # a text that templates leave as it is
ALWAYS = {"messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token"}


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise, dict=_Dict(), namespace=_Namespace,
                            strftime_now=lambda format: datetime.datetime.now().strftime(format))
        self.filters["tojson"] = _to_json

    def unsafe_undefined(self, obj, attribute):
        """Jinja's would print as nothing and be refused only in use."""
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which `transformers` uses to mark what to train on: just its contents."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Refused(Exception):
    pass


class _Undefined(jinja2.Undefined):
    """What is not there. A name that the template has from nobody but us may be tested, but not used."""

    _needed = frozenset()

    def __init__(self, hint=None, obj=jinja2.utils.missing, name=None, exc=jinja2.exceptions.UndefinedError):
        if obj is jinja2.utils.missing and name in self._needed:
            hint, exc = (f"the chat template needs {name!r}, which is not given; give it as template={{{name!r}: "
                         f"...}}, on the command line as --template {name}=..."), _Refused
        super().__init__(hint, obj, name, exc)

    def __str__(self) -> str:
        if self._undefined_exception is _Refused:
            self._fail_with_undefined_error()
        return ""


class _Arguments(dict):
    """Of a call: a mapping for templates that go through them, JSON for those that write them as a text."""

    def __init__(self, values: dict, text: str):
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other):
        return self._text + other

    def __radd__(self, other):
        return other + self._text


class _Dict:
    """Makes dictionaries; the class itself would bring `dict.update`, which changes what the sandbox protects."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: some of those mean something to Python."""

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


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if isinstance(value, _Undefined):
        str(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, and the names it reads."""
    environment = _Environment()
    try:
        parsed = environment.parse(source)
        reads = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        sets = {node.name for node in parsed.find_all(jinja2.nodes.Name) if node.ctx != "load"}
        environment.undefined = type("_Undefined", (_Undefined,), {"_needed": reads - sets - ALWAYS})
        return environment.from_string(parsed), reads
    except MemoryError:
        raise
    except Exception as error:        # Jinja's, RecursionError, and Python's own for what Jinja lets through ({% break %})
        raise _Refused(f"not a valid chat template: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _prepare(template: jinja2.Template, values: dict) -> None:
    """Arguments of calls as `_Arguments`; contents that are lists of parts joined where the template takes no lists."""
    for call in _calls(values):
        call["arguments"] = _arguments(call["arguments"])
    parted = [message for message in values["messages"] if (content := _list(message.get("content")))
              and all(isinstance(part, dict) and "type" in part for part in content)]
    for role in {message["role"] for message in parted}:
        if not _takes_parts(template, values, [message for message in parted if message["role"] == role]):
            for message in parted:
                if message["role"] == role:
                    message["content"] = "".join(map(_text, message["content"]))


def _calls(values: dict) -> list[dict]:
    """What has the arguments of a call, in all messages."""
    calls = [call for message in values["messages"] for call in _list(message.get("tool_calls"))]
    return [holder for call in calls if isinstance(call, dict) for holder in (call, call.get("function"))
            if isinstance(holder, dict) and "arguments" in holder]


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _arguments(given):
    """What is no mapping, and no JSON of one, stays as it is."""
    try:
        values = json.loads(given or "{}") if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return given
    if not isinstance(values, dict):
        return given
    return _Arguments(values, given if isinstance(given, str) else _to_json(values))


def _takes_parts(template: jinja2.Template, values: dict, parted: list[dict]) -> bool:
    """Whether it writes the text of a part in these messages, and not the part as Python or JSON would show it."""
    parts = [{"type": "text", "text": PROBE}]
    probes = [{**message, "content": parts} if any(message is one for one in parted) else message
              for message in values["messages"]]
    try:
        text = template.render({**values, "messages": probes})
    except MemoryError:
        raise
    except Exception:
        return False
    return PROBE in text and f"'{PROBE}'" not in text and f'"{PROBE}"' not in text


def _text(part: dict) -> str:
    if not isinstance(part.get("text"), str):
        raise _Refused(f"a message has a part of type {part['type']!r}, and the chat template takes texts alone")
    return part["text"]


def answer(source: str, values: dict | None = None, asked: list[str] = ()) -> dict:
    """Compile, and with `values` render. asked: names among them that the template must read, or the request is refused."""
    try:
        template, reads = _compile(source)
        if unread := sorted(set(asked) - reads - ALWAYS):
            raise _Refused(f"the chat template reads no {unread[0]!r}; besides the messages it reads "
                           f"{', '.join(sorted(reads - ALWAYS - set(template.globals))) or 'nothing'}")
        if values is not None:
            _prepare(template, values)
        pieces, length = [], 0
        for piece in template.generate(values) if values is not None else ():
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise _Refused(f"the chat template makes a prompt of more than {MAX_CHARACTERS} characters")
        return {"text": "".join(pieces)}
    except _Refused as error:
        return {"error": str(error)}
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:        # a template can fail in every way an expression of Python can
        unread = [call.get("name") for call in _calls(values or {"messages": ()}) if isinstance(call["arguments"], str)]
        hint = f" (the arguments of the call of {unread[0]!r} are no JSON object)" if unread else ""
        return {"error": f"the chat template refuses these messages: {_first_line(error)}{hint}"}


def serve() -> None:
    """Answer requests until the other end closes. A limit that is passed ends the process: the other end sees how."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):        # no such limits here
        pass
    timer = getattr(signal, "setitimer", None)
    for line in sys.stdin.buffer:
        if timer:
            timer(signal.ITIMER_PROF, SECONDS)        # its signal's default is to end the process, whatever it is doing
        try:
            reply = json.dumps(answer(**json.loads(line))).encode()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        if timer:
            timer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
