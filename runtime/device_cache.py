"""A KV cache in a GPU's memory, for every backend that has one: what is copied stays on the device, on the backend's stream.

One buffer [rows, kv_heads, capacity, head_dim] for each layer and key or value, zeroed: what no token has written yet must not
be NaN, since 0 x NaN is NaN. A row's slots of one buffer are one block, those of one head another: `fork` copies blocks of a
row, `grow` and `adopt` blocks of a head. Only `read` and `write`, whose bytes are the caller's, pass through host memory: the slots of
all heads are gathered on the device first, so that one transfer carries them.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np

from .backend import Cache
from .cuda_device import Block, Device
from .errors import DeviceError


_MOST_BYTES = 16 << 20            # that are carried at once, unless a single buffer has more


class DeviceBackend(Protocol):
    """What a cache asks of its backend."""

    device: Device
    caches: list[tuple[str, int, int]]           # of each buffer: the input it is bound to, heads, numbers a head
    item_bytes: int                              # of a number
    bounce: Block | None                         # memory that slots pass through on their way to the host and back

    def capacity_for(self, capacity: int) -> int:
        """Slots that a cache gets where `capacity` are asked for."""

    def new_storage(self, rows: int, capacity: int) -> Storage:
        """Zeroed buffers. Raises DeviceError where they do not fit."""


class DeviceCache(Cache):
    """Its storage is a `Storage`, or what has one's addresses and sizes."""

    def address(self, index: int) -> int:
        """Where the first row of buffer `index` (in the order of the backend's caches) begins."""
        return self.storage.addresses[index] + self.start * self.storage.row_bytes[index]

    def _copy_slots(self, source: int, target: int) -> None:
        device = self.backend.device
        with device.turn:
            for index, size in enumerate(self.storage.row_bytes):
                begin = self.address(index)
                device.copy_blocks(begin + target * size, size, begin + source * size, size, size, 1)

    def _adopt_slots(self, other: DeviceCache, source: int, row: int, stop: int) -> None:
        device, item = self.backend.device, self.backend.item_bytes
        with device.turn:
            for index, (_, heads, size) in enumerate(self.backend.caches):
                there = other.address(index) + source * other.storage.row_bytes[index]
                here = self.address(index) + row * self.storage.row_bytes[index]
                device.copy_blocks(here, self.capacity * size * item, there, other.capacity * size * item, stop * size * item, heads)

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        size = sum(width * heads for group in self._groups(stop - first) for _, width, heads in group)
        found = np.empty(size, np.uint8) if out is None else out
        self._through_host(row, first, stop, found, False)
        return found

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        self._through_host(row, first, stop, data, True)

    def _through_host(self, row: int, first: int, stop: int, data: np.ndarray, there: bool) -> None:
        """Slots of a row to `data`, or (there) from it."""
        done = 0
        with self.backend.device.turn:
            for group in self._groups(stop - first):
                size = sum(width * heads for _, width, heads in group)
                self._carry(group, row, first, stop, data[done:done + size], there)
                done += size

    def _carry(self, group: list[tuple[int, int, int]], row: int, first: int, stop: int, data: np.ndarray, there: bool) -> None:
        """The same of a group of buffers, gathered on the device, so that one transfer carries them. No other frame refers to the memory
        that they pass through: it is freed by who has the turn."""
        device, block = self.backend.device, self._bounce(data.size)
        image, at = block.host["bytes"][:data.size], block.addresses["bytes"]
        if there:
            image[:] = data
            device.upload(at, image)
        for index, width, heads in group:
            slot = width // (stop - first)
            place = self.address(index) + row * self.storage.row_bytes[index] + first * slot, self.capacity * slot
            target, source = (place, (at, width)) if there else ((at, width), place)
            device.copy_blocks(*target, *source, width, heads)
            at += width * heads
        if not there:
            device.download(image, block.addresses["bytes"])
        device.synchronize()
        if not there:
            data[:] = image

    def _groups(self, slots: int) -> list[list[tuple[int, int, int]]]:
        """Buffers that are carried together: of each its index, the bytes of a head's slots, and the heads."""
        groups, size = [[]], 0
        for index, (_, heads, numbers) in enumerate(self.backend.caches):
            width = slots * numbers * self.backend.item_bytes
            if size and size + width * heads > _MOST_BYTES:
                groups.append([])
                size = 0
            groups[-1].append((index, width, heads))
            size += width * heads
        return groups

    def _bounce(self, size: int) -> Block:
        """Memory on both sides, of whoever has the turn: to have it anew each time would cost more than to fill it."""
        backend = self.backend
        if backend.bounce is None or backend.bounce.host["bytes"].size < size:
            backend.bounce = None                 # freed before there is more
            backend.bounce = Block(backend.device, {"bytes": ((size,), np.uint8)})
        return backend.bounce

    def grow(self, capacity: int) -> None:
        backend, larger = self.backend, self.backend.capacity_for(capacity)
        if larger <= self.capacity:
            return
        with backend.device.turn:
            storage = backend.new_storage(self.rows, larger)
            for (_, heads, size), source, target in zip(backend.caches, self.storage.addresses, storage.addresses):
                old, new = (slots * size * backend.item_bytes for slots in (self.capacity, larger))
                backend.device.copy_blocks(target, new, source, old, old, self.rows * heads)
            backend.device.synchronize()          # before the old storage is freed
        self.capacity, self.storage = larger, storage


class Storage:
    """Zeroed device buffers of a cache, freed with the last reference. kept: what the backend keeps with their addresses."""

    def __init__(self, backend: DeviceBackend, rows: int, capacity: int):
        self.rows, self.capacity, self.kept = rows, capacity, {}
        self._device, self.addresses = backend.device, []
        self.row_bytes = [heads * capacity * size * backend.item_bytes for _, heads, size in backend.caches]
        try:
            for size in self.row_bytes:
                self.addresses.append(self._device.allocate(rows * size))
            self.zero()
        except DeviceError as error:
            self.free()
            raise DeviceError(f"the KV cache of {rows} x {capacity} tokens ({rows * sum(self.row_bytes) / 1e6:.0f} MB) "
                              f"does not fit the GPU: {error}") from None

    def zero(self) -> None:
        for address, size in zip(self.addresses, self.row_bytes):
            self._device.zero(address, self.rows * size)

    def free(self) -> None:
        addresses, self.addresses = self.addresses, []
        for address in addresses:
            self._device.free(address)

    def __del__(self):
        self.kept.clear()
        with contextlib.suppress(DeviceError):    # the device is gone, and its memory with it
            self.free()
