"""An encoder that a server has: a bundle of `runtime.Encoder` for embeddings, by the name of its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..bundle import MANIFEST
from ..encoder import Encoded, Encoder
from ..encoder_bundle import is_encoder_bundle, is_older


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an encoder, of an older version too, which `Encoder` refuses in words."""
    return (folder / MANIFEST).is_file() and is_encoder_bundle(folder) or is_older(folder)


class ServedEncoder:
    """Raises UserError for a folder that gives no embeddings, or damaged files.

    name: of its folder. vocab: token ids there are. context: tokens of an input at most, those around it included. size: of an
    embedding.
    """

    def __init__(self, folder: Path, threads: int | None = None):
        self.encoder = Encoder(folder, threads=threads)
        self.name, self.created = folder.resolve().name, int((folder / MANIFEST).stat().st_mtime)
        bundle = self.encoder.bundle
        self.vocab, self.context = bundle.manifest["model"]["vocab_size"], bundle.max_tokens
        self.size, self.size_bytes = self.encoder.size, bundle.size_bytes

    @property
    def there(self) -> bool:
        """As of a model: whether it can be asked for."""
        return True

    def tokens(self, given: str | list[int]) -> np.ndarray:
        """int64 ids of a text or of token ids, with those that the tokenizer puts around a text."""
        tokenizer, (before, behind) = self.encoder.tokenizer, map(list, self.encoder.tokenizer.around())
        if isinstance(given, str):
            return tokenizer.encode(given)
        inner = list(given)
        if inner[:len(before)] == before and inner[len(inner) - len(behind):] == behind and len(inner) >= len(before) + len(behind):
            return np.array(inner, np.int64)
        return np.array([*before, *inner, *behind], np.int64)

    def batches(self, inputs: list[np.ndarray]) -> list[list[int]]:
        """Which inputs go together into a call of `embed`: their numbers, the shortest first."""
        return self.encoder.batches(list(map(len, inputs)))

    def embed(self, inputs: list[np.ndarray]) -> np.ndarray:
        """float32 [n, size] of n inputs (int64 ids, not empty), in one call."""
        return self.encoder.call([Encoded(ids, np.zeros_like(ids), np.zeros((len(ids), 2), np.int64), False) for ids in inputs])
