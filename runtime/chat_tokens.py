"""Chats as token ids: the template's control tokens are tokens, and those that somebody's text spells are text.

    encoder = ChatEncoder(template, tokenizer)
    encoder.tokens([{"role": "user", "content": "Hi<|im_end|>"}])       # with one end of turn, the template's

Templates trim, split, slice, upper-case and join what they are given, so where a text went cannot be told from the prompt. Hence
a mark: a character that occurs nowhere in the request goes into every control token that a message, tool, document or variable
spells, behind its first character, and behind what may become one together with the text that follows. What is still spelled in
the rendered prompt is the template's own. Text around marks is encoded apart from the control tokens beside it, as text, and
without the marks. Where nothing is spelled, there is no mark, and the prompt is tokenized whole, as `transformers` does.

Control tokens are the tokenizer's special tokens and, except in what the assistant says, other added tokens that the template
writes (`<tool_call>`): a thought or a call in an earlier reply is still one.
"""

import json
import re
from dataclasses import dataclass, field

import numpy as np

from .bundle import Bundle
from .errors import UserError
from .template import ChatTemplate, normal, plain
from .text import Tokenizer
from .thoughts import thoughts_of

_MARKS = range(0xF0000, 0xFFFFE)          # characters for private use
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Marked:
    """What a template is given, and the character that marks what must stay text in it (None: there is no need)."""

    messages: list[dict]
    variables: dict = field(default_factory=dict)
    mark: str | None = None


class ChatEncoder:
    """A chat template and the tokenizer of the same model."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer):
        self.template, self.tokenizer = template, tokenizer
        self.thoughts = thoughts_of(template.source, tokenizer)
        special = set(tokenizer.control_tokens.values())
        written = {token.content for token in tokenizer.added_tokens.values() if not token.special and not token.content.isspace()
                   and token.content in template.source}
        self._special, self._written = _any_of(special), sorted(written)
        self._spelled = {"assistant": _any_of(special), None: _any_of(special | written)}
        self._begun = {"assistant": _beginnings(special), None: _beginnings(special | written)}
        self._longest = max(map(len, self._begun[None]), default=0)
        self._strips = [token for token in tokenizer.added_tokens.values() if token.special and (token.lstrip or token.rstrip)]

    def tokens(self, messages: list[dict], *, control_tokens: bool = False, **variables) -> np.ndarray:
        """int64 ids of the prompt for `messages`; variables: see `ChatTemplate.render`. control_tokens: take those that the
        messages spell for what they are. Raises UserError."""
        marked = Marked(normal(messages), variables) if control_tokens else self.marked(messages, variables)
        return self.encode(self.render(marked, marked.messages), marked.mark)[0]

    def render(self, marked: Marked, messages: list[dict], *, add_generation_prompt: bool | None = None) -> str:
        """The prompt for `messages`, some of those of `marked`, with the marks where `tojson` has escaped them too."""
        variables = marked.variables if add_generation_prompt is None else marked.variables | {"add_generation_prompt": add_generation_prompt}
        text = self.template.render(messages, **variables)
        return text if marked.mark is None else text.replace(json.dumps(marked.mark)[1:-1], marked.mark)

    def marked(self, messages: list[dict], variables: dict | None = None) -> Marked:
        """The request with a mark in all that must stay text; its messages are `normal`. Raises UserError."""
        messages, variables = normal(messages), plain(variables or {})
        read = [{**message, "tool_calls": _read(message["tool_calls"])} if "tool_calls" in message else message
                for message in messages]
        texts = list(_texts([messages, read, variables]))
        if not any(self._must_be_marked(text) for text in texts):
            return Marked(messages, variables)
        mark = next(chr(code) for code in _MARKS if not any(chr(code) in text for text in texts))
        by_role = [self._mark(message, mark, "assistant" if message["role"] == "assistant" else None)
                   for message in read]
        return Marked(by_role, {name: self._mark(value, mark, None) for name, value in variables.items()}, mark)

    def encode(self, text: str, mark: str | None) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids [n] of a rendered prompt, and the characters (first, end) of it that each stands for, int64 [n, 2]."""
        if mark is None or mark not in text:
            return self.tokenizer.encode_with_offsets(text, control_tokens=True)
        ids, offsets = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]           # a prompt may be marks alone
        for start, end in self._runs(text, mark):
            part = text[start:end]
            if mark not in part:
                found, places = self.tokenizer.encode_with_offsets(part, control_tokens=True)
                ids.append(found)
                offsets.append(places + start)
                continue
            if any(token.rstrip and text.endswith(token.content, 0, start) for token in self._strips):
                start += len(part) - len(part.lstrip())
            if any(token.lstrip and text.startswith(token.content, end) for token in self._strips):
                end -= len(part) - len(part.rstrip())
            place = np.array([i for i in range(start, end) if text[i] != mark] + [end])
            begun = 0
            for piece in self._pieces(text[start:end], mark):
                found, places = self.tokenizer.encode_with_offsets(piece, after=start + begun > 0)
                ids.append(found)
                offsets.append(place[places + begun])
                begun += len(piece)
        return np.concatenate(ids), np.concatenate(offsets)

    def _runs(self, text: str, mark: str):
        """(first, end) of the parts of a prompt: texts with a mark, between control tokens, and all that lies between those."""
        begun = place = 0
        for first, end in [*(found.span() for found in self._special.finditer(text)), (len(text), len(text))]:
            if mark in text[place:first]:
                if place > begun:
                    yield begun, place
                yield place, first
                begun = first
            place = end
        if place > begun:
            yield begun, place

    def _pieces(self, text: str, mark: str) -> list[str]:
        """A text without its marks; cut where a token would still be found in it that is not special."""
        parts = text.split(mark)
        pieces = [parts[0]]
        for number, part in enumerate(parts[1:], 1):
            rest = pieces[-1][-1:] + "".join(parts[number:])
            if any(rest.startswith(token) for token in self._written):
                pieces.append(part)
            else:
                pieces[-1] += part
        return [piece for piece in pieces if piece]

    def _must_be_marked(self, text: str) -> bool:
        return self._spelled[None].search(text) is not None or self._begins(text, None) > 0

    def _begins(self, text: str, role: str | None) -> int:
        """Length of the longest end of `text` that is the beginning of a control token."""
        return next((n for n in range(min(len(text), self._longest), 0, -1) if text[-n:] in self._begun[role]), 0)

    def _mark(self, value, mark: str, role: str | None):
        """`value` with the mark in all that it spells, keys of dicts too."""
        def spelled(text: str) -> str:
            return self._spelled[role].sub(lambda found: found[0][0] + mark + found[0][1:], text)

        if isinstance(value, str):
            place = len(value) - self._begins(value, role) + 1
            return spelled(value[:place] + mark + value[place:] if place <= len(value) else value)
        if isinstance(value, dict):
            return {spelled(key) if isinstance(key, str) else key:
                    inner if key == "role" and inner in _ROLES else self._mark(inner, mark, role) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(inner, mark, role) for inner in value]
        return value


def bundle_encoder(bundle: Bundle, tokenizer: Tokenizer) -> ChatEncoder | None:
    """The chat template of a bundle, with its special tokens and its tokenizer; None: it has none. Raises UserError."""
    name, model = bundle.manifest["chat_template"], bundle.model
    if name is None:
        return None
    tokens = model.get("special_tokens")
    if tokens is None:                            # a bundle of before they were kept
        ids = {"bos_token": model["bos_token_id"], "eos_token": next(iter(model["eos_token_ids"]), None),
               "pad_token": model["pad_token_id"]}
        tokens = {key: text for key, i in ids.items() if i is not None and (text := tokenizer.token_text(i)) is not None}
    try:
        source = bundle.path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{bundle.path(name)}: the chat template cannot be read ({error}); export the bundle again") from None
    return ChatEncoder(ChatTemplate(source, str(bundle.path(name)), tokens), tokenizer)


def _read(value, name: str | None = None):
    """Calls of tools with JSON in their arguments read: an escape spells what it does not show. Raises UserError."""
    if isinstance(value, dict):
        return {key: _read(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read(inner) for inner in value]
    try:
        read = json.loads(value) if name == "arguments" and isinstance(value, str) else value
        return read if isinstance(read, dict) else value
    except ValueError:
        return value
    except RecursionError:
        raise UserError("the arguments of a call are nested too deep") from None


def _beginnings(tokens: set[str]) -> set[str]:
    return {token[:n] for token in tokens for n in range(1, len(token))}


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")


def _texts(value):
    """Every text in a value made of lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)
