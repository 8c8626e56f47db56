"""A chat over HTTP: what the client asked for becomes requests to an engine, and what those reply becomes events.

`Talk` is what /v1/chat/completions, /v1/responses and /v1/messages have in common: each makes a `Chat` of its body and
writes `Event`s in its own way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastapi import Request

from .. import calls, structured
from ..calls.values import json_grammar
from ..engine import Engine
from ..errors import UserError, shown
from ..pending import Piece
from .errors import ApiError
from .fields import Chat, Sampling
from .runs import Run, user_of

_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")     # of a message, besides role and content
_ROLES = {"developer": "system", "function": "tool"}


class Event(NamedTuple):
    """What a reply gains: kind "reasoning", "content", "call" (begun: `text` is its name, `id` its id) or "arguments" (a piece of
    its JSON); `call` counts the calls of a reply."""

    kind: str
    text: str
    call: int = 0
    id: str = ""


class Talk:
    """A chat on an engine, ready to be submitted. Making one renders the template, tokenizes and compiles the grammar: not for an
    event loop. most: tokens of a reply, at most, as the server's owner says; user: who shares turns. Raises ApiError, UserError."""

    def __init__(self, engine: Engine, body: Chat, most: int | None, user: str = ""):
        self.engine, self.samples, self.told = engine, body.n or 1, body.told
        tools, choice = self.tools, _ = _tools(body)
        kind, messages = body.constraint(), _messages(body.messages)
        try:
            encoder = engine.chat_encoder
            self.tokens = engine.chat_tokens(messages, template=_variables(body, encoder.template.source, tools))
        except UserError as error:                        # without this machine's folders
            raise ApiError(400, str(error).replace(f"{engine.bundle.folder}", engine.bundle.name)) from None
        self.syntax = calls.parser_of(encoder.template.source, engine.tokenizer) if tools else None
        if tools and (choice != "auto" or kind and kind[0] in ("json", "json_schema")):
            kind = _call_form(self.syntax, tools, choice, body.parallel_tool_calls is not False, kind)
        self.thoughts, self.one_call = encoder.thoughts, body.parallel_tool_calls is False
        spelled = frozenset()
        if self.syntax:
            spelled |= self.syntax.spelled(engine.tokenizer)
        if self.thoughts:
            spelled |= self.thoughts.spelled(engine.tokenizer)
        options = generation(engine, body, len(self.tokens), body.limit, most, "messages")
        self.jobs = [functools.partial(
            engine.submit, self.tokens, sample=sample, user=user, spelled=spelled, logprobs=self.told, constraint=self._constraint(kind),
            **options) for sample in range(self.samples)]                 # for `Run`

    def _constraint(self, kind: tuple | None) -> structured.Constraint | None:
        if kind is None:
            return None
        return structured.after_thought(structured.constraint_for(self.engine, *kind), self.engine, self.thoughts, self.tokens)

    async def events(self, run: Run) -> AsyncIterator[tuple[int, list[Event], Piece | None, str | None]]:
        """Of each piece: number of the reply, its events, the piece itself, None; at a reply's end its last events, None, and its
        finish_reason: "stop", "length" or "tool_calls"."""
        listeners = [_Listener(self) for _ in range(self.samples)]
        async for number, piece in run.pieces():
            listener = listeners[number]
            if piece is not None:
                yield number, listener.push(piece.text), piece, None
                if listener.enough:
                    run.stop(number)
            else:
                events, reason = listener.finish(), run.replies[number].finish_reason
                yield number, events, None, "tool_calls" if listener.calls and (reason == "stop" or listener.enough) else reason or "stop"


@contextlib.asynccontextmanager
async def talking(request: Request, body: Chat) -> AsyncIterator[tuple[Talk, Run, str]]:
    """The chat that a request asks for, its replies, submitted, and the model's name. Raises ApiError, UserError."""
    service = request.app.state.service
    async with service.engine(body.model) as engine:
        talk = await asyncio.to_thread(Talk, engine, body, service.options.max_tokens, user_of(request))
        name = service.find(body.model).name
        with Run(talk.jobs, functools.partial(service.metrics.observe, route=request.url.path, model=name)) as run:
            yield talk, run, name


class _Listener:
    """Tells the thoughts, the content and the calls of one reply apart."""

    def __init__(self, talk: Talk):
        self._thoughts = talk.thoughts.stream(talk.engine.tokenizer, talk.tokens) if talk.thoughts else None
        self._syntax = talk.syntax.stream(talk.tools) if talk.syntax else None
        self._one_call, self.calls, self.enough = talk.one_call, 0, False

    def push(self, text: str) -> list[Event]:
        if not self._thoughts:
            return self._answer(text)
        return self._split(self._thoughts.push(text))

    def finish(self) -> list[Event]:
        events = self._split(self._thoughts.finish()) if self._thoughts else []
        return events + (self._events(self._syntax.finish()) if self._syntax else [])

    def _split(self, parts: list[tuple[str, str]]) -> list[Event]:
        events = []
        for kind, text in parts:
            events += [Event("reasoning", text)] if kind == "thought" else self._answer(text)
        return events

    def _answer(self, text: str) -> list[Event]:
        if self._syntax:
            return self._events(self._syntax.push(text))
        return [Event("content", text)] if text else []

    def _events(self, found: list) -> list[Event]:
        events = []
        for one in found:
            if isinstance(one, calls.CallBegun):
                self.enough |= self._one_call and self.calls > 0
                self.calls += not self.enough
            if self.enough:
                break                             # parallel_tool_calls is false: one call is all that was asked for
            if isinstance(one, calls.Content):
                events.append(Event("content", one.text))
            elif isinstance(one, calls.CallBegun):
                # nine letters and digits: what Mistral's templates insist on
                events.append(Event("call", one.name, one.index, secrets.token_hex(5)[:9]))
            else:
                events.append(Event("arguments", one.piece, one.index))
        return events


def generation(engine: Engine, body: Sampling, prompt: int, asked: int | None, most: int | None, param: str) -> dict:
    """How a reply to `prompt` tokens is made, for `Engine.submit`; asked, most: its tokens at most, for the client and for the
    server's owner. Raises ApiError, also where the context leaves no room for a reply."""
    context, vocab = engine.bundle.max_context, engine.bundle.model["config"]["vocab_size"]
    if prompt >= context:
        raise ApiError(400, f"the model's context is {context} tokens and the prompt has {prompt}; shorten it",
                       code="context_length_exceeded", param=param)
    options = body.generation()
    if (largest := max(options.get("logit_bias", [0]))) >= vocab:
        raise ApiError(400, f"logit_bias has token {largest}, and the vocabulary ends at {vocab - 1}", param="logit_bias")
    return options | {"max_new_tokens": min(limit for limit in (asked, most, context - prompt) if limit is not None)}


def _messages(given: list[dict]) -> list[dict]:
    """As chat templates expect them. Raises ApiError."""
    messages = []
    for number, message in enumerate(given):
        place, role, content = f"messages[{number}]", message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ApiError(400, f"{place}.role is {shown(role)}; it must be a text", param=f"{place}.role")
        if isinstance(content, list):
            content = "".join(_text(part, f"{place}.content") for part in content)
        if not isinstance(content, str | None):
            raise ApiError(400, f"{place}.content is {shown(content)}; it must be a text or a list of parts", param=f"{place}.content")
        if content is None and not message.get("tool_calls"):
            if role != "assistant":
                raise ApiError(400, f"{place}.content is missing", param=f"{place}.content")
            content = ""
        messages.append({"role": _ROLES.get(role, role), "content": content,
                         **{name: message[name] for name in _KEPT if message.get(name) is not None}})
    return messages


def _text(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in ("text", "input_text", "output_text", "refusal") else None
    if not isinstance(text, str):
        raise ApiError(400, f"{place} has a part of type {shown(kind)}; this model reads parts of type text alone", param=place)
    return text


def _tools(body: Chat) -> tuple[list[dict], str]:
    """The tools the model is told of, and "auto", "required" or the name of the one to call. Raises ApiError."""
    tools, choice = body.tools or [], body.tool_choice
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"tools[{number}] must be of type function, with a name; this server has no tools of its own", param=f"tools[{number}]")
        if not isinstance(function.get("parameters"), dict | None):
            raise ApiError(400, f"tools[{number}].function.parameters must be a JSON schema", param=f"tools[{number}].function.parameters")
    if choice in (None, "auto", "none"):
        return ([], "auto") if choice == "none" else (tools, "auto")
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        choice = function.get("name") if isinstance(function, dict) else None
        if not isinstance(choice, str):
            raise ApiError(400, f"tool_choice is {shown(body.tool_choice)}; it must be none, auto, required or "
                           '{"type": "function", "function": {"name"}}', param="tool_choice")
        tools = [tool for tool in tools if tool["function"]["name"] == choice]
    if not tools:
        raise ApiError(400, f"tool_choice is {shown(body.tool_choice)}, and tools has no such", param="tool_choice")
    return tools, choice


def _call_form(syntax: calls.Syntax | None, tools: list[dict], choice: str, several: bool, kind: tuple | None) -> tuple[str, str]:
    """What holds a reply to calls of `tools`, or, where they are not required, to these or JSON of `kind`. Raises ApiError where nobody
    knows how the model writes them."""
    if kind and choice != "auto":
        raise ApiError(400, "response_format and a required tool call exclude each other", param="tool_choice")
    if syntax is None:
        mend = "ask for a response_format without tools" if kind else f"use auto instead of {shown(choice)}"
        raise ApiError(400, f"this model's calls cannot be held to a form, because its chat template knows no call syntax; {mend}",
                       param="response_format" if kind else "tool_choice")
    grammar = syntax.grammar([tool["function"] for tool in tools], several)
    if kind:
        schema = kind[1] if isinstance(kind[1], dict) else {} if kind[1] else {"type": "object"}
        grammar = f"start: calls | answer\nanswer: {json_grammar(schema)}\n{grammar.replace('start:', 'calls:', 1)}"
    return "grammar", grammar


def _variables(body: Chat, source: str, tools: list[dict]) -> dict:
    """What the template is given besides the messages. What every client may say of thoughts is left out where it reads none."""
    variables = {"enable_thinking": body.enable_thinking, "reasoning_effort": body.reasoning_effort, **(body.chat_template_kwargs or {})}
    if body.reasoning_effort == "none" and body.enable_thinking is None:
        variables["enable_thinking"] = False
    for name in ("enable_thinking", "reasoning_effort"):
        if variables[name] is None or name not in source:
            del variables[name]
    return variables | ({"tools": tools} if tools else {})


def message(events: list[Event]) -> dict:
    """The assistant's message that the events of a reply make."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    made: list[dict] = []
    for one in events:
        if one.kind == "call":
            made.append({"id": one.id, "type": "function", "function": {"name": one.text, "arguments": ""}})
        elif one.kind == "arguments":
            made[one.call]["function"]["arguments"] += one.text
        else:
            texts[one.kind].append(one.text)
    content, thought = "".join(texts["content"]), "".join(texts["reasoning"])
    return {"role": "assistant", "content": content or (None if made else ""), "refusal": None,
            **({"reasoning_content": thought, "reasoning": thought} if thought else {}),
            **({"tool_calls": made} if made else {})}
