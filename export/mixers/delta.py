"""The gated delta rule of Qwen3.5 (Yang et al. 2024, "Gated Delta Networks"): a convolution, the recurrence, a gated norm.

Queries and keys have length 1 a head; a key head serves heads / kv_heads consecutive value heads. State: float32 [b, heads, head_dim,
state_dim].
"""

import numpy as np

from export.mixers import chunk
from export.mixers.short_conv import convolved

EPSILON = 1e-6                    # of a query's or key's squared length


def mixer(graph, x: str, layer: int) -> str:
    config, shape, name = graph.config, graph.config.layers[layer], f"layers.{layer}.delta"
    size, values, times = config.head_size(shape), shape.state_dim, shape.heads // shape.kv_heads
    keys, width = shape.kv_heads * size, shape.heads * values
    qkv, z = graph.split_linear(x, f"layers.{layer}.delta_in", {"delta_qkv": 2 * keys + width, "delta_z": width})
    mixed = convolved(graph, qkv, layer)
    mixed = graph.op("Mul", [mixed, graph.op("Sigmoid", [mixed], f"{name}.sigmoid")], f"{name}.mixed")
    parts = graph.op("Split", [mixed, graph.constant([keys, keys, width])], [f"{name}.{part}" for part in "qkv"], axis=-1)
    q, k, v = (graph.op("Reshape", [part, graph.constant([0, 0, heads, each])], f"{part}.heads") for part, heads, each in zip(
        parts, (shape.kv_heads, shape.kv_heads, shape.heads), (size, size, values)))
    q, k = (chunk.repeated(graph, _unit(graph, part, size, length), shape.kv_heads, times, size, f"{part}.all")
            for part, length in ((q, size ** -0.5), (k, 1.0)))
    real = chunk.valid(graph)
    beta = graph.op("Sigmoid", [graph.wide(graph.linear(x, f"layers.{layer}.delta_b"))], f"{name}.beta")
    beta = graph.op("Mul", [beta, real], f"{name}.beta.real")
    out = graph.recurrence(layer, q, k, v, decays(graph, graph.wide(graph.linear(x, f"layers.{layer}.delta_a")), layer)[1], beta)
    normed = graph.op("RMSNormalization", [out, graph.wide(graph.weight(f"layers.{layer}.state_norm.weight"))], f"{name}.normed", axis=-1,
                      epsilon=config.norm_eps)
    rows = graph.op("Reshape", [normed, graph.constant([0, 0, width])], f"{name}.rows")
    z = graph.wide(z)
    gate = graph.op("Mul", [z, graph.op("Sigmoid", [z], f"{name}.z.sigmoid")], f"{name}.gate")
    rows = graph.own_type(graph.op("Mul", [rows, gate], f"{name}.gated"), "float32", f"{name}.output")
    return graph.block_output(rows, f"layers.{layer}.delta_out")


def decays(graph, x: str, layer: int) -> tuple[str, str]:
    """(softplus(x + dt_bias), that times the layer's decay) for x [b, s, heads], both 0 for padding."""
    name = f"layers.{layer}.time"
    biased = graph.op("Add", [x, graph.weight(f"layers.{layer}.dt_bias")], f"{name}.biased")
    steps = graph.op("Mul", [graph.op("Softplus", [biased], f"{name}.positive"), chunk.valid(graph)], f"{name}.steps")
    return steps, graph.op("Mul", [steps, graph.weight(f"layers.{layer}.decay")], f"{name}.decay")


def _unit(graph, x: str, size: int, length: float) -> str:
    """x [..., size] scaled to this length: an RMSNorm, since sqrt(sum + e) = sqrt(size) sqrt(mean + e / size)."""
    gain = graph.constant(np.full(size, length * size ** -0.5), np.float32)
    return graph.op("RMSNormalization", [x, gain], f"{x}.unit", axis=-1, epsilon=EPSILON / size)
