"""Peak memory of calibrated quantization, told before it starts: that of one layer, not of the model.

Bytes by kind, which models/training/memory.py sums. What the resident set shows besides is the checkpoint's file, whose
pages the system takes back when it needs them.
"""

from __future__ import annotations

import math

from compress.quantizing.calibrated import PART
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.training.memory import PROCESS_BYTES

COPIES = 12               # float32 copies of PART weights that gptq.py makes at most
FACTORS = 32              # bytes for each element of a Hessian: itself, damped, and three in float64


def calibration_bytes(config: ModelConfig, windows: int, length: int) -> dict[str, int]:
    """Of quantizing layer by layer: the residual stream of all windows, normed, and a layer's widest input (compress/layerwise.py)."""
    tokens, shapes = windows * min(length, config.context_length), tensor_shapes(config)
    inputs = [max(layer.mlp_size, layer.heads * config.head_dim, config.hidden_size) for layer in config.layers]
    layers = [sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"model.layers.{number}."))
              for number in range(len(config.layers))]
    matrices = [math.prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.")]
    table = config.vocab_size * config.hidden_size

    def chosen(weights: int) -> int:                # a matrix, what its codes stand for, the codes, and copies of a part of it
        return 9 * weights + 4 * COPIES * min(weights, PART)
    walking = {"token table": 4 * table, "activations": 4 * tokens * (2 * config.hidden_size + max(inputs)),
               "layer": 5 * max(layers), "Hessian": FACTORS * max(inputs) ** 2, "matrix": chosen(max(matrices))}
    before = {"token table": chosen(table), "Hessian": FACTORS * config.hidden_size**2}
    return max(walking, before, key=lambda parts: sum(parts.values())) | {"process": PROCESS_BYTES}


def gradient_bytes(config: ModelConfig, length: int, bytes_a_parameter: int) -> dict[str, int]:
    """Of measuring sensitivity (sensitivity.py): the whole model, mapped from its file, and the activations of one window."""
    tokens = min(length, config.context_length)
    kept = sum(8 * config.hidden_size + 4 * layer.heads * config.head_dim + 4 * layer.mlp_size for layer in config.layers)
    return {"weights": bytes_a_parameter * sum(math.prod(shape) for shape in tensor_shapes(config).values()),
            "activations": 4 * tokens * kept, "logits": 16 * tokens * config.vocab_size,
            "token table": 4 * config.vocab_size * config.hidden_size, "process": PROCESS_BYTES}
