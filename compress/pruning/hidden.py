"""Prune the hidden size: one rotation of the residual stream into its principal directions, of which the first stay.

    turn = principal_directions(checkpoint, ids)[:, :448]        # float32 [hidden, kept]
    tensors = sliced(checkpoint, turn)

What the norms read of the stream, x / rms(x), is averaged as E[x x^T] over all norms and the text; its eigenvectors of
largest eigenvalue are kept. Gains are folded into the linears behind them, every matrix that reads the stream is
multiplied by the directions and every one that writes it by their transpose. A norm over fewer channels divides by a
larger mean, which its gain sqrt(hidden / kept) undoes. So the result is exact for a stream that lies within the kept
directions, and an ordinary model of a smaller hidden size otherwise.

A tied table is read before the final norm's gain g and used after it. The rotated gain is diagonal for an even g alone,
so a tied model with an uneven one is refused (SmolLM2-135M: KL 16 with every channel kept).

Source: Ashkboos et al. 2024, "SliceGPT", with one rotation for all layers, which an ordinary model can hold.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.layerwise import Walk, second_moment
from models.checkpoint import Checkpoint
from runtime.errors import UserError

READERS = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",      # linear: its norm
           "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}
WRITERS = ("o_proj", "down_proj")
EVEN = 0.1              # how far from their mean the gains of a tied model's final norm may be, as a share of it


def principal_directions(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Orthonormal columns [hidden, hidden], the direction with most energy first. ids: int64 [windows, tokens].

    Raises UserError for a model whose stream cannot be rotated.
    """
    config, gain = checkpoint.config, checkpoint.read("model.norm.weight").float()
    if config.norm != "rms" or config.positions != "rope":
        raise UserError(f"{checkpoint.path} has {config.norm} norms and {config.positions} positions: rotating the stream "
                        f"needs RMSNorm and RoPE")
    if config.tied_embeddings and (gain / gain.mean() - 1).abs().max() > EVEN:
        raise UserError(f"{checkpoint.path}: the head is the token table, and the final norm's gains differ ({gain.min():.3g} to "
                        f"{gain.max():.3g}), which no rotation keeps: prune depth or mlp instead")
    walk, total = Walk(checkpoint, ids), torch.zeros(config.hidden_size, config.hidden_size)

    def add() -> None:
        total.add_(second_moment([part / part.square().mean(-1, keepdim=True).add(1e-12).sqrt() for part in walk.x.split(4)]))

    for _, layer in walk.layers("directions"):
        walk.step(layer, lambda names, inputs: add() if names[0].endswith(tuple(READERS)) else None)
    add()                                               # what the final norm reads
    return torch.linalg.eigh(total.double()).eigenvectors.flip(1).float()


def sliced(checkpoint: Checkpoint, turn: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model whose stream is turn^T x; turn: orthonormal columns [hidden, kept]."""
    gain = (turn.shape[0] / turn.shape[1]) ** 0.5
    for name in checkpoint.names():
        tensor, parts = checkpoint.read(name).float(), name.split(".")
        module = parts[-2]
        if name == "lm_head.weight":
            tensor = (tensor * checkpoint.read("model.norm.weight").float()) @ turn
        elif name == "model.embed_tokens.weight":
            tensor = tensor @ turn
        elif module in READERS and parts[-1] == "weight":
            norm = ".".join([*parts[:3], READERS[module], "weight"])
            tensor = (tensor * checkpoint.read(norm).float()) @ turn
        elif module in WRITERS:
            tensor = turn.T @ tensor                          # a weight's rows, or a bias
        elif name == "model.norm.weight" and checkpoint.config.tied_embeddings:
            tensor = gain * (turn.square().T @ tensor)        # the diagonal of turn^T diag(g) turn
        elif module in ("input_layernorm", "post_attention_layernorm", "norm"):
            tensor = torch.full((turn.shape[1],), gain)
        yield name, tensor.contiguous()
