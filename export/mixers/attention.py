"""Attention in standard operators: the mask is explicit, keys and values go into the cache by TensorScatter.

Per layer: size of heads, window, rotary table or none, norms of queries and keys, a gate, a cache of its own or that of an
earlier layer, whose slots the same call has written.
"""

import numpy as np


def mixer(graph, x: str, layer: int) -> str:
    config, shape, name, turned = graph.config, graph.config.layers[layer], f"layers.{layer}", {}
    size, seen = config.head_size(shape), mask(graph, config.window(shape))
    heads, parts = queries_keys_values(graph, x, layer)
    for (part, count), value in zip(heads.items(), parts):
        value = graph.op("Transpose", [head_norm(graph, value, layer, part)], f"{name}.{part}.turned", perm=[0, 2, 1, 3])
        if part != "v" and (tables := graph.rope(shape, "cos", "sin")):
            value = graph.op("RotaryEmbedding", [value, *tables, "position_ids"], f"{name}.{part}.rotated")
        value = last_norm(graph, value, layer, part)
        if part == "q":
            turned[part] = query_factor(graph, value, layer, [1, 3])
        else:
            turned[part] = graph.cached_values(value, layer, part)
    if shape.cache_source is None:
        for (past, present), part in zip(graph.cache(layer, graph.dtype), "kv"):
            turned[part] = graph.op("TensorScatter", [past, turned[part], "write_index"], present, axis=2)
    else:
        turned |= {part: f"present_{kind}.{shape.cache_source}" for part, kind in (("k", "key"), ("v", "value"))}
    how = {"softcap": config.attention_softcap} if config.attention_softcap else {}
    attended = graph.op("Attention", [turned["q"], turned["k"], turned["v"], seen], f"{name}.attended", scale=config.scale(shape), **how)
    rows = graph.op("Transpose", [attended], f"{name}.attended.turned", perm=[0, 2, 1, 3])
    rows = graph.op("Reshape", [rows, graph.constant([0, -1, heads["q"] * size])], f"{name}.attended.rows")
    return graph.block_output(gated(graph, rows, x, layer), f"{name}.o")


def mask(graph, window: int | None) -> str:
    """Which cache slots each new token may look at: bool [b, 1, s, capacity]."""
    def past():
        first = next(number for number, layer in enumerate(graph.config.layers) if graph.config.cache_heads(layer))
        capacity = graph.op("Squeeze", [graph.op("Shape", [f"past_key.{first}"], "capacity.shape", start=2, end=3)], "capacity")
        slots = graph.op("Range", [graph.constant(0), capacity, graph.constant(1)], "slots")
        own = graph.op("Unsqueeze", ["position_ids", graph.constant([1, 3])], "position")          # [b, 1, s, 1]
        return graph.op("LessOrEqual", [slots, own], "mask.past")

    def recent():
        seen, name = graph.once("mask.past", past), f"mask.{window}"
        oldest = graph.op("Sub", ["position", graph.constant(window)], f"{name}.before")
        return graph.op("And", [seen, graph.op("Greater", ["slots", oldest], f"{name}.recent")], name)
    return graph.once("mask.past", past) if window is None else graph.once(f"mask.{window}", recent)


def queries_keys_values(graph, x: str, layer: int) -> tuple[dict[str, int], list[str]]:
    """Heads of q, k and v (of q alone, where another layer has the others), and their values [b, s, heads * head_dim]."""
    shape = graph.config.layers[layer]
    heads = {"q": shape.heads} | ({"k": shape.kv_heads, "v": shape.kv_heads} if shape.cache_source is None else {})
    if len(heads) == 1:
        return heads, [graph.linear(x, f"layers.{layer}.q")]
    size = graph.config.head_size(shape)
    return heads, graph.split_linear(x, f"layers.{layer}.qkv", {part: count * size for part, count in heads.items()})


def head_norm(graph, x: str, layer: int, part: str) -> str:
    """x [b, s, heads * head_dim] as [b, s, heads, head_dim], normalized where the model does that before it rotates."""
    config, shape, name = graph.config, graph.config.layers[layer], f"layers.{layer}.{part}_norm"
    heads, normalized = shape.heads if part == "q" else shape.kv_heads, f"{name}.weight" in graph.stored
    if normalized and config.qk_norm_over == "all":
        x = graph.norm(x, name, f"{name}.normed")
    x = graph.op("Reshape", [x, graph.constant([0, -1, heads, config.head_size(shape)])], f"{name}.heads")
    if part == "v" and config.v_norm:
        ones = graph.constant(np.ones(config.head_size(shape)), graph.dtype)
        return graph.op("RMSNormalization", [x, ones], f"{name}.normed", axis=-1, epsilon=config.norm_eps)
    first = normalized and config.qk_norm_over == "head" and not config.qk_norm_last
    return graph.norm(x, name, f"{name}.normed") if first else x


def last_norm(graph, x: str, layer: int, part: str) -> str:
    """Queries or keys [..., head_dim], normalized where the model does that after it has rotated."""
    config, name = graph.config, f"layers.{layer}.{part}_norm"
    last = config.qk_norm_last and config.qk_norm_over == "head" and f"{name}.weight" in graph.stored
    return graph.norm(x, name, f"{name}.normed") if last else x


def query_factor(graph, q: str, layer: int, axes: list[int]) -> str:
    """Queries times the factors of their positions, where the layer's RoPE has some. axes: those q has beside [b, s]."""
    for table in graph.rope(graph.config.layers[layer], "query"):
        factors = graph.op("Gather", [table, "position_ids"], f"layers.{layer}.q.factors")
        factors = graph.op("Unsqueeze", [factors, graph.constant(axes)], f"layers.{layer}.q.factors.turned")
        q = graph.op("Mul", [q, factors], f"layers.{layer}.q.scaled")
    return q


def gated(graph, rows: str, x: str, layer: int) -> str:
    """What the heads give, times the sigmoid of the layer's gate of x where it has one."""
    if not graph.config.attention_gate:
        return rows
    name = f"layers.{layer}.attn_gate"
    return graph.op("Mul", [rows, graph.op("Sigmoid", [graph.linear(x, name)], f"{name}.sigmoid")], f"{name}.gated")
