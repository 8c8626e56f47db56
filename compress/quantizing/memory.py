"""Peak memory of calibrated quantization, told before it starts: that of one layer, not of the model.

    parts = calibration_bytes(config, windows=128, length=512)        # bytes by kind, summed by models/training/memory.py

Calibration (compress/layerwise.py) holds the residual stream of all windows, what a norm made of it and the widest input
of a layer; one layer in float32; the Hessian of that input and its factors; copies of a part of a matrix. The token
table is quantized before, alone. The gradients of sensitivity (sensitivity.py) go through the whole model: it is
mapped from its file, 2 bytes a parameter where it is stored so, with the activations of one window. What the resident set
shows besides is the checkpoint's file, whose pages the system takes back when it needs them.
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
    """Predicted peak bytes by kind of quantizing layer by layer on windows of length tokens."""
    tokens, shapes = windows * min(length, config.context_length), tensor_shapes(config)
    inputs = [max(layer.mlp_size, layer.heads * config.head_dim, config.hidden_size) for layer in config.layers]
    layers = [sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"model.layers.{number}."))
              for number in range(len(config.layers))]
    matrices = [math.prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.")]
    table = config.vocab_size * config.hidden_size
    walking = {"token table": 4 * table, "activations": 4 * tokens * (2 * config.hidden_size + max(inputs)),
               "layer": 5 * max(layers), "Hessian": FACTORS * max(inputs) ** 2, "matrix": _chosen(max(matrices))}
    before = {"token table": _chosen(table), "Hessian": FACTORS * config.hidden_size**2}
    return max(walking, before, key=lambda parts: sum(parts.values())) | {"process": PROCESS_BYTES}


def _chosen(weights: int) -> int:
    """Bytes while the codes of a matrix are chosen: it, what they stand for, the codes, and copies of a part of it."""
    return 9 * weights + 4 * COPIES * min(weights, PART)


def gradient_bytes(config: ModelConfig, length: int, bytes_a_parameter: int) -> dict[str, int]:
    """Predicted peak bytes by kind of measuring sensitivity, one window of length tokens at a time."""
    tokens = min(length, config.context_length)
    kept = sum(8 * config.hidden_size + 4 * layer.heads * config.head_dim + 4 * layer.mlp_size for layer in config.layers)
    return {"weights": bytes_a_parameter * sum(math.prod(shape) for shape in tensor_shapes(config).values()),
            "activations": 4 * tokens * kept, "logits": 16 * tokens * config.vocab_size,
            "token table": 4 * config.vocab_size * config.hidden_size, "process": PROCESS_BYTES}
