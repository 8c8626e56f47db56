"""The decoder as a `runtime.backend.Backend`: PyTorch computes, everything above that interface stays the same.

Evaluation and verification read logits and generate through one interface, so a checkpoint here and a bundle in
`runtime` run the same code and differ in nothing but who multiplies. Not for serving: the runtime never imports it.
"""

from __future__ import annotations

import numpy as np
import torch

from models.network.decoder import Decoder, KVCache


class TorchCache:
    """A `runtime.backend.Cache` over a decoder's KVCache; a view shares its storage."""

    def __init__(self, config, rows: int, capacity: int, storage: KVCache | None = None, scales=None):
        self.config, self.rows, self.capacity = config, rows, capacity
        self.storage = storage if storage is not None else KVCache(config, rows, capacity, scales=scales)
        self.lengths = self.storage.lengths.numpy()         # shared memory: both count the same slots

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.storage.keys + self.storage.values)

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(self.lengths[row], length)

    def fork(self, source: int, target: int) -> None:
        for tensor in self.storage.keys + self.storage.values:
            tensor[target] = tensor[source]
        self.lengths[target] = self.lengths[source]

    def view(self, start: int, stop: int) -> TorchCache:
        part = object.__new__(KVCache)
        part.rows, part.capacity = stop - start, self.capacity
        part.keys = [t[start:stop] for t in self.storage.keys]
        part.values = [t[start:stop] for t in self.storage.values]
        part.lengths, part.scales = self.storage.lengths[start:stop], self.storage.scales
        return TorchCache(self.config, stop - start, self.capacity, part)

    def grow(self, capacity: int) -> None:
        larger = KVCache(self.config, self.rows, capacity, scales=self.storage.scales)
        for new, old in zip(larger.keys + larger.values, self.storage.keys + self.storage.values):
            new[:, :, :self.capacity] = old
        larger.lengths.copy_(self.storage.lengths)
        self.__init__(self.config, self.rows, capacity, larger)


class TorchBackend:
    """Runs a `Decoder` in float32 on the CPU. See `runtime.backend.Backend` for the contract."""

    name = "pytorch-cpu"
    max_chunk_rows = None

    def __init__(self, decoder: Decoder):
        self.decoder = decoder.eval()

    def cache_bytes(self, rows: int, capacity: int) -> int:
        config = self.decoder.config
        return 2 * 4 * rows * capacity * config.head_dim * sum(layer.kv_heads for layer in config.layers)

    def new_cache(self, rows: int, capacity: int) -> TorchCache:
        return TorchCache(self.decoder.config, rows, capacity, scales=self.decoder.cache_scales)

    @torch.inference_mode()
    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: TorchCache) -> np.ndarray:
        ids, positions, index, wanted = (torch.from_numpy(np.ascontiguousarray(a, np.int64))
                                         for a in (input_ids, position_ids, write_index, logits_positions))
        return self.decoder(ids, positions, cache.storage, index, wanted).numpy()

    def close(self) -> None:
        self.decoder = None
