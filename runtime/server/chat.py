"""POST /v1/chat/completions, as OpenAI's clients and their like expect it: whole replies and streams of chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response

from . import logprobs
from .fields import Chat, read
from .runs import Run
from .sse import DONE, EventStream, while_connected
from .talk import Event, Talk, message, talking

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    body = await read(request, Chat)
    async with AsyncExitStack() as held:
        talk, run, name = await held.enter_async_context(talking(request, body))
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()), "model": name}
        if body.stream:
            return EventStream(chunks(talk, run, head, body.wants_usage), held.pop_all())
        return await while_connected(request, whole(talk, run, head))


async def whole(talk: Talk, run: Run, head: dict) -> dict:
    """The reply as one object."""
    events: list[list[Event]] = [[] for _ in range(talk.samples)]
    reasons = [""] * talk.samples
    async for number, some, _, reason in talk.events(run):
        events[number] += some
        reasons[number] = reason
    tokenizer = talk.engine.tokenizer
    choices = [{"index": number, "message": message(some), "finish_reason": reason,
                "logprobs": logprobs.of_chat(tokenizer, reply.logprobs) if talk.told is not None else None}
               for number, (some, reason, reply) in enumerate(zip(events, reasons, run.replies))]
    return {**head, "choices": choices, "usage": run.usage(talk.samples), "timings": run.timings()}


async def chunks(talk: Talk, run: Run, head: dict, wants_usage: bool) -> AsyncIterator[bytes]:
    """The reply as events. What is the same in all of them is written once: a chunk costs one json.dumps of its text."""
    dump, tokenizer = json.dumps, talk.engine.tokenizer
    head = dump(head | {"object": "chat.completion.chunk"}, separators=(",", ":"))[:-1]
    begin = [f'data: {head},"choices":[{{"index":{number},"delta":' for number in range(talk.samples)]
    usage = ',"usage":null' if wants_usage else ""
    end = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
    for one in begin:
        yield f'{one}{{"role":"assistant","content":""}}{end}'.encode()
    async for number, events, piece, reason in talk.events(run):
        told = None
        if piece is not None and piece.logprobs:
            told = f',"logprobs":{dump(logprobs.of_chat(tokenizer, piece.logprobs))},"finish_reason":null}}]{usage}}}\n\n'
            events = events or [Event("content", "")]
        for one in events:
            yield f"{begin[number]}{_delta(one, dump)}{told or end}".encode()
            told = None
        if reason is not None:
            last = "" if wants_usage or not all(run.replies) else f',"timings":{dump(run.timings())}'
            yield f'{begin[number]}{{}},"logprobs":null,"finish_reason":"{reason}"}}]{usage}{last}}}\n\n'.encode()
    if wants_usage:
        yield f'data: {head},"choices":[],"usage":{dump(run.usage(talk.samples))},"timings":{dump(run.timings())}}}\n\n'.encode()
    yield DONE


def _delta(one: Event, dump) -> str:
    """`delta` of a chunk, as JSON."""
    text = dump(one.text)
    if one.kind == "content":
        return f'{{"content":{text}}}'
    if one.kind == "reasoning":
        return f'{{"reasoning_content":{text},"reasoning":{text}}}'
    if one.kind == "call":
        return f'{{"tool_calls":[{{"index":{one.call},"id":"{one.id}","type":"function","function":{{"name":{text},"arguments":""}}}}]}}'
    return f'{{"tool_calls":[{{"index":{one.call},"function":{{"arguments":{text}}}}}]}}'
