"""Move a model's weights off the grid of an earlier quantization without changing what it computes.

Weights dequantized from a 4-bit file lie on a 4-bit grid, so quantizing them to 4 bits again looks lossless, and no
figure may rest on that. Here each channel between two linear operations is multiplied by a random factor
exp(uniform(-0.1, 0.1)) on one side and divided by it on the other:

    RMSNorm gain / s,  columns of q, k, v * s         (the attention's input)
    RMSNorm gain / s,  columns of gate, up * s        (the MLP's input)
    rows of v * s,     columns of o / s               (each key/value head's channels, in every head that reads them)
    rows of up * s,    columns of down / s

The logits stay equal to rounding. Factors depend only on seed, layer and channel. Embeddings, output matrix and
q/k-norms are left as they are. Needs RMSNorm and a gated MLP (llama, mistral, qwen2, qwen3): GPT-2 is refused.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from models.network.config import ModelConfig
from runtime.errors import UserError

SPREAD = 0.1
# module: (channel group of its rows, of its columns, of its gain), each with the sign of the exponent
ROWS = {"self_attn.v_proj": "value", "mlp.up_proj": "mlp"}
COLUMNS = {"self_attn.q_proj": ("attention_in", 1), "self_attn.k_proj": ("attention_in", 1),
           "self_attn.v_proj": ("attention_in", 1), "self_attn.o_proj": ("value", -1),
           "mlp.gate_proj": ("mlp_in", 1), "mlp.up_proj": ("mlp_in", 1), "mlp.down_proj": ("mlp", -1)}
GAINS = {"input_layernorm": "attention_in", "post_attention_layernorm": "mlp_in"}
GROUPS = ("attention_in", "value", "mlp_in", "mlp")


def off_grid(config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]],
             seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors` (names of `Decoder`, any order) rescaled, in float32.

    Raises UserError where the model has LayerNorm or a plain MLP.
    """
    if config.norm != "rms" or not config.gated_mlp:
        raise UserError(f"--off-grid needs RMSNorm and a gated MLP, which family {config.family} has not")
    return ((name, _rescaled(config, name, tensor.float(), seed)) for name, tensor in tensors)


def _rescaled(config: ModelConfig, name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return tensor
    layer, module, parameter = int(parts[2]), ".".join(parts[3:-1]), parts[-1]
    if module in GAINS:
        return tensor / _factors(config, layer, GAINS[module], seed)
    if module in ROWS:
        rows = _factors(config, layer, ROWS[module], seed)
        tensor = tensor * (rows[:, None] if parameter == "weight" else rows)
    if module in COLUMNS and parameter == "weight":
        group, sign = COLUMNS[module]
        columns = _factors(config, layer, group, seed)
        if module == "self_attn.o_proj":            # its columns are heads; each reads the value of its group
            shape = config.layers[layer]
            columns = columns.view(shape.kv_heads, 1, -1).expand(-1, shape.heads // shape.kv_heads, -1).reshape(-1)
        tensor = tensor * columns ** sign
    return tensor


def _factors(config: ModelConfig, layer: int, group: str, seed: int) -> torch.Tensor:
    shape = config.layers[layer]
    size = {"attention_in": config.hidden_size, "value": shape.kv_heads * config.head_dim,
            "mlp_in": config.hidden_size, "mlp": shape.mlp_size}[group]
    random = np.random.default_rng([seed, layer, GROUPS.index(group)])
    return torch.from_numpy(np.exp(random.uniform(-SPREAD, SPREAD, size)).astype(np.float32))
