"""POST /v1/embeddings, as OpenAI's: texts or token ids in, a vector each out, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response

from ..errors import shown
from .encoder import ServedEncoder
from .errors import ApiError
from .fields import Fields, Whole, read
from .sse import while_connected

MOST_INPUTS = 2048                # as OpenAI's
MOST_TOKENS = 300_000             # of all inputs together, as OpenAI's

router = APIRouter()


class Embeddings(Fields):
    """The body of /v1/embeddings."""

    model: str | None = None
    input: Any = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    body = await read(request, Embeddings)
    encoder = request.app.state.service.encoder(body.model)
    return await while_connected(request, _answer(encoder, body))


async def _answer(encoder: ServedEncoder, body: Embeddings) -> dict:
    if body.dimensions not in (None, encoder.size):
        raise ApiError(400, f"dimensions is {body.dimensions}; this model's embeddings have {encoder.size} and cannot be cut",
                       param="dimensions")
    inputs = await asyncio.to_thread(_inputs, encoder, body.input)
    vectors: list[np.ndarray | None] = [None] * len(inputs)
    for numbers in encoder.batches(inputs):       # a call each, so that a client that goes away is noticed between two
        for number, vector in zip(numbers, await asyncio.to_thread(encoder.embed, [inputs[number] for number in numbers])):
            vectors[number] = vector
    written = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
    count = sum(map(len, inputs))
    return {"object": "list", "model": encoder.name, "usage": {"prompt_tokens": count, "total_tokens": count},
            "data": [{"object": "embedding", "index": number, "embedding": written(vector)} for number, vector in enumerate(vectors)]}


def _inputs(encoder: ServedEncoder, given: Any) -> list[np.ndarray]:
    """Token ids of each input. Raises ApiError."""
    single = isinstance(given, str) or isinstance(given, list) and given and all(map(_is_whole, given))
    several = [given] if single else given
    if not isinstance(several, list) or not 1 <= len(several) <= MOST_INPUTS:
        raise ApiError(400, f"input is {shown(given)}; it must be a text, a list of token ids, or a list of 1 to {MOST_INPUTS} of these",
                       param="input")
    found, total = [], 0
    for number, one in enumerate(several):
        name = "input" if single else f"input[{number}]"
        if not isinstance(one, str) and not (isinstance(one, list) and one and all(map(_is_whole, one))):
            raise ApiError(400, f"{name} is {shown(one)}; it must be a text or a list of token ids", param="input")
        if not isinstance(one, str) and not 0 <= min(one) <= max(one) < encoder.vocab:
            raise ApiError(400, f"{name} has a token id outside 0..{encoder.vocab - 1}: these are another model's tokens; send texts (with "
                           "langchain's OpenAIEmbeddings: check_embedding_ctx_length=False, or it sends tiktoken's)", param="input")
        tokens = encoder.tokens(one)
        if len(tokens) > encoder.context:
            raise ApiError(400, f"{name} has {len(tokens)} tokens and the model's context is {encoder.context}; shorten it",
                           code="context_length_exceeded", param="input")
        found.append(tokens)
        total += len(tokens)
    if total > MOST_TOKENS:
        raise ApiError(400, f"input has {total} tokens; send at most {MOST_TOKENS} in one request", param="input")
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
