"""A backend whose model is a hash: the logits after a sequence are a fixed random vector chosen by the whole sequence.

Any mistake with the cache (a slot not written, a padding token read, a wrong row, a fork or growth that loses
something) therefore changes the logits. It insists on the contract of `runtime.backend` and counts what it is asked.
"""

import hashlib

import numpy as np


def logits_after(tokens, vocab: int, scale: float = 3.0) -> np.ndarray:
    """float32 [vocab] after a sequence of token ids: the oracle."""
    digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()
    return (np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=vocab) * scale).astype(np.float32)


class MockCache:
    def __init__(self, slots: np.ndarray, lengths: np.ndarray):
        self.slots, self.lengths = slots, lengths
        self.rows, self.capacity = slots.shape
        self.is_view = False

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(self.lengths[row], length)

    def fork(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]
        self.lengths[target] = self.lengths[source]

    def view(self, start: int, stop: int) -> "MockCache":
        view = MockCache(self.slots[start:stop], self.lengths[start:stop])
        view.is_view = True
        return view

    def grow(self, capacity: int) -> None:
        assert not self.is_view and capacity > self.capacity
        slots = np.full((self.rows, capacity), -1)
        slots[:, :self.capacity] = self.slots
        self.slots, self.capacity = slots, capacity


class MockBackend:
    name = "mock"
    graph = "none"

    def __init__(self, vocab: int = 97, max_chunk_rows: int | None = 1, bytes_per_slot: int = 100):
        self.vocab, self.max_chunk_rows, self.bytes_per_slot = vocab, max_chunk_rows, bytes_per_slot
        self.calls = []                      # shape of input_ids of every forward
        self.capacities = []
        self.closed = False

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return rows * capacity * self.bytes_per_slot

    def new_cache(self, rows: int, capacity: int) -> MockCache:
        self.capacities.append(capacity)
        return MockCache(np.full((rows, capacity), -1), np.zeros(rows, np.int64))

    def forward(self, input_ids, position_ids, write_index, logits_positions, cache, counts=None) -> np.ndarray:
        rows, tokens = input_ids.shape
        assert counts is None or counts.shape == (rows,) and (counts <= tokens).all()
        self.calls.append((rows, tokens))
        assert rows == cache.rows and position_ids.shape == (rows, tokens) and write_index.shape == (rows,)
        assert (position_ids == write_index[:, None] + np.arange(tokens)).all()
        assert (write_index + tokens <= cache.capacity).all(), "past the end of the cache"
        if tokens > 1 and write_index.any() and self.max_chunk_rows is not None:
            assert rows <= self.max_chunk_rows, "several new tokens on top of a filled cache"
        logits = np.empty((rows, logits_positions.shape[1], self.vocab), np.float32)
        for row in range(rows):
            start = write_index[row]
            cache.slots[row, start:start + tokens] = input_ids[row]
            for i, position in enumerate(logits_positions[row]):
                logits[row, i] = logits_after(cache.slots[row, :start + position + 1], self.vocab)
        return logits

    def close(self) -> None:
        self.closed = True
