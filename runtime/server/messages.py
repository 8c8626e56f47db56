"""POST /v1/messages and /v1/messages/count_tokens, by conversion to a chat: the way Anthropic's clients ask. Errors have their shape too."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..errors import shown
from .errors import ApiError
from .fields import Chat, Templated, Texts, read
from .runs import Run
from .sse import EventStream, event, failure, while_connected
from .talk import Event, Talk, talking

router = APIRouter()
_DELTAS = {"content": ("text", "text_delta", "text"), "reasoning": ("thinking", "thinking_delta", "thinking"),
           "arguments": ("tool_use", "input_json_delta", "partial_json")}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Body(Templated):
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: Any = None
    stop_sequences: Texts | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def chat(self) -> Chat:
        """The same as a chat. Raises ApiError."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, message in enumerate(self.messages):
            _add(messages, message, f"messages[{number}]")
        choice = self.tool_choice or {}
        kind = choice.get("type", "auto")
        named = {"type": "function", "function": {"name": choice.get("name")}} if kind == "tool" else "required" if kind == "any" else kind
        return Chat.converted(self.model_dump() | {
            "messages": messages, "stop": self.stop_sequences, "tool_choice": named, "n": None,
            "tools": [{"type": "function" if tool.get("type") in (None, "custom") else tool["type"], "function": {
                "name": tool.get("name"), "parameters": tool.get("input_schema"), "description": tool.get("description") or ""}}
                for tool in self.tools or []],
            "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
            "enable_thinking": self.enable_thinking if self.thinking is None else self.thinking.get("type") != "disabled"})


def _add(messages: list[dict], message: dict, place: str) -> None:
    """The messages that one of Anthropic's is: what tools gave is a message each. Raises ApiError."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        messages.append({"role": role, "content": content})
        return
    texts, made = [], {"role": role}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use":
            made.setdefault("tool_calls", []).append({"id": part.get("id"), "type": "function", "function": {
                "name": part.get("name"), "arguments": json.dumps(part.get("input") or {})}})
        elif kind == "tool_result":
            messages.append({"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": part.get("content") or ""})
        elif kind == "thinking":
            made["reasoning_content"] = part.get("thinking")
        elif kind == "text":
            texts.append(part)
        elif kind != "redacted_thinking":
            raise ApiError(400, f"{place}.content has a part of type {shown(kind)}, and this model reads texts alone", param=f"{place}.content")
    if texts or len(made) > 1:
        messages.append({**made, "content": texts or None})


@router.post("/v1/messages")
async def messages(request: Request) -> Response:
    try:
        chat = (await read(request, Body)).chat()
        async with AsyncExitStack() as held:
            talk, run, name = await held.enter_async_context(talking(request, chat))
            head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": name}
            if chat.stream:
                return EventStream(_stream(talk, run, head, chat), held.pop_all(), "error")
            return await while_connected(request, _whole(talk, run, head, chat))
    except Exception as error:
        answer = failure(error)
        return JSONResponse({"type": "error", **answer.body}, answer.status, answer.headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> dict:
    chat = (await read(request, Body)).chat()
    async with request.app.state.service.engine(chat.model) as engine:
        return {"input_tokens": len((await asyncio.to_thread(Talk, engine, chat, None)).tokens)}


async def _whole(talk: Talk, run: Run, head: dict, chat: Chat) -> dict:
    blocks: list[dict] = []
    async for data in _events(talk, run, head, chat):
        if data["type"] == "content_block_start":
            blocks.append(data["content_block"] | ({"input": ""} if data["content_block"]["type"] == "tool_use" else {}))
        elif data["type"] == "content_block_delta":
            field = "input" if blocks[-1]["type"] == "tool_use" else blocks[-1]["type"]
            blocks[-1][field] += next(value for key, value in data["delta"].items() if key != "type")
        elif data["type"] == "message_delta":
            last = data
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"] or "{}")
    return {**head, "content": blocks, **last["delta"], "usage": last["usage"]}


async def _stream(talk: Talk, run: Run, head: dict, chat: Chat) -> AsyncIterator[bytes]:
    async for data in _events(talk, run, head, chat):
        yield event(data, data["type"])


async def _events(talk: Talk, run: Run, head: dict, chat: Chat) -> AsyncIterator[dict]:
    usage = {"input_tokens": len(talk.tokens), "output_tokens": 0}
    yield {"type": "message_start", "message": {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}}
    kind, index = None, -1
    async for _, events, _, reason in talk.events(run):
        for one in events:
            block, delta, field = _DELTAS["arguments" if one.kind == "call" else one.kind]
            if block != kind or one.kind == "call":
                if kind:
                    yield {"type": "content_block_stop", "index": index}
                kind, index = block, index + 1
                yield {"type": "content_block_start", "index": index, "content_block": _block(one)}
            if one.kind != "call":
                yield {"type": "content_block_delta", "index": index, "delta": {"type": delta, field: one.text}}
    if kind:
        yield {"type": "content_block_stop", "index": index}
    used, reply = run.usage(), run.replies[0]
    said = talk.engine.tokenizer.decode(reply.tokens)[len(reply.text):] if reason == "stop" else ""
    stopped = next((stop for stop in chat.stop or () if said.startswith(stop)), None)
    cached = used["prompt_tokens_details"]["cached_tokens"]
    yield {"type": "message_delta", "delta": {
        "stop_reason": "stop_sequence" if stopped else _REASONS.get(reason, "end_turn"), "stop_sequence": stopped},
        "usage": {"input_tokens": used["prompt_tokens"] - cached, "cache_read_input_tokens": cached, "output_tokens": used["completion_tokens"]}}
    yield {"type": "message_stop"}


def _block(one: Event) -> dict:
    plain = {"content": {"type": "text", "text": ""}, "reasoning": {"type": "thinking", "thinking": "", "signature": ""}}
    return plain.get(one.kind) or {"type": "tool_use", "id": one.id, "name": one.text, "input": {}}
