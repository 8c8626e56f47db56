"""The decoder as a `runtime.backend.Backend`: PyTorch computes, everything above that interface stays the same.

Evaluation and verification read logits and generate through one interface, so a checkpoint here and a bundle in
`runtime` run the same code and differ in nothing but who multiplies. Not for serving: the runtime never imports it.

It computes where the decoder is. What a call writes is known to the host, which waits for a device once a call: for the logits,
or, where all rows are decoded greedily, for the likeliest token of each.
"""

import math

import numpy as np
import torch
from torch import Tensor

from models.network.cache import KVCache, sent
from models.network.decoder import Decoder
from runtime import decode
from runtime.sampling import Sampler


class TorchBackend:
    """Runs a `Decoder` in float32 on its device. See `runtime.backend.Backend` for the contract."""

    max_chunk_rows = chunk = None

    def __init__(self, decoder: Decoder, context: int | None = None):
        """context: of the bundle that the decoder is compared with, if there is one."""
        self.decoder = decoder.eval()
        self.device = decoder.model.embed_tokens.weight.device
        self.name = f"pytorch-{self.device.type}"
        decoder.model.context = context

    def cache_bytes(self, rows: int, capacity: int) -> int:
        config = self.decoder.config
        slots = sum(config.cache_heads(layer) * config.head_size(layer) for layer in config.layers) * capacity
        states = sum(math.prod(shape) for layer in config.layers for shape in config.state_shapes(layer).values())
        return 2 * 4 * rows * (slots + states)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.decoder.config, rows, capacity, device=self.device, scales=self.decoder.cache_scales)

    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: KVCache, counts=None) -> np.ndarray:
        return self._run(input_ids, position_ids, write_index, logits_positions, cache, counts).cpu().numpy()

    def step_rows(self, cache: KVCache, tokens: np.ndarray, samplers: list[Sampler]) -> list[tuple[np.ndarray, np.ndarray]] | np.ndarray:
        """Append one token (int64 [rows]) to every row of `cache`. Of each row the id and the logit of the likeliest next token, as
        `Sequence.accept` takes them, where every sampler is content with that; else all logits [rows, vocab]."""
        if any(sampler.candidates != 1 or sampler.penalties(self.decoder.config.vocab_size) for sampler in samplers):
            return decode.step(self, cache, tokens)
        first = np.zeros((len(tokens), 1), np.int64)
        logits = self._run(tokens[:, None], cache.lengths[:, None], cache.lengths, first, cache)[:, 0]
        cache.lengths += 1
        best = logits.max(-1)
        found = torch.stack((best.indices.double(), best.values.double())).cpu().numpy()       # float64 holds both: one read
        return list(zip(found[0, :, None].astype(np.int64), found[1, :, None].astype(np.float32)))

    @torch.no_grad()
    def _run(self, input_ids, position_ids, write_index, logits_positions, cache: KVCache, counts=None) -> Tensor:
        """`forward`, whose logits stay on the device."""
        ids, positions, index, wanted, counts = (None if a is None else torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in (
            input_ids, position_ids, write_index, logits_positions, counts))
        ids, positions, wanted = (sent(part, self.device) for part in (ids, positions, wanted))
        return self.decoder(ids, positions, cache, index, wanted, counts)

    def close(self) -> None:
        self.decoder = None
