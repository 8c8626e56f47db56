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
from models.network.decoder import named_groups
from runtime.errors import UserError

EVEN = 0.1              # how far from their mean the gains of a tied model's final norm may be, as a share of it


def principal_directions(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Orthonormal columns [hidden, hidden], the direction with most energy first. ids: int64 [windows, tokens].

    Raises UserError for a model whose stream cannot be rotated.
    """
    config, gain = checkpoint.config, checkpoint.read("model.norm.weight").float()
    if config.norm != "rms" or config.positions != "rope":
        raise UserError(f"{checkpoint.path} has {config.norm} norms and {config.positions} positions: rotating the stream "
                        f"needs RMSNorm and RoPE")
    widths = {"a norm after what a block adds": config.norm_order != "pre", "short convolutions, as wide as the stream": any(
        layer.mixer == "conv" for layer in config.layers), "inputs of every layer": config.per_layer_size}
    for what in (what for what, has in widths.items() if has):
        raise UserError(f"{checkpoint.path}: family {config.family} has {what}, so its stream cannot be rotated: prune depth or mlp instead")
    if config.tied_embeddings and (gain / gain.mean() - 1).abs().max() > EVEN:
        raise UserError(f"{checkpoint.path}: the head is the token table, and the final norm's gains differ ({gain.min():.3g} to "
                        f"{gain.max():.3g}), which no rotation keeps: prune depth or mlp instead")
    walk, total = Walk(checkpoint, ids), torch.zeros(config.hidden_size, config.hidden_size, device=checkpoint.device)

    def add() -> None:
        total.add_(second_moment([part / part.square().mean(-1, keepdim=True).add(1e-12).sqrt() for part in walk.x]))

    firsts = {group[0].readers[0].split(".", 3)[3] for blocks in named_groups(config) for group in blocks}
    for _, layer in walk.layers("directions"):
        walk.step(layer, lambda names, inputs: add() if names[0] in firsts else None)
    add()                                               # what the final norm reads
    return torch.linalg.eigh(total.double()).eigenvectors.flip(1).float()


def sliced(checkpoint: Checkpoint, turn: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model whose stream is turn^T x; turn: orthonormal columns [hidden, kept]."""
    gain, config = (turn.shape[0] / turn.shape[1]) ** 0.5, checkpoint.config
    blocks = [groups for blocks in named_groups(config) for groups in blocks]
    norms = {reader: groups[0].maker for groups in blocks for reader in groups[0].readers}         # of what reads the stream
    writers = {reader for groups in blocks for group in groups[1:] for reader in group.readers}
    for name in checkpoint.names():
        tensor, (module, _, kind) = checkpoint.read(name).float(), name.rpartition(".")
        if name == "lm_head.weight":
            tensor = (tensor * checkpoint.read("model.norm.weight").float()) @ turn
        elif name == "model.embed_tokens.weight":
            tensor = tensor @ turn
        elif module in norms and kind == "weight":
            tensor = (tensor * checkpoint.read(f"{norms[module]}.weight").float()) @ turn
        elif module in writers:
            tensor = turn.T @ tensor                          # a weight's rows, or a bias
        elif name == "model.norm.weight" and config.tied_embeddings:
            tensor = gain * (turn.square().T @ tensor)        # the diagonal of turn^T diag(g) turn
        elif module in {"model.norm", *norms.values()}:
            tensor = torch.full((turn.shape[1],), gain, device=turn.device)
        yield name, tensor.cpu().contiguous()
