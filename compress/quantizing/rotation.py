"""Rotate the value space of every head, folded into the weights: outliers among a head's channels are spread over all.

    rotate_values(layer)              # rewrites v and o in place; the layer's function stays

For each value head, rows of v become R v and the columns of o in every head that reads it become o R^T, R orthogonal:
a Hadamard matrix with random signs where head_dim is a power of two, else a random rotation. The softmax mixes tokens,
not channels, so R passes through it. The space inside a gated MLP cannot be rotated so: its gate multiplies channel by
channel.

Sources: Ashkboos et al. 2024, "QuaRot"; Tseng et al. 2024, "QuIP#" (Hadamard with random signs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.network.decoder import Layer


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], float32: Hadamard with random signs for powers of two, else random."""
    if size & (size - 1):
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return (q * r.diagonal().sign()).float()              # signs make the distribution uniform (Haar)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return matrix * signs / size**0.5


@torch.no_grad()
def rotate_values(layer: Layer, walk=None, formats=None, seed: int = 0) -> None:
    """Rotate the value space of each head of `layer` in place; a fold that looks at no data."""
    attention = layer.self_attn
    size, generator = attention.head_dim, torch.Generator().manual_seed(seed)
    values, heads = attention.v_proj.out_features // size, attention.o_proj.in_features // size
    turns = torch.stack([rotation(size, generator) for _ in range(values)])                   # [values, D, D]
    rows = attention.v_proj.weight.view(values, size, -1)
    attention.v_proj.weight.copy_((turns @ rows).flatten(0, 1))
    if attention.v_proj.bias is not None:
        attention.v_proj.bias.copy_((turns @ attention.v_proj.bias.view(values, size, 1)).flatten())
    columns = attention.o_proj.weight.view(-1, heads, size)
    read = turns.repeat_interleave(heads // values, 0)
    attention.o_proj.weight.copy_(torch.einsum("nhd,hed->nhe", columns, read).flatten(1))
