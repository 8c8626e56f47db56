"""How many bytes a training step needs, told before the first one runs.

Weights in fp32; for what is trained also a gradient and AdamW's two moments (12 bytes a parameter; SGD has one or none); activations kept
for the backward pass; the logits with their softmax and gradient. Activations are counted per token and layer from the
decoder's shape (attention's scores are never stored: PyTorch computes them in blocks; a recurrence keeps a chunk's), half
as much again where rows differ in length, for the holes that leaves in the heap; the checkpoint, mapped again where adapters
are merged into it; what the process takes by itself. A prediction in fp32: mixed precision needs less for activations.
"""

import torch

from models.device import free_bytes
from models.network.config import GATED, LayerConfig, ModelConfig
from models.network.mixers.delta import CHUNK

PROCESS_BYTES = 500_000_000
SHARE = 0.8                      # of a device's free memory that a prediction may fill


def training_bytes(module: torch.nn.Module, config: ModelConfig, rows: int, context: int, labels: int,
                   checkpointing: bool, *, ragged: bool = False, merged: int = 0) -> dict[str, int]:
    """Predicted bytes by kind, for micro-batches of `rows` x `context` tokens, `labels` of a row's with a loss.

    ragged: rows differ in length. merged: bytes of the checkpoint that adapters are merged into when saved.
    """
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    per_layer = [kept_numbers(config, layer) for layer in config.layers]
    kept = max(per_layer) + config.hidden_size * len(per_layer) if checkpointing else sum(per_layer)
    activations = 4 * rows * context * kept
    return {"weights": weights, "gradients and optimizer": 12 * trained,
            "activations": activations * 3 // 2 if ragged else activations,
            "logits": 12 * rows * labels * config.vocab_size, "merging": merged, "process": PROCESS_BYTES}


def rows_at_once(module: torch.nn.Module, config: ModelConfig, batch: int, context: int, labels: int, checkpointing: bool,
                 device: torch.device, default: int, beside: int = 0) -> int:
    """A micro-batch, where none is asked for: on a CPU `default` rows, which stay in its caches; elsewhere as many of the batch as
    SHARE of the free memory holds, because what a step costs there is mostly its number of kernels.

    beside: bytes that something else will take of it.
    """
    free = None if device.type == "cpu" else free_bytes(device)
    if free is None:
        return min(batch, default)

    def needed(rows: int) -> int:
        parts = training_bytes(module, config, rows, context, labels, checkpointing, ragged=True)
        return sum(parts.values()) - parts["process"]
    each = needed(1) - needed(0)
    return int(min(batch, max(1, (SHARE * free - beside - needed(0)) // each)))


def kept_numbers(config: ModelConfig, layer: LayerConfig) -> int:
    """Numbers kept of a token in one layer."""
    size, hidden = config.head_size(layer), config.hidden_size
    channels = config.state_shapes(layer).get("conv", (0, 0))[0]
    mixer = size * (5 * layer.heads + 6 * layer.kv_heads)
    if layer.mixer == "conv":
        mixer = 6 * hidden
    elif layer.mixer in GATED:              # gates before and after, and the vectors
        mixer = (2 * GATED[layer.mixer][0] + 2 * GATED[layer.mixer][1]) * hidden
    elif layer.mixer != "attention":        # by head what goes into the chunks, the products of a chunk's tokens, and a state a chunk
        mixer = 3 * channels + layer.heads * (6 * (size + layer.state_dim) + 6 * CHUNK + 2 * size * layer.state_dim // CHUNK)
    feed = 4 * layer.mlp_size
    if layer.experts:                       # a copy of the token, and of what comes out, for every expert
        feed = layer.experts_per_token * (feed + 3 * hidden) + 4 * layer.shared_size + 3 * layer.experts
    return 6 * hidden + mixer + feed + 6 * config.per_layer_size


def memory_line(parts: dict[str, int], device: torch.device = torch.device("cpu")) -> str:
    """One sentence for the terminal."""
    free = free_bytes(device)
    detail = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    beside = f" of {free / 1e9:.1f} GB free" if free is not None else ""
    return f"memory: about {sum(parts.values()) / 1e9:.2f} GB{beside} ({detail})"
