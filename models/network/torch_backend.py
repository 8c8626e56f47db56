"""The decoder as a `runtime.backend.Backend`: PyTorch computes, everything above that interface stays the same.

Evaluation and verification read logits and generate through one interface, so a checkpoint here and a bundle in
`runtime` run the same code and differ in nothing but who multiplies. Not for serving: the runtime never imports it.
"""

import math

import numpy as np
import torch

from models.network.cache import KVCache
from models.network.decoder import Decoder


class TorchBackend:
    """Runs a `Decoder` in float32 on the CPU. See `runtime.backend.Backend` for the contract."""

    name = "pytorch-cpu"
    max_chunk_rows = chunk = None

    def __init__(self, decoder: Decoder, context: int | None = None):
        """context: of the bundle that the decoder is compared with, if there is one."""
        self.decoder = decoder.eval()
        decoder.model.context = context

    def cache_bytes(self, rows: int, capacity: int) -> int:
        config = self.decoder.config
        slots = sum(config.cache_heads(layer) * config.head_size(layer) for layer in config.layers) * capacity
        states = sum(math.prod(shape) for layer in config.layers for shape in config.state_shapes(layer).values())
        return 2 * 4 * rows * (slots + states)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.decoder.config, rows, capacity, scales=self.decoder.cache_scales)

    @torch.inference_mode()
    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: KVCache, counts=None) -> np.ndarray:
        ids, positions, index, wanted, counts = (None if a is None else torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in (
            input_ids, position_ids, write_index, logits_positions, counts))
        return self.decoder(ids, positions, cache, index, wanted, counts).numpy()

    def close(self) -> None:
        self.decoder = None
