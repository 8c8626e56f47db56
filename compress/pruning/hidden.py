"""Prune the hidden size: one rotation of the residual stream into its principal directions, of which the first stay.

    turn = principal_directions(checkpoint, ids)[:, :448]        # float32 [hidden, kept]
    tensors = sliced(checkpoint, turn)

What the norms read of the stream, x / rms(x), is averaged as E[x x^T] over all norms and the text; its eigenvectors of
largest eigenvalue are kept. Gains are folded into the linears behind them, every matrix that reads the stream is
multiplied by the directions and every one that writes it by their transpose. A norm over fewer channels divides by a
larger mean, which its gain sqrt(hidden / kept) undoes. So the result is exact for a stream that lies within the kept
directions, and an ordinary model of a smaller hidden size otherwise.

A tied table is read before the final norm's gain g and used after it. The rotated gain is diagonal for an even g alone,
so a tied model with an uneven one is refused: to store the table twice would cost more than the channels save, and to
keep the diagonal destroys the model (SmolLM2-135M: KL 16 with every channel kept).

Source: Ashkboos et al. 2024, "SliceGPT", with one rotation for all layers where the paper has one each: those need
matrices on the residual connections, which an ordinary model has not. RMSNorm and RoPE only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.layerwise import Walk, second_moment
from compress.quantizing.rotation import READERS, check_stream
from models.formats.checkpoint import Checkpoint
from models.progress import progress
from runtime.errors import UserError

EVEN = 0.1              # how far from their mean the gains of a tied model's final norm may be, as a share of it


def principal_directions(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Orthonormal columns [hidden, hidden], the direction with most energy first. ids: int64 [windows, tokens].

    Raises UserError for a model whose stream cannot be rotated.
    """
    check_stream(checkpoint)
    gain = checkpoint.read("model.norm.weight").float()
    if checkpoint.config.tied_embeddings and (gain / gain.mean() - 1).abs().max() > EVEN:
        raise UserError(f"{checkpoint.path}: the head is the token table, and the final norm's gains differ ({gain.min():.3g} to "
                        f"{gain.max():.3g}), which no rotation keeps: prune depth or mlp instead")
    walk, total = Walk(checkpoint, ids), torch.zeros(checkpoint.config.hidden_size, checkpoint.config.hidden_size)

    def add() -> None:
        total.add_(second_moment([part / part.square().mean(-1, keepdim=True).add(1e-12).sqrt() for part in walk.x.split(4)]))

    def visit(names: list[str], inputs: list[Tensor]) -> None:
        if names[0].rsplit(".", 1)[1] in READERS:
            add()
    for number in progress(range(len(checkpoint.config.layers)), label="directions", unit="layer"):
        walk.step(walk.load(number), visit)
    add()
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
        elif module in ("o_proj", "down_proj"):
            tensor = turn.T @ tensor                              # a weight's rows, or a bias
        elif name == "model.norm.weight" and checkpoint.config.tied_embeddings:
            tensor = gain * (turn.square().T @ tensor)        # the diagonal of turn^T diag(g) turn
        elif module in ("input_layernorm", "post_attention_layernorm", "norm"):
            tensor = torch.full((turn.shape[1],), gain)
        yield name, tensor.contiguous()
