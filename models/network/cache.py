"""What the PyTorch decoder keeps of the tokens it has seen: keys and values by slot, and the states of recurrent layers.

A `runtime.backend.Cache` in everything but its storage: see there for what truncate, snapshot and restore promise.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.network.activations import fake_int8
from models.network.config import ModelConfig
from runtime.errors import UserError


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on its way to a device, which the host does not wait for: a plain copy would wait for all work before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()                 # a copy, which nobody changes while it travels
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


class KVCache:
    """Per layer with keys of its own: keys and values [rows, kv_heads, capacity, head_dim] of `rows` sequences; per recurrent layer its
    state, float32 [rows, ...], by the names of `ModelConfig.state_shapes`.

    `lengths` int64 [rows] counts the filled slots of each row; the forward pass does not touch it. `scales`, one (keys',
    values') pair a layer, float32 [1] or [kv_heads * head_dim], makes it hold the values of an int8 cache.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", scales: list[tuple[Tensor, Tensor] | None] | None = None):
        shapes = [(rows, config.cache_heads(layer), capacity, config.head_size(layer)) for layer in config.layers]
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in "kv")
        self.states, self.older = ([{name: torch.zeros(rows, *shape, device=device) for name, shape in config.state_shapes(layer).items()}
                                    for layer in config.layers] for _ in "ab")
        self.lengths, self.scales, self._capacity = np.zeros(rows, np.int64), scales, capacity
        self.recurrent, self.held, self.before = config.recurrent, np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        states = [t for states in (self.states, self.older) for state in states for t in state.values()]
        return sum(t.nbytes for t in self.keys + self.values + states)

    def begin(self, first: np.ndarray, width: int, counts: np.ndarray | None) -> int:
        """Before a call that writes from slot `first` [rows] on: rows that begin anew have no state, others that of their tokens.

        Gives how many slots there are to look at: one more than the last that is written.
        """
        filled = int(first.max()) + width
        if filled > self.capacity:
            raise ValueError(f"slot {filled - 1} is beyond the cache's capacity of {self.capacity}")
        if not self.recurrent:
            return filled
        if (wrong := (first != self.held) & (first > 0)).any():
            row = int(wrong.nonzero()[0][0])
            raise UserError(f"row {row} goes on at slot {first[row]}, and its state is that of {self.held[row]} tokens: restore a snapshot")
        new = np.flatnonzero(first == 0).tolist()
        for number, state in enumerate(self.states):
            for name, tensor in state.items():
                self.older[number][name].copy_(tensor)
                for row in new:
                    tensor[row].zero_()
        self.before[:] = self.held * (first > 0)
        self.held[:] = first + (width if counts is None else counts)
        return filled

    def truncate(self, row: int, length: int) -> None:
        """Forget the slots of `row` from `length` on; raises UserError where a recurrent state of that length is not held."""
        length = min(int(self.lengths[row]), length)
        if self.recurrent and length not in (0, self.held[row]):
            if length != self.before[row]:
                raise UserError(f"row {row} cannot be cut to {length} tokens: its state is that of {self.held[row]}; take a snapshot before")
            for new, old in zip(self.states, self.older):
                for name in new:
                    new[name][row] = old[name][row]
            self.held[row] = length
        self.lengths[row] = length

    def snapshot(self, row: int) -> tuple[int, int, list[dict[str, Tensor]]]:
        """What `restore` needs to bring `row` back to where it is."""
        return int(self.lengths[row]), int(self.held[row]), [{name: t[row].clone() for name, t in state.items()} for state in self.states]

    def restore(self, row: int, snapshot: tuple[int, int, list[dict[str, Tensor]]]) -> None:
        self.lengths[row], self.held[row], states = snapshot
        self.before[row] = -1
        for state, taken in zip(self.states, states):
            for name in state:
                state[name][row] = taken[name]

    def fork(self, source: int, target: int) -> None:
        states = [t for states in (self.states, self.older) for state in states for t in state.values()]
        for tensor in (*self.keys, *self.values, *states, self.lengths, self.held, self.before):
            tensor[target] = tensor[source]

    def view(self, start: int, stop: int) -> KVCache:
        part = copy.copy(self)
        part.keys, part.values = ([t[start:stop] for t in tensors] for tensors in (self.keys, self.values))
        part.states, part.older = ([{name: t[start:stop] for name, t in state.items()} for state in states]
                                   for states in (self.states, self.older))
        part.lengths, part.held, part.before = (numbers[start:stop] for numbers in (self.lengths, self.held, self.before))
        return part

    def grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self.keys, self.values = ([F.pad(t, (0, 0, 0, more)) for t in tensors] for tensors in (self.keys, self.values))
        self._capacity = capacity

    def append(self, layer: int, slots: Tensor, filled: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Store a layer's new keys and values [b, kv_heads, s, head_dim] in int64 `slots` [b, s]; both up to slot `filled`."""
        held = []
        for number, (x, storage) in enumerate(((keys, self.keys[layer]), (values, self.values[layer]))):
            if self.scales is not None:
                scale = self.scales[layer][number]
                x = fake_int8(x, scale.view(-1, 1, x.shape[3] if len(scale) > 1 else 1))
            storage.scatter_(2, slots[:, None, :, None].expand_as(x), x.to(storage.dtype))
            held.append(storage[:, :, :filled].to(x.dtype))
        return held
