"""Guesses from a file of n-grams, which `python -m export.draft` adds to a bundle: the likeliest next token after the last few.

    table = read_ngrams(path, vocab, tokenizer_sha256)
    table.following((17, 4, 256))                # (token, chance) after these tokens, or None

The file is little-endian and mapped, not read:

    8 bytes     "EWNGRAM1"
    uint32      tokens of the vocabulary (a model's table may have more); tokens of the longest context, K
    32 bytes    sha256 of the tokenizer file it was made for
    uint64 [K]  n: contexts of 1, 2, ... K tokens
    of each length:  uint64 [n] contexts, sorted, their tokens in equal fields of bits, the last one lowest;
                     uint32 [n] the token that follows;  uint8 [n] its chance in 1/255;  zeros up to a multiple of 8

The longest context that is there answers. What a file says is no more than a guess: nothing but its size has to be right.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ..errors import UserError
from .matches import Matches

MAGIC = b"EWNGRAM1"
_HEAD = struct.Struct("<8sII32s")
_MEND = "make it again with `python -m export.draft`"


def token_bits(vocab: int) -> int:
    return max(1, (vocab - 1).bit_length())


def write_ngrams(vocab: int, tokenizer_sha256: str, tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> bytes:
    """The file. tables: for contexts of 1, 2, ... tokens: uint64 [n] sorted, uint32 [n], float [n] chances from 0 to 1."""
    parts = [_HEAD.pack(MAGIC, vocab, len(tables), bytes.fromhex(tokenizer_sha256)), np.array([len(t[0]) for t in tables], "<u8").tobytes()]
    for contexts, tokens, chances in tables:
        data = contexts.astype("<u8").tobytes() + tokens.astype("<u4").tobytes() + np.rint(chances * 255).astype(np.uint8).tobytes()
        parts += [data, bytes(-len(data) % 8)]
    return b"".join(parts)


def read_ngrams(path: Path, vocab: int, tokenizer_sha256: str) -> NgramTable:
    """Map a file. Raises UserError where it is none, was cut short, or is of another vocabulary or tokenizer."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:        # ValueError: it is empty
        raise UserError(f"{path}: cannot be read as a file of n-grams ({error}); {_MEND}") from None
    if len(data) < _HEAD.size or bytes(data[:8]) != MAGIC:
        raise UserError(f"{path}: is no file of n-grams of this version; {_MEND}")
    _, theirs, longest, digest = _HEAD.unpack(data[:_HEAD.size].tobytes())
    if not 0 < theirs <= vocab:
        raise UserError(f"{path}: its n-grams are of a vocabulary of {theirs} tokens, and the model's has {vocab}; {_MEND}")
    if digest.hex() != tokenizer_sha256:
        raise UserError(f"{path}: its n-grams are of another tokenizer than the bundle's; {_MEND}")
    at, tables = _HEAD.size + 8 * longest, []
    for count in data[_HEAD.size:at].view("<u8").tolist() if at <= len(data) else [len(data)]:
        if at + 13 * count > len(data):
            raise UserError(f"{path}: it was cut short ({len(data)} bytes); {_MEND}")
        ends = at + 8 * count, at + 12 * count, at + 13 * count
        tables.append((data[at:ends[0]].view("<u8"), data[ends[0]:ends[1]].view("<u4"), data[ends[1]:ends[2]]))
        at = -(-ends[2] // 8) * 8
    return NgramTable(tables, theirs)


class NgramTable:
    """tables: as `write_ngrams` takes them, with chances in 1/255."""

    def __init__(self, tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]], vocab: int):
        self.longest, self._tables, self._vocab, self._bits = len(tables), tables, vocab, token_bits(vocab)

    def following(self, context: list[int]) -> tuple[int, float] | None:
        """The likeliest token after these (the last `longest` count) and its chance; None: nothing is known."""
        for length in range(min(self.longest, len(context)), 0, -1):
            contexts, tokens, chances = self._tables[length - 1]
            key = 0
            for token in context[-length:]:
                key = key << self._bits | token
            place = int(np.searchsorted(contexts, np.uint64(key)))
            if place < len(contexts) and contexts[place] == key and tokens[place] < self._vocab:
                return int(tokens[place]), int(chances[place]) / 255
        return None


class Ngrams:
    """The source (drafter.py): guesses as long as together they hold with a chance of _LEAST."""

    seconds = 0.0
    _LEAST = 0.15

    def __init__(self, table: NgramTable):
        self._table, self._guess = table, []

    def look(self, matches: Matches, most: int) -> list[str]:
        tail, kinds, reach = matches.text[-self._table.longest:], [], 1.0
        while len(kinds) < most and (found := self._table.following(tail)):
            token, chance = found
            reach *= chance
            if reach < self._LEAST:
                break
            kinds.append(_KINDS[int(chance * 5)])
            tail.append(token)
        self._guess = tail[len(tail) - len(kinds):]
        return kinds

    def take(self, count: int) -> list[int]:
        return self._guess[:count]


_KINDS = [f"n-gram {20 * i}%" for i in range(6)]
