"""What all calibration windows are within a model, kept where it fits: on the device, in page-locked memory, or in a file.

    home = home_for(needed_bytes, device)                  # "device", "memory" or "file"
    x = Parts(room((windows, tokens, width), home, device), rows=4, device=device)
    for number, part in enumerate(x):                      # each is on the device
        x.put(number, part * 2)

Work is done on the device, a part of some rows at a time, so it needs memory for one part whatever the text's length. Where
the home is the device, parts are views and `put` of a part changed in place copies nothing. Elsewhere a part travels for its
turn: page-locked memory, because a GPU reads and writes it without the processor's help. PyTorch rounds such memory up to a power
of two, so there must be twice as much.
"""

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from models.device import free_bytes
from runtime.errors import UserError
from runtime.machine import available_memory

SHARE = 0.8                  # of what is free, that activations may take


def home_for(needed: int, device: torch.device, beside: int = 0) -> str:
    """Where `needed` bytes of activations fit; beside: bytes that the work on the device takes besides."""
    if (free := free_bytes(device)) is None or needed + beside <= SHARE * free:
        return "device"
    free = available_memory()
    return "memory" if device.type != "cpu" and (free is None or 2 * needed <= SHARE * free) else "file"


def room(shape: tuple[int, ...], home: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of unknown content in its home. Raises UserError where the disk has no room for it."""
    if home == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if home == "memory":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        except RuntimeError:                     # more than the system lets a process lock: parts travel slower
            return torch.empty(shape, dtype=dtype)
    size = max(1, math.prod(shape)) * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="activations-") as file:         # gone from the folder, it lasts as long as its mapping
        try:
            if hasattr(os, "posix_fallocate"):   # else a write to a disk that is full ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            torch_file = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{tempfile.gettempdir()} has no room for {size / 1e9:.1f} GB of activations ({error}): choose fewer windows, or "
                            "set TMPDIR to a larger disk") from None
    return torch_file.view(shape)


class Parts(Sequence):
    """Rows of a tensor [n, ...] at home, as parts [rows, ...] on the device.

    chosen: int64 [m], which of the tensor's rows they are, in this order; None: all. Of chosen ones, parts are copies.
    """

    def __init__(self, home: Tensor, rows: int, device: torch.device, chosen: Tensor | None = None):
        self.home, self.size, self.device, self.chosen = home, rows, device, None if chosen is None else chosen.to(home.device)

    def __len__(self) -> int:
        return -(-len(self.home if self.chosen is None else self.chosen) // self.size)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self.home[self._rows(at % len(self))].to(self.device, non_blocking=True)

    def put(self, at: int, part: Tensor) -> None:
        """Make `part` the content of part `at`; one that is a view of it already is there."""
        if self.chosen is not None:
            self.home[self._rows(at)] = part.to(self.home.device)
            return
        here = self.home[self._rows(at)]
        if here.device != part.device or here.data_ptr() != part.data_ptr():
            here.copy_(part)                     # straight into page-locked memory, and done when this returns

    def _rows(self, at: int) -> slice | Tensor:
        part = slice(at * self.size, (at + 1) * self.size)
        return part if self.chosen is None else self.chosen[part]

    def reshaped(self, *shape: int, rows: int) -> "Parts":
        """The same numbers, cut otherwise."""
        return Parts(self.home.view(*shape), rows, self.device)
