"""What an engine must do to serve the runtime: run rows of tokens, and keep their KV cache.

The decode loop, sampling, speculation, batching and serving are written once above this interface. It deals in token
ids and cache slots and knows nothing of text. ONNX Runtime (`ort_backend.py`) is the reference implementation.

Cache slots. A cache has `rows` independent sequences of at most `capacity` tokens. Slot i of a row holds the key and
value of its token at position i. `forward` writes token j of row r into slot `write_index[r] + j`; a token attends to
slots whose index is at most its own position (and greater than position - window, where the model has a sliding
window). Right padding is therefore harmless: what padding wrote lies beyond the row's length and is overwritten by the
next real token before anything may look at it. `lengths` says how many slots of each row are real; `forward` does not
touch it, because only the caller knows which tokens were padding or will be rejected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np


class Cache(ABC):
    """KV cache of several rows. A view shares the storage and the lengths of the rows it shows."""

    def __init__(self, backend: Backend, storage, capacity: int, lengths: np.ndarray, start: int = 0):
        """storage: what the backend keeps keys and values in, of any number of rows. This cache shows those from `start`
        on; lengths: int64 [rows], their filled slots, which the caller advances."""
        self.backend, self.storage, self.capacity, self.lengths, self.start = backend, storage, capacity, lengths, start

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of storage this cache (or view) spans."""
        return self.backend.cache_bytes(self.rows, self.capacity)

    def truncate(self, row: int, length: int) -> None:
        """Forget the slots of `row` from `length` on (free of cost: only the length changes)."""
        self.lengths[row] = min(length, self.lengths[row])

    def view(self, start: int, stop: int) -> Cache:
        """The rows start..stop-1 as a cache of their own, over the same storage."""
        return type(self)(self.backend, self.storage, self.capacity, self.lengths[start:stop], self.start + start)

    @abstractmethod
    def fork(self, source: int, target: int) -> None:
        """Copy row `source`, slots and length, over row `target`."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Enlarge every row to `capacity` slots, keeping what they hold. Not on a view; take views anew afterwards."""


class Backend(Protocol):
    """One opened model on one device."""

    name: str                    # "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "native"
    max_chunk_rows: int | None   # rows that may take several new tokens on top of a filled cache; None: any number
    # (GroupQueryAttention: 1. Steps of one token, and prompts into empty rows, always batch.)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes that `new_cache(rows, capacity)` will allocate."""

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache. Raises UserError where the backend has no such capacity (a TensorRT engine's is fixed)."""

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: Cache) -> np.ndarray:
        """Run the rows of `cache` one step and update it in place.

        input_ids, position_ids: int64 [b, s], right-padded; b == cache.rows. Positions of row r are
            write_index[r] + 0..s-1 (padding included).
        write_index: int64 [b], the slot where each row's first token goes; write_index + s <= cache.capacity.
        logits_positions: int64 [b, k], indices into s whose logits are wanted.
        Returns float32 logits [b, k, vocab]: a buffer, valid until the next call with this cache.
        Threads may call at once, each with caches of its own. Raises DeviceError once the backend was closed.
        """

    # A backend may also have `decode(cache, row, token, limit, sampler, choose)`, a loop of its own for a lone row that
    # keeps the logits to itself: see `runtime.native.backend.NativeBackend.decode`.

    def close(self) -> None:
        """Free the device's memory, once the calls that run have ended; none begins after. Closing again does nothing."""
