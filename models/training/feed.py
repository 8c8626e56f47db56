"""Batches for the trainer: counted on the host, the next one prepared while the device works on this one.

    feed = Feed(rows, pack, options, processes=1, index=0, ahead=True)
    batch = feed.batch(step, micro=8)                       # pieces of 8 rows, their labels counted
    tensors = [send(part, device) for part in batch.pieces[0]]

A batch is a function of (seed, step) alone, so preparing it early changes nothing, and a run that is resumed has the same ones.
Rows of several lengths go short ones first, and are cut where that costs the device least: what stands in a row behind its end is
computed all the same, and beginning a piece costs as much as some tokens do. How a batch is cut changes nothing but the order of sums.

Rows that a model writes (`fresh`) depend on its weights and are made when they are due. A thread is enough: reading rows is numpy,
and what the main thread does meanwhile is to tell the device what to do. Nothing of it touches the device but `send`, whose copy
goes through page-locked memory and is not waited for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from models.data.corpus import IGNORE, batch_indices
from models.network.cache import sent
from models.training.options import TrainerOptions


class Rows(Protocol):
    lengths: np.ndarray | None           # tokens of each row; None where all are alike
    # fresh = True                       # where rows depend on the weights

    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]: ...


@dataclass(frozen=True)
class Batch:
    """One process's share of the batch of a step, on the host."""

    indices: np.ndarray                          # rows of the whole batch, of all processes
    pieces: list[tuple[np.ndarray, ...]]         # what the loss wants of each micro-batch
    labels: int
    tokens: int                                  # padding among them


class Feed:
    def __init__(self, rows: Rows, pack: Callable, options: TrainerOptions, processes: int, index: int, ahead: bool, begun: int = 0):
        """pack: what of (input_ids, labels, ...) the loss wants. ahead: prepare the next batch in a thread. begun: see `cut`."""
        self.rows, self.pack, self.options, self.processes, self.index, self.begun = rows, pack, options, processes, index, begun
        self.thread = ThreadPoolExecutor(1, "feed") if ahead and not getattr(rows, "fresh", False) else None
        self.coming: tuple[tuple[int, int], Future] | None = None

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of a step in pieces of at most `micro` rows."""
        coming, self.coming = self.coming, None
        found = coming[1].result() if coming and coming[0] == (step, micro) else self._prepared(step, micro)
        if self.thread and step + 1 < self.options.steps:
            self.coming = (step + 1, micro), self.thread.submit(self._prepared, step + 1, micro)
        return found

    def _prepared(self, step: int, micro: int) -> Batch:
        indices = batch_indices(len(self.rows), self.options.batch, self.options.seed, step)
        share = len(indices) // self.processes
        pieces = [self.rows.rows(part) for part in cut(self.rows, indices[self.index * share:][:share], micro, self.begun)]
        return Batch(indices, list(map(self.pack, pieces)), sum(map(labels_of, pieces)), sum(piece[0].size for piece in pieces))


def cut(rows: Rows, indices: np.ndarray, micro: int, begun: int = 0) -> list[np.ndarray]:
    """The indices in pieces of at most `micro`, short rows first.

    begun: tokens that the device computes in the time in which it is told of a piece; with 0, pieces are as large as they may be.
    """
    if rows.lengths is None:
        return [indices[start:start + micro] for start in range(0, len(indices), micro)]
    order = indices[np.argsort(rows.lengths[indices], kind="stable")]
    stops = list(range(micro, len(order), micro)) + [len(order)]
    if begun:
        stops = _cheapest(rows.lengths[order], micro, begun)
    return [order[start:stop] for start, stop in zip([0, *stops], stops)]


def _cheapest(lengths: np.ndarray, micro: int, begun: int) -> list[int]:
    """Where to cut rows of ascending lengths, so that the sum over pieces of begun + rows x longest is the least."""
    costs, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=int)       # of the first n rows; their last piece's start
    for stop in range(1, len(lengths) + 1):
        first = np.arange(max(0, stop - micro), stop)
        found = costs[first] + begun + (stop - first) * lengths[stop - 1]
        starts[stop] = first[found.argmin()]
        costs[stop] = found.min()
    stops = [len(lengths)]
    while starts[stops[0]]:
        stops.insert(0, int(starts[stops[0]]))
    return stops


def labels_of(rows: tuple[np.ndarray, ...]) -> int:
    return int((rows[1] != IGNORE).sum())


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; the copy is queued there after what it has to do already."""
    return sent(torch.from_numpy(array), device)


def later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Asks for values [n] of the device; what is returned gives them, and waits for the device only as far as to where it was asked."""
    cuda = values.device.type == "cuda"
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=cuda)
    held.copy_(values, non_blocking=True)
    reached = torch.cuda.Event() if cuda else None
    if reached:
        reached.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        if reached:
            reached.synchronize()
        return held.tolist()
    return read
