"""Text to tokens and back: /tokenize, /detokenize, /tokenizer_info, in vLLM's shapes, which lm-eval reads."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field

from .errors import ApiError
from .fields import Fields, read

router = APIRouter()


class Text(Fields):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class Tokens(Fields):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


@router.post("/tokenize")
async def tokenize(request: Request) -> dict:
    """Token ids of a text; control tokens that it spells are taken for the tokens, as prompts of token ids would have them."""
    body = await read(request, Text)
    async with request.app.state.service.engine(body.model) as engine:
        tokens = await asyncio.to_thread(engine.tokenizer.encode, body.prompt, special_tokens=body.add_special_tokens, control_tokens=True)
        return {"tokens": tokens.tolist(), "count": len(tokens), "max_model_len": engine.bundle.max_context}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict:
    """The text of token ids, control tokens as they are spelled."""
    body = await read(request, Tokens)
    async with request.app.state.service.engine(body.model) as engine:
        vocab = engine.bundle.model["config"]["vocab_size"]
        if max(body.tokens, default=0) >= vocab:
            raise ApiError(400, f"tokens: there is a token id outside 0..{vocab - 1}", param="tokens")
        return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens, control_tokens=True)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict:
    """What marks beginning, end and filling, and the chat template."""
    async with request.app.state.service.engine(model) as engine:
        bundle, text = engine.bundle, engine.tokenizer.token_text
        ids = {"bos_token": bundle.model["bos_token_id"], "eos_token": next(iter(bundle.model["eos_token_ids"]), None),
               "pad_token": bundle.model["pad_token_id"]}
        template = bundle.manifest["chat_template"]
        return {name: None if token is None else text(token) for name, token in ids.items()} | {
            "chat_template": None if template is None else bundle.path(template).read_text("utf-8"),
            "model_max_length": bundle.max_context, "vocab_size": bundle.model["config"]["vocab_size"]}
