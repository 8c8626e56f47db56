"""A backend whose model is a hash: the logits after a sequence are a fixed random vector chosen by the whole sequence.

Any mistake with the cache (a slot not written, a padding token read, a wrong row, a fork or growth that loses
something) therefore changes the logits. It insists on the contract of `runtime.backend` and counts what it is asked. With a
`chunk` it is a recurrent model: it reads no slots, and its state of a row is the row's tokens.
"""

import hashlib

import numpy as np

from runtime.backend import Cache, States

LONGEST = 4096                    # tokens of a recurrent row


def logits_after(tokens, vocab: int, scale: float = 3.0) -> np.ndarray:
    """float32 [vocab] after a sequence of token ids: the oracle."""
    digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()
    return (np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=vocab) * scale).astype(np.float32)


class MockCache(Cache):
    """Its storage is an array [rows, capacity] of tokens."""

    @property
    def slots(self) -> np.ndarray:
        return self.storage[self.start:self.start + self.rows]

    def _copy_slots(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        assert first % 16 == stop % 16 == 0 and stop <= self.capacity
        found = self.slots[row, first:stop].copy().view(np.uint8)
        if out is not None:
            out[:] = found
        return found if out is None else out

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        assert first % 16 == stop % 16 == 0 and stop <= self.capacity
        self.slots[row, first:stop] = data.view(np.int64)

    def grow(self, capacity: int) -> None:
        assert self.rows == len(self.storage) and capacity > self.capacity
        slots = np.full((self.rows, capacity), -1)
        slots[:, :self.capacity] = self.slots
        self.storage, self.capacity = slots, capacity


class MockBackend:
    name = "mock"
    graph = "none"

    def __init__(self, vocab: int = 97, max_chunk_rows: int | None = 1, bytes_per_slot: int = 100, chunk: int | None = None):
        self.vocab, self.max_chunk_rows, self.bytes_per_slot, self.chunk = vocab, max_chunk_rows, bytes_per_slot, chunk
        self.calls = []                      # shape of input_ids of every forward
        self.capacities = []
        self.closed = False

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return rows * capacity * self.bytes_per_slot

    def new_cache(self, rows: int, capacity: int) -> MockCache:
        self.capacities.append(capacity)
        states = States([np.zeros((2, rows, LONGEST), np.int64)]) if self.chunk else None
        return MockCache(self, np.full((rows, capacity), -1), capacity, np.zeros(rows, np.int64), 0, states)

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
        if self.chunk:
            return self._recur(input_ids, write_index, logits_positions, cache.states, np.full(rows, tokens) if counts is None else counts, logits)
        for row in range(rows):
            start = write_index[row]
            cache.slots[row, start:start + tokens] = input_ids[row]
            for i, position in enumerate(logits_positions[row]):
                logits[row, i] = logits_after(cache.slots[row, :start + position + 1], self.vocab)
        return logits

    def _recur(self, input_ids, write_index, logits_positions, states, counts, logits) -> np.ndarray:
        assert input_ids.shape[1] <= self.chunk
        (kept,), read = states.arrays, states.begin(write_index)
        for row, (start, count) in enumerate(zip(write_index, counts)):
            tokens = np.concatenate([kept[read[row], row, :start], input_ids[row, :count]])
            kept[1 - states.copy[row], row, :len(tokens)] = tokens
            assert (logits_positions[row] < count).all(), "logits after padding"
            for i, position in enumerate(logits_positions[row]):
                logits[row, i] = logits_after(tokens[:start + position + 1], self.vocab)
        states.end(write_index, counts)
        return logits

    def close(self) -> None:
        self.closed = True
