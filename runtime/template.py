"""Chat templates: a list of messages becomes the text of a prompt.

A template is Jinja, as `transformers` renders it (`apply_chat_template`). It is data from a stranger, so it is rendered in a
process of its own with limits on memory and CPU time (runtime/sandbox.py): whatever it does, the answer is a text or a sentence.
The process starts with the first template (50 ms, most of it Jinja's import, which this process is spared), serves all of them,
is started again where a limit ended it, and ends with this one.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import UserError

_REASONING = ("reasoning_content", "thinking", "reasoning")      # names of one thing, as in `transformers`
_MEDIA = ("image", "audio", "video")                             # in the type of a part that no text model reads
_OUT_OF_MEMORY = 77                                              # sandbox.py's exit code


class ChatTemplate:
    """A chat template. Raises UserError where it is not valid Jinja."""

    def __init__(self, source: str, name: str, special_tokens: dict[str, str] | None = None):
        """special_tokens: what templates know as bos_token, eos_token, pad_token."""
        self.source, self._name, self._special_tokens = source, name, special_tokens or {}
        self._ask({"source": source})

    def render(self, messages: list[dict], *, add_generation_prompt: bool = True, **variables) -> str:
        """The prompt for `messages` (dicts with "role", "content" and whatever the template reads), ready for the reply.

        messages: see `normal`. The arguments of `tool_calls` may be dicts or JSON: a template that goes through them
        gets dicts, one that writes them as a text gets JSON. A content may be a list of texts ({"type": "text", "text":
        ...}), which is joined for templates that take none. variables: what the template may know besides, as tools,
        documents (None where they are not given) or enable_thinking. Raises UserError for messages that are none, for a
        variable that the template does not read or that it needs and is not given, and where it raises or goes past its
        limits.
        """
        variables = plain(variables)
        for name in ("tools", "documents"):
            given = variables.get(name) or []
            if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
                raise UserError(f"{name} must be a list of dicts (of a tool its JSON schema), not {given!r:.60}")
        values = {"tools": None, "documents": None, **self._special_tokens, **variables,
                  "messages": normal(messages), "add_generation_prompt": add_generation_prompt}
        asked = [name for name, value in variables.items() if value is not None]
        return self._ask({"source": self.source, "values": values, "asked": asked})["text"]

    def _ask(self, request: dict) -> dict:
        try:
            line = json.dumps(request)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"these messages are not plain texts, numbers, lists and dicts ({error})") from None
        answer = _helper.ask(line)
        if "error" in answer:
            raise UserError(f"{self._name}: {answer['error']}")
        return answer


def normal(messages: list) -> list[dict]:
    """`messages` (dicts, dataclasses or pydantic's models) of plain values, as templates expect them: without keys that
    are None, a thought under every name that templates know it by. Raises UserError where they are none, or hold more
    than text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"messages is {messages!r:.60}; it must be a list of at least one message")
    made = []
    for number, message in enumerate(plain(messages), 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'message {messages[number - 1]!r:.60} must be a dict with a "role" and, unless it calls '
                            'tools, a "content"')
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and any(word in kind for word in _MEDIA):
                raise UserError(f"message {number} has a part of type {kind!r}, and the model reads text alone; "
                                "leave it out")
        message = {key: value for key, value in message.items() if value is not None}
        thought = next((message[name] for name in _REASONING if name in message), None)
        if thought is not None:
            message = {**dict.fromkeys(_REASONING, thought), **message, _REASONING[0]: thought}
        made.append(message)
    return made


def plain(value):
    """`value` as JSON has it: numpy's numbers and truths are Python's; what cannot be is shown by its kind, as
    `transformers` shows images. Raises UserError where it holds itself."""
    try:
        if value is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        if isinstance(value, np.generic):
            return value.item()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if callable(getattr(value, "model_dump", None)):            # pydantic's
            return plain(value.model_dump())
    except RecursionError:
        raise UserError("these messages are not plain texts, numbers, lists and dicts (one holds itself)") from None
    return f"<{type(value).__name__}>"


class _Helper:
    """The process that renders, one request at a time."""

    def __init__(self):
        self.lock, self._process = threading.RLock(), None

    def ask(self, line: str) -> dict:
        """The answer to one request. Raises UserError where there is no such process to be had."""
        with self.lock:
            if self._process is not None and self._process.poll() is not None:
                self.stop()                          # killed from outside since the last request
            if self._process is None:
                self._process = self._start()
            try:
                self._process.stdin.write(line.encode("ascii") + b"\n")
                self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:                    # Ctrl-C: the reply to come would answer the next request
                self.stop()
                raise
            if not reply.endswith(b"\n"):
                return {"error": self._why_ended()}
        return json.loads(reply)

    def _start(self) -> subprocess.Popen:
        file = str(Path(__file__).with_name("sandbox.py"))
        boot = f"import sys; sys.path[:] = {sys.path!r}; exec(compile(open({file!r}).read(), {file!r}, 'exec'))"
        if not sys.executable or getattr(sys, "frozen", False):
            raise UserError("chat templates are rendered by a Python of their own, and this program has none (sys.executable); "
                            "make the prompt yourself and use `generate` or `stream`")
        try:                                         # -S: sys.path is given; a session of its own: Ctrl-C is not for it
            return subprocess.Popen([sys.executable, "-S", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise UserError(f"the process that renders chat templates cannot be started: {error.strerror}") from None

    def _why_ended(self) -> str:
        code = self.stop()
        if code == -getattr(signal, "SIGPROF", 0):
            return "the chat template takes too long for these messages: more than 1.5 seconds of CPU"
        if code == _OUT_OF_MEMORY:
            return "the chat template takes too much memory for these messages: more than 640 MB"
        return f"the process that rendered the chat template has ended ({code}); is there memory left?"

    def stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        return code


def _forget() -> None:
    """In a fork's child, which comes between two requests: the process there is the parent's."""
    global _helper
    _helper = _Helper()


_helper = _Helper()
atexit.register(lambda: _helper.stop())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _helper.lock.acquire(), after_in_parent=lambda: _helper.lock.release(), after_in_child=_forget)
