"""POST /v1/responses, by conversion to a chat: OpenAI's newer way of asking, without its store and its own tools."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response

from ..errors import shown
from .errors import ApiError
from .fields import Chat, Templated, Whole, read
from .runs import Run
from .sse import EventStream, event, while_connected
from .talk import Event, Talk, talking

router = APIRouter()
_WHOLE = {"status": "completed", "incomplete_details": None}
_CUT = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
_PARTS = {"message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}, "reasoning": {"type": "reasoning_text", "text": ""}}


class Body(Templated):
    input: Any = None
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None

    def chat(self) -> Chat:
        """The same as a chat. Raises ApiError."""
        if self.previous_response_id:
            raise ApiError(400, "this server keeps no responses; send the whole conversation as input", param="previous_response_id")
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if not isinstance(given, list) or not given:
            raise ApiError(400, f"input is {shown(given)}; it must be a text or a list of items", param="input")
        messages: list[dict] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for number, item in enumerate(given):
            _add(messages, item, f"input[{number}]")
        tools = [{"type": tool.get("type"), "function": {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key)}}
                 for tool in self.tools or []]
        choice, form, effort = self.tool_choice, (self.text or {}).get("format"), (self.reasoning or {}).get("effort")
        choice = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
        form = {"type": form.get("type"), "json_schema": form} if isinstance(form, dict) else form
        return Chat.converted(self.model_dump() | {
            "messages": messages, "max_tokens": self.max_output_tokens, "tools": tools, "tool_choice": choice, "response_format": form,
            "n": None, "reasoning_effort": effort if isinstance(effort, str) else self.reasoning_effort})


def _add(messages: list[dict], item: Any, place: str) -> None:
    """The message that an item of `input` is, or what it adds to the last one. Raises ApiError."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "function_call_output" or kind == "message" and item.get("role") != "assistant":
        own = {"role": item.get("role")} if kind == "message" else {"role": "tool", "tool_call_id": item.get("call_id")}
        messages.append({**own, "content": item.get("content" if kind == "message" else "output")})
        return
    if not messages or messages[-1]["role"] != "assistant" or kind == "message" and messages[-1]["content"] is not None:
        messages.append({"role": "assistant", "content": None})
    said = messages[-1]                           # a thought, a message and calls, one after the other, are one message of a chat
    if kind == "message":
        said["content"] = item.get("content")
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary")
        parts = [part.get("text") for part in (parts if isinstance(parts, list) else []) if isinstance(part, dict)]
        said["reasoning_content"] = "".join(text for text in parts if isinstance(text, str))
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        said.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": call})
    else:
        raise ApiError(400, f"{place} is {shown(item)}; its type must be message, function_call, function_call_output or reasoning", param=place)


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    body = await read(request, Body)
    async with AsyncExitStack() as held:
        talk, run, name = await held.enter_async_context(talking(request, body.chat()))
        head = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()), "model": name, "error": None,
                "instructions": body.instructions, "metadata": {}, "parallel_tool_calls": body.parallel_tool_calls is not False,
                "temperature": body.temperature, "top_p": body.top_p, "tools": body.tools or [], "tool_choice": body.tool_choice or "auto"}
        if body.stream:
            numbers, told = itertools.count(), _events(talk, run, head)
            events = (event({"type": name, "sequence_number": next(numbers), **data}, name) async for name, data in told)
            return EventStream(events, held.pop_all())
        return await while_connected(request, _whole(talk, run, head))


async def _whole(talk: Talk, run: Run, head: dict) -> dict:
    return [data async for _, data in _events(talk, run, head)][-1]["response"]


async def _events(talk: Talk, run: Run, head: dict) -> AsyncIterator[tuple[str, dict]]:
    """Every event of a response: its name and data. The last has the whole response."""
    output: list[dict] = []
    for name in ("response.created", "response.in_progress"):
        yield name, {"response": {**head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}}
    async for _, events, _, reason in talk.events(run):
        for one in events:
            kind = {"content": "message", "reasoning": "reasoning"}.get(one.kind, "function_call")
            if not output or output[-1]["type"] != kind or one.kind == "call":
                for told in [*_end(output), *_begin(output, kind, one)]:
                    yield told
            place = {"item_id": output[-1]["id"], "output_index": len(output) - 1}
            if one.kind == "arguments":
                output[-1]["arguments"] += one.text
                yield "response.function_call_arguments.delta", {**place, "delta": one.text}
            elif one.kind != "call":
                part = output[-1]["content"][0]
                part["text"] += one.text
                yield f"response.{part['type']}.delta", {**place, "content_index": 0, "delta": one.text, "logprobs": []}
    for told in _end(output):
        yield told
    used, cut = run.usage(), reason == "length"
    usage = {"input_tokens": used["prompt_tokens"], "input_tokens_details": used["prompt_tokens_details"] | {"cache_write_tokens": 0},
             "output_tokens": used["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": used["total_tokens"]}
    yield ("response.incomplete" if cut else "response.completed"), {"response": {**head, **(_CUT if cut else _WHOLE), "output": output, "usage": usage}}


def _begin(output: list[dict], kind: str, one: Event) -> Iterator[tuple[str, dict]]:
    """A new item, which `one` begins, and the events that say so."""
    own = {"message": {"role": "assistant", "content": []}, "reasoning": {"summary": [], "content": []},
           "function_call": {"call_id": one.id, "name": one.text, "arguments": ""}}[kind]
    output.append(item := {"id": f"{kind}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **own})
    yield "response.output_item.added", {"output_index": len(output) - 1, "item": {**item}}
    if kind in _PARTS:
        item["content"] = [{**_PARTS[kind]}]
        yield "response.content_part.added", {"item_id": item["id"], "output_index": len(output) - 1, "content_index": 0, "part": _PARTS[kind]}


def _end(output: list[dict]) -> Iterator[tuple[str, dict]]:
    """The events that say that the last item is whole."""
    if output:
        item, place = output[-1], {"item_id": output[-1]["id"], "output_index": len(output) - 1}
        item["status"] = "completed"
        if item["type"] == "function_call":
            yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": item["arguments"]}
        else:
            part = item["content"][0]
            yield f"response.{part['type']}.done", {**place, "content_index": 0, "text": part["text"], "logprobs": []}
            yield "response.content_part.done", {**place, "content_index": 0, "part": part}
        yield "response.output_item.done", {"output_index": len(output) - 1, "item": item}
