"""The n-gram model as a `runtime.backend.Backend`, so that it is judged, and answers, by the lines of code that judge a network."""

import numpy as np

from models.ngram import NgramModel
from runtime.backend import Cache


class NgramCache(Cache):
    """Its storage is the tokens themselves: int64 [rows, capacity]."""

    @property
    def slots(self) -> np.ndarray:
        return self.storage[self.start:self.start + self.rows]

    def _copy_slots(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        found = self.slots[row, first:stop].copy().view(np.uint8)
        if out is None:
            return found
        out[:] = found
        return out

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        self.slots[row, first:stop] = data.view(np.int64)

    def grow(self, capacity: int) -> None:
        self.storage, self.capacity = np.pad(self.slots, ((0, 0), (0, capacity - self.capacity))), capacity


class NgramBackend:
    """Logits are ln p. See `runtime.backend.Backend` for the contract."""

    name = "ngram"
    max_chunk_rows = chunk = None

    def __init__(self, model: NgramModel):
        self.model = model

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return 8 * rows * capacity

    def new_cache(self, rows: int, capacity: int) -> NgramCache:
        return NgramCache(self, np.zeros((rows, capacity), np.int64), capacity, np.zeros(rows, np.int64))

    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: NgramCache, counts=None) -> np.ndarray:
        looks_back = len(self.model.orders) - 1
        found = np.empty((*logits_positions.shape, self.model.vocab_size), np.float32)
        for row, start in enumerate(write_index):
            cache.slots[row, start:start + input_ids.shape[1]] = input_ids[row]
            for column, position in enumerate(logits_positions[row]):
                end = start + position + 1
                found[row, column] = np.log(self.model.next_token(cache.slots[row, max(0, end - looks_back):end]))
        return found

    def close(self) -> None:
        pass
