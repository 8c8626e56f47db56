"""Rotate the value space of every head, folded into the weights: outliers among a head's channels are spread over all.

    rotate_values(layer, seed)        # rewrites v and o in place; the layer's function stays

For each value head, rows of v become R v and the columns of o in every head that reads it become o R^T, R orthogonal:
a Hadamard matrix with random signs where head_dim is a power of two, else a random rotation. The softmax mixes tokens,
not channels, so R passes through it.

`rotate_stream(checkpoint)` does the same to the residual stream of a model with RMSNorm and an untied head: gains are
folded into the linears after them, every matrix that reads the stream is multiplied by R^T and every one that writes it
by R. A tied head is refused: its table is read before the final norm's gain and used after it, so it would have to be
stored twice. The space inside a gated MLP cannot be rotated offline: its gate multiplies channel by channel.

Sources: Ashkboos et al. 2024, "QuaRot"; Tseng et al. 2024, "QuIP#" (Hadamard with random signs).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.formats.checkpoint import Checkpoint
from models.network.decoder import Layer
from runtime.errors import UserError


READERS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",      # linear: its norm
           "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}


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
def rotate_values(layer: Layer, seed: int = 0) -> None:
    """Rotate the value space of each head of `layer` in place."""
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


def rotate_stream(checkpoint: Checkpoint, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the checkpoint with its residual stream rotated. Raises UserError where that needs another table."""
    config = checkpoint.config
    if config.tied_embeddings:
        raise UserError(f"{checkpoint.path} ties its head to its embedding, and a rotated stream would need both stored: "
                        f"rotate the value space instead")
    check_stream(checkpoint)
    turn = rotation(config.hidden_size, torch.Generator().manual_seed(seed))
    for name in checkpoint.names():
        tensor, parts = checkpoint.read(name).float(), name.split(".")
        if name == "lm_head.weight":
            tensor = (tensor * checkpoint.read("model.norm.weight").float()) @ turn.T
        elif name == "model.embed_tokens.weight":
            tensor = tensor @ turn.T
        elif parts[-1] == "weight" and parts[-2] in READERS:
            gain = checkpoint.read(".".join([*parts[:3], READERS[parts[-2]], "weight"])).float()
            tensor = (tensor * gain) @ turn.T
        elif parts[-2] in ("o_proj", "down_proj"):
            tensor = turn @ tensor                              # a weight's rows, or a bias
        elif parts[-2] in ("input_layernorm", "post_attention_layernorm", "norm"):
            tensor = torch.ones_like(tensor)
        yield name, tensor


def check_stream(checkpoint: Checkpoint) -> None:
    """Raises UserError for a model whose residual stream cannot be rotated."""
    config = checkpoint.config
    if config.norm != "rms" or config.positions != "rope":
        raise UserError(f"{checkpoint.path} has {config.norm} norms and {config.positions} positions: rotating the stream "
                        f"needs RMSNorm and RoPE")
