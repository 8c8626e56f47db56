"""What an engine must do to serve the runtime: run rows of tokens, and keep their KV cache.

The decode loop, sampling, speculation, batching and serving are written once above this interface. It deals in token
ids and cache slots and knows nothing of text. ONNX Runtime (`ort_backend.py`) is the reference implementation.

Cache slots. A cache has `rows` independent sequences of at most `capacity` tokens. Slot i of a row holds the key and
value of its token at position i. `forward` writes token j of row r into slot `write_index[r] + j`; a token attends to
slots whose index is at most its own position (and greater than position - window, where the model has a sliding
window). Right padding is therefore harmless: what padding wrote lies beyond the row's length and is overwritten by the
next real token before anything may look at it. `lengths` says how many slots of each row are real; `forward` does not
touch it, because only the caller knows which tokens were padding or will be rejected.

Recurrent layers (short convolution, gated delta rule, Mamba-2) keep a state that stands for all tokens of a row and cannot
be cut back. Two copies of it are kept, which change places with every call: so a row may go on where it is, go back to
where it was before its last call, or begin anew at slot 0; from any other place it is refused. `snapshot` and `restore`
keep further places. Padding must not touch the state: `forward` is told how many tokens of each row are real.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import UserError

BLOCK = 16                        # slots that are read and written at once


class States:
    """The states of a model's recurrent layers, of several rows.

    arrays: float32 [2, rows, ...] of any number of parts; copy: int64 [rows], which of the two copies is the present one;
    held, before: int64 [rows], how many tokens the present one and the other one stand for (before -1: for nothing).
    """

    def __init__(self, arrays: list[np.ndarray], marks: np.ndarray | None = None):
        self.arrays, self.marks = arrays, np.zeros((3, arrays[0].shape[1]), np.int64) if marks is None else marks
        self.held, self.before, self.copy = self.marks

    def view(self, start: int, stop: int) -> States:
        return States([array[:, start:stop] for array in self.arrays], self.marks[:, start:stop])

    def begin(self, write_index: np.ndarray) -> np.ndarray:
        """Which copy (int64 [rows], -1: zeros) a call from slots write_index [rows] on reads; it writes the other one than
        `copy`. Raises UserError where a row's state does not stand for the tokens before."""
        for row in np.flatnonzero((write_index != self.held) & (write_index != 0)):
            raise UserError(f"row {row} cannot go on at slot {write_index[row]}: the state of its recurrent layers stands for "
                            f"{self.held[row]} tokens; restore a snapshot taken there")
        self.before[:] = -1
        return np.where(write_index == 0, -1, self.copy)

    def on_one_side(self, write_index: np.ndarray) -> int:
        """`begin` for who reads all rows from one copy: brings there what is in the other, and zeros. Gives that copy."""
        read, side = self.begin(write_index), int(self.copy[0])
        for row in np.flatnonzero(read != side):
            if read[row] < 0:
                self.held[row] = 0
            for array in self.arrays:
                array[side, row] = 0 if read[row] < 0 else array[read[row], row]
            self.copy[row] = side
        return side

    def end(self, write_index: np.ndarray, counts: np.ndarray) -> None:
        """The call has added `counts` [rows] tokens: where it added any, the copies change places."""
        moved = counts > 0
        self.before[moved], self.held[moved] = write_index[moved], (write_index + counts)[moved]
        self.copy[moved] ^= 1

    def truncate(self, row: int, length: int) -> None:
        """Back to `length` tokens, which must be those it stands for, those before the last call, or none."""
        if length == self.before[row]:
            self.held[row], self.before[row] = self.before[row], self.held[row]
            self.copy[row] ^= 1
        elif length == 0:
            self.held[row] = 0                    # a call from slot 0 on reads no copy
        elif length != self.held[row]:
            raise UserError(f"row {row} cannot go back to {length} tokens: the state of its recurrent layers stands for "
                            f"{self.held[row]} (before the last call: {self.before[row]}); take a snapshot at {length} and restore it")

    def fork(self, source: int, target: int) -> None:
        for array in (*self.arrays, self.marks):
            array[:, target] = array[:, source]


@dataclass(frozen=True)
class Snapshot:
    """A place that a row may go back to: its tokens, and what its recurrent layers kept (nothing of attention alone)."""

    length: int
    states: tuple[np.ndarray, ...] = ()


class Cache(ABC):
    """What several rows keep: keys and values, and the states of recurrent layers. A view shares storage, lengths and states
    of the rows it shows."""

    def __init__(self, backend: Backend, storage, capacity: int, lengths: np.ndarray, start: int = 0,
                 states: States | None = None):
        """storage: what the backend keeps keys and values in, of any number of rows. This cache shows those from `start`
        on; lengths: int64 [rows], their filled slots, which the caller advances; states: of recurrent layers, of these rows."""
        self.backend, self.storage, self.capacity, self.lengths, self.start = backend, storage, capacity, lengths, start
        self.states = states

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of storage this cache (or view) spans."""
        return self.backend.cache_bytes(self.rows, self.capacity)

    def truncate(self, row: int, length: int) -> None:
        """Forget the slots of `row` from `length` on (free of cost: only the length changes). Raises UserError where recurrent
        layers cannot go back there."""
        length = min(length, int(self.lengths[row]))
        if self.states:
            self.states.truncate(row, length)
        self.lengths[row] = length

    def snapshot(self, row: int) -> Snapshot:
        """The place where `row` is, to come back to with `restore`."""
        if not self.states:
            return Snapshot(int(self.lengths[row]))
        copy = self.states.copy[row]
        return Snapshot(int(self.states.held[row]), tuple(array[copy, row].copy() for array in self.states.arrays))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Back to a snapshot of this row, whose slots are as they were. Raises UserError where they are not there."""
        states, length = self.states, snapshot.length
        if length > self.lengths[row] or bool(states) != bool(snapshot.states):
            raise UserError(f"a snapshot of {length} tokens cannot be restored to a row that holds {self.lengths[row]}, or of another model")
        if states:
            for array, kept in zip(states.arrays, snapshot.states, strict=True):
                array[states.copy[row], row] = kept
            states.held[row] = length
        self.lengths[row] = length

    def view(self, start: int, stop: int) -> Cache:
        """The rows start..stop-1 as a cache of their own, over the same storage."""
        return type(self)(self.backend, self.storage, self.capacity, self.lengths[start:stop], self.start + start,
                          self.states and self.states.view(start, stop))

    def fork(self, source: int, target: int) -> None:
        """Copy row `source`, slots, states and length, over row `target`."""
        if source != target:
            self._copy_slots(source, target)
            if self.states:
                self.states.fork(source, target)
        self.lengths[target] = self.lengths[source]

    def adopt(self, other: Cache, source: int, row: int) -> None:
        """Copy row `source` of another cache of this backend, slots, states and length, over `row` of this one, which has as many slots."""
        length = int(other.lengths[source])
        self.truncate(row, 0)
        if length:
            self._adopt_slots(other, source, row, -(-length // BLOCK) * BLOCK)
            self.lengths[row] = length
            self.restore(row, other.snapshot(source))

    def _adopt_slots(self, other: Cache, source: int, row: int, stop: int) -> None:
        """The first `stop` slots."""
        self.write(row, 0, stop, other.read(source, 0, stop))

    @abstractmethod
    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """The slots first..stop-1 of `row`, both multiples of BLOCK, as bytes: uint8 [n] (`out`, if given), as many for every cache
        of this backend. What they hold is the backend's own matter."""

    @abstractmethod
    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        """Put back what `read` gave, to any row of any cache of this backend that has these slots. `lengths` stay as they are."""

    @abstractmethod
    def _copy_slots(self, source: int, target: int) -> None:
        """The filled slots of row `source` over those of row `target`."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Enlarge every row to `capacity` slots, keeping what they hold. Not on a view; take views anew afterwards."""


class Backend(Protocol):
    """One opened model on one device."""

    name: str                    # "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "native"
    max_chunk_rows: int | None   # rows that may take several new tokens on top of a filled cache; None: any number
    # (GroupQueryAttention: 1. Steps of one token, and prompts into empty rows, always batch.)
    chunk: int | None            # most tokens of a row in one call; None: any number. decode.py brings longer prompts in chunks

    def cache_bytes(self, rows: int, capacity: int) -> int:
        """Bytes that `new_cache(rows, capacity)` will allocate."""

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache. Raises UserError where the backend has no such capacity (a TensorRT engine's is fixed)."""

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: Cache, counts: np.ndarray | None = None) -> np.ndarray:
        """Run the rows of `cache` one step and update it in place.

        input_ids, position_ids: int64 [b, s], right-padded; b == cache.rows. Positions of row r are
            write_index[r] + 0..s-1 (padding included).
        write_index: int64 [b], the slot where each row's first token goes; write_index + s <= cache.capacity.
        logits_positions: int64 [b, k], indices into s whose logits are wanted.
        counts: int64 [b], how many tokens of each row are real (None: all); recurrent layers need it where there is padding.
        Returns float32 logits [b, k, vocab]: a buffer, valid until the next call with this cache.
        Threads may call at once, each with caches of its own. Raises DeviceError once the backend was closed.
        """

    # A backend may also have `step_rows(cache, tokens, samplers)`, a step that finds the likely next tokens itself, with it
    # `within(work)`, which gives work() of several such steps, run where they cost least, and `check_rows(cache, feeds, firsts,
    # samplers)`, the same of a different number of tokens a row (see native/backend.py); and `free_memory()`, bytes that caches may
    # take where that is not the host's memory.

    def close(self) -> None:
        """Free the device's memory, once the calls that run have ended; none begins after. Closing again does nothing."""
