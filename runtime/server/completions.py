"""POST /v1/completions: texts continued as they stand, and prompts scored (`echo` with `logprobs`), as lm-eval asks for it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response

from .. import structured
from ..engine import Engine
from ..reply import Reply
from ..sampling import TokenLogprobs
from . import logprobs
from .errors import ApiError
from .fields import Completion, read
from .runs import Run, user_of
from .sse import DONE, EventStream, while_connected
from .talk import generation

router = APIRouter()


class Continuations:
    """What a request to /v1/completions makes of an engine. Making one tokenizes and compiles grammars: not for an event loop."""

    def __init__(self, engine: Engine, body: Completion, most: int | None, user: str = ""):
        if body.suffix:
            raise ApiError(400, "suffix is given; this server continues texts, it fills no gaps in them", param="suffix")
        if body.best_of is not None and body.best_of > (body.n or 1):
            raise ApiError(400, "best_of is larger than n; ask for as many with n", param="best_of")
        self.engine, self.body, self.samples, self.told = engine, body, body.n or 1, body.told
        encode, asked = engine.tokenizer.encode, body.limit
        self.prompts = [(one, encode(one)) if isinstance(one, str) else (None, np.array(one)) for one in body.prompts()]
        self.ends = frozenset(engine.bundle.model["eos_token_ids"])
        self.drops = asked == 0                   # the engine makes at least one token
        # Whoever scores a prompt asks for one token besides and counts on its being there: an end of text is a token then.
        self.scores = bool(body.echo and self.told is not None and asked is not None and asked <= 1)
        more = {"ignore_model_stop": True} if self.scores else {}
        kind = body.constraint()
        self.jobs = []                            # for `Run`
        for _, ids in self.prompts:
            options = generation(engine, body, len(ids), 1 if self.drops else asked, most, "prompt") | more
            self.jobs += [partial(
                engine.submit, ids, sample=sample, user=user, logprobs=self.told, prompt_logprobs=self.told if body.echo else None,
                constraint=structured.constraint_for(engine, *kind) if kind else None, **options) for sample in range(self.samples)]

    def prompt_text(self, number: int) -> str:
        """What `echo` repeats before reply `number`."""
        text, ids = self.prompts[number // self.samples]
        return self.engine.tokenizer.decode(ids) if text is None else text

    def prompt_logprobs(self, run: Run, number: int) -> tuple[list[TokenLogprobs | None], int]:
        """What `echo` says before the reply's own, and the prompt's first token."""
        return run.pendings[number].prompt_logprobs, int(self.prompts[number // self.samples][1][0])

    def usage(self, run: Run) -> dict:
        used = run.usage(self.samples)
        return used | {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]} if self.drops else used

    def reason(self, reply: Reply) -> str:
        return "stop" if self.scores and self.ends.intersection(reply.tokens) else reply.finish_reason or "stop"


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    service, body = request.app.state.service, await read(request, Completion)
    async with AsyncExitStack() as held:
        engine = await held.enter_async_context(service.engine(body.model))
        asked = await asyncio.to_thread(Continuations, engine, body, service.options.max_tokens, user_of(request))
        name = service.find(body.model).name
        run = held.enter_context(Run(asked.jobs, partial(service.metrics.observe, route=request.url.path, model=name)))
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": name}
        if body.stream:
            return EventStream(chunks(asked, run, head), held.pop_all())
        return await while_connected(request, whole(asked, run, head))


async def whole(asked: Continuations, run: Run, head: dict) -> dict:
    """The reply as one object, choices in the order of the prompts."""
    async for _ in run.pieces():
        pass
    choices = []
    for number, reply in enumerate(run.replies):
        text, made, told = ("", [], None) if asked.drops else (reply.text, reply.logprobs, None)
        before, first = asked.prompt_logprobs(run, number) if asked.body.echo else ([], 0)
        if asked.told is not None:
            told = logprobs.of_completion(asked.engine.tokenizer, [*before, *made], first)
        choices.append({"index": number, "text": asked.prompt_text(number) + text if asked.body.echo else text, "logprobs": told,
                        "finish_reason": "length" if asked.drops else asked.reason(reply)})
    return {**head, "choices": choices, "usage": asked.usage(run), "timings": run.timings()}


async def chunks(asked: Continuations, run: Run, head: dict) -> AsyncIterator[bytes]:
    """The reply as events."""
    dump, tokenizer, body = json.dumps, asked.engine.tokenizer, asked.body
    head = dump(head, separators=(",", ":"))[:-1]
    usage = ',"usage":null' if body.wants_usage else ""
    offsets: dict[int, int] = {}

    def chunk(number: int, text: str, told: dict | None = None, reason: str | None = None, last: str = "") -> bytes:
        return (f'data: {head},"choices":[{{"index":{number},"text":{dump(text)},"logprobs":{dump(told)},'
                f'"finish_reason":{dump(reason)}}}]{usage}{last}}}\n\n').encode()

    async for number, piece in run.pieces():
        if body.echo and number not in offsets:
            text, told = asked.prompt_text(number), None
            if asked.told is not None:
                told = logprobs.of_completion(tokenizer, *asked.prompt_logprobs(run, number))
            yield chunk(number, text, told)
        offset = offsets.setdefault(number, len(asked.prompt_text(number)) if body.echo else 0)
        if piece is None:
            last = "" if body.wants_usage or not all(run.replies) else f',"timings":{dump(run.timings())}'
            yield chunk(number, "", None, asked.reason(run.replies[number]), last)
        elif not asked.drops and (piece.text or piece.logprobs):
            told = logprobs.of_completion(tokenizer, piece.logprobs, 0, offset) if asked.told is not None else None
            offsets[number] += len(piece.text)
            yield chunk(number, piece.text, told)
    if body.wants_usage:
        yield f'data: {head},"choices":[],"usage":{dump(asked.usage(run))},"timings":{dump(run.timings())}}}\n\n'.encode()
    yield DONE
