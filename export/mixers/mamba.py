"""Mamba-2 (Dao and Gu 2024): a convolution, a recurrence whose decay depends on the input, a skip, a gated norm.

S_t = exp(g_t) S_{t-1} + B_t (dt_t x_t)^T and y_t = S_t^T C_t + D x_t are chunk.py's recurrence with C, B and dt x as queries, keys and
values; a group's B and C serve heads / kv_heads consecutive heads, whose outputs are normalized together. State: float32
[b, heads, state_dim, head_dim].
"""

import numpy as np

from export.mixers import chunk
from export.mixers.delta import decays
from export.mixers.short_conv import convolved


def mixer(graph, u: str, layer: int) -> str:
    config, shape, name = graph.config, graph.config.layers[layer], f"layers.{layer}.mamba"
    size, groups, states, times = config.head_size(shape), shape.kv_heads, shape.state_dim, shape.heads // shape.kv_heads
    width = shape.heads * size
    z, xbc = graph.split_linear(u, f"layers.{layer}.mamba_in", {"mamba_z": width, "mamba_xbc": width + 2 * groups * states})
    mixed = convolved(graph, xbc, layer)
    mixed = graph.op("Mul", [mixed, graph.op("Sigmoid", [mixed], f"{name}.sigmoid")], f"{name}.mixed")
    parts = graph.op("Split", [mixed, graph.constant([width, groups * states, groups * states])], [f"{name}.{part}" for part in "xbc"],
                     axis=-1)
    x, b, c = (graph.op("Reshape", [part, graph.constant([0, 0, heads, each])], f"{part}.heads") for part, heads, each in zip(
        parts, (shape.heads, groups, groups), (size, states, states)))
    b, c = (chunk.repeated(graph, part, groups, times, states, f"{part}.all") for part in (b, c))
    steps, decay = decays(graph, graph.wide(graph.linear(u, f"layers.{layer}.mamba_dt")), layer)
    steps = graph.op("Unsqueeze", [steps, graph.constant([3])], f"{name}.steps")
    out = graph.recurrence(layer, c, b, graph.op("Mul", [x, steps], f"{name}.values"), decay)
    skip = graph.op("Unsqueeze", [graph.weight(f"layers.{layer}.skip"), graph.constant([1])], f"{name}.skip")
    out = graph.op("Add", [out, graph.op("Mul", [x, skip], f"{name}.skipped")], f"{name}.out")
    z = graph.wide(z)
    gate = graph.op("Mul", [z, graph.op("Sigmoid", [z], f"{name}.z.sigmoid")], f"{name}.gate")
    rows = graph.op("Mul", [graph.op("Reshape", [out, graph.constant([0, 0, width])], f"{name}.rows"), gate], f"{name}.gated")
    rows = graph.op("Reshape", [rows, graph.constant([0, 0, groups, width // groups])], f"{name}.groups")
    rows = graph.op("RMSNormalization", [rows, graph.constant(np.ones(width // groups), np.float32)], f"{name}.normed", axis=-1,
                    epsilon=config.norm_eps)
    rows = graph.op("Reshape", [rows, graph.constant([0, 0, width])], f"{name}.normed.rows")
    rows = graph.op("Mul", [rows, graph.wide(graph.weight(f"layers.{layer}.state_norm.weight"))], f"{name}.weighed")
    return graph.block_output(graph.own_type(rows, "float32", f"{name}.output"), f"layers.{layer}.mamba_out")
