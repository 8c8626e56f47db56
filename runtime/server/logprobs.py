"""Log probabilities as OpenAI's two ways of asking have them, from the engine's `TokenLogprobs`.

A token's text may be part of a character only; `bytes` has what it really is, so that a client can join them.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..sampling import TokenLogprobs
from ..text import Tokenizer

_LEAST = -9999.0                  # of a token that cannot be, for JSON has no infinity
# GPT-2's spelling of bytes in vocabularies: printable ones as themselves, the others from U+0100 on
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(
    byte for byte in range(256) if byte not in set(_PRINTABLE))}


def token_bytes(tokenizer: Tokenizer, token: int, text: str) -> bytes:
    """What a token whose own text is `text` stands for, where that may be part of a character."""
    if "\ufffd" not in text:
        return text.encode()
    spelled = tokenizer.token_text(token) or ""
    if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):       # sentencepiece's byte fallback
        return bytes([int(spelled[3:5], 16)])
    return bytes(_BYTE[char] for char in spelled) if all(char in _BYTE for char in spelled) else text.encode()


def of_chat(tokenizer: Tokenizer, told: Iterable[TokenLogprobs]) -> dict:
    """`logprobs` of a choice of /v1/chat/completions."""
    def entry(token: int, logprob: float, text: str) -> dict:
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(token_bytes(tokenizer, token, text))}

    return {"content": [entry(one.token, one.logprob, one.text) | {
        "top_logprobs": [entry(token, logprob, text) for (token, logprob), text in zip(one.top, one.top_texts)]} for one in told],
        "refusal": None}


def of_completion(tokenizer: Tokenizer, told: Iterable[TokenLogprobs | None], first: int, offset: int = 0) -> dict:
    """`logprobs` of a choice of /v1/completions: parallel lists, one entry a token.

    told: of each token, None at a token that nothing precedes, whose id is `first`. offset: of the first token in the choice's text.
    The chosen token stands in top_logprobs even where it is none of the likeliest, as with OpenAI.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for one in told:
        token, text = (first, tokenizer.alone(first)) if one is None else (one.token, one.text)
        offsets.append(offset)
        tokens.append(_named(tokenizer, token, text))
        logprobs.append(None if one is None else max(one.logprob, _LEAST))
        tops.append(None if one is None else _tops(tokenizer, one))
        offset += 0 if token in tokenizer.control_tokens else len(text)        # which a text does not show
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _tops(tokenizer: Tokenizer, one: TokenLogprobs) -> dict[str, float]:
    found = {}
    for (token, logprob), text in zip([*one.top, (one.token, one.logprob)], [*one.top_texts, one.text]):
        found.setdefault(_named(tokenizer, token, text), max(logprob, _LEAST))         # of two that are spelled alike, the likelier
    return found


def _named(tokenizer: Tokenizer, token: int, text: str) -> str:
    """A token's text, or its bytes where it is part of a character: as OpenAI's, so that two such tokens are two names."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, token, text)) if "\ufffd" in text else text
