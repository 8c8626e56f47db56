"""The portable graph of a decoder: opset 24, standard operators only.

One file serves ONNX Runtime's CPU, which is how its numbers are checked, and TensorRT, where RotaryEmbedding,
TensorScatter and Attention become native layers. So it keeps to what TensorRT's parser reads rightly
(design: "One portable graph"): the mask is explicit and built in the graph (slot <= position, and slot > position -
window), never `is_causal` or `nonpad_kv_seqlen`; Attention has one output, because TensorScatter updates the caches; a
quantized table is one DequantizeLinear that feeds both Gather and, where the head is tied, the head's MatMul.
The cache's capacity is symbolic; `export.trt` fixes it.

What TensorRT refuses and ONNX Runtime runs is written all the same (runtime/capabilities.py).
"""

from export.decoder_graph import DecoderGraph


def portable_graph(manifest: dict, dtype: str) -> DecoderGraph:
    """Build the graph of a manifest's model. dtype: "float32", "float16" or "bfloat16", of activations and caches."""
    graph = DecoderGraph(manifest, dtype)
    graph.tokens()
    table = graph.dequantized("embed", 1)
    x = graph.embedded(graph.op("Gather", [table, "input_ids"], "embedded"))
    visible = _mask(graph)
    for layer in range(len(graph.config.layers)):
        name = f"layers.{layer}"
        normed = graph.norm(x, f"{name}.attn_norm", f"{name}.attn_input")
        x = graph.op("Add", [x, _attention(graph, normed, visible, layer)], f"{name}.after_attention")
        normed = graph.norm(x, f"{name}.mlp_norm", f"{name}.mlp_input")
        x = graph.op("Add", [x, graph.mlp(normed, layer)], f"{name}.after_mlp")
    x = graph.norm(graph.selected(x), "final_norm", "final")
    if graph.config.tied_embeddings:
        # (table xᵀ)ᵀ, not x tableᵀ: for the latter TensorRT keeps a second, transposed table where the batch is dynamic.
        columns = graph.op("Transpose", [x], "head.columns", perm=[0, 2, 1])
        product = graph.op("MatMul", [table, columns], "head.product")
        graph.logits(graph.op("Transpose", [product], "head.rows", perm=[0, 2, 1]))
    else:
        graph.logits(graph.linear(x, "head"))
    return graph


def _mask(graph: DecoderGraph) -> str:
    """Which cache slots each new token may look at: bool [b, 1, s, capacity]."""
    capacity = graph.op("Squeeze", [graph.op("Shape", ["past_key.0"], "capacity.shape", start=2, end=3)], "capacity")
    slots = graph.op("Range", [graph.constant(0), capacity, graph.constant(1)], "slots")
    own = graph.op("Unsqueeze", ["position_ids", graph.constant([1, 3])], "position")          # [b, 1, s, 1]
    visible = graph.op("LessOrEqual", [slots, own], "mask.past")
    if graph.config.sliding_window is None:
        return visible
    oldest = graph.op("Sub", [own, graph.constant(graph.config.sliding_window)], "mask.before")
    return graph.op("And", [visible, graph.op("Greater", [slots, oldest], "mask.recent")], "mask")


def _attention(graph: DecoderGraph, x: str, visible: str, layer: int) -> str:
    config, name, turned = graph.config, f"layers.{layer}", {}
    heads, parts = graph.queries_keys_values(x, layer)
    for (part, count), value in zip(heads.items(), parts):
        value = graph.head_norm(value, f"{name}.{part}_norm", count)
        value = graph.op("Transpose", [value], f"{name}.{part}.turned", perm=[0, 2, 1, 3])
        if part != "v" and config.positions == "rope":
            tables = [graph.weight("rope.cos"), graph.weight("rope.sin")]
            value = graph.op("RotaryEmbedding", [value, *tables, "position_ids"], f"{name}.{part}.rotated")
        turned[part] = value if part == "q" else graph.cached_values(value, layer, part)
    for (past, present), part in zip(graph.cache(layer, graph.dtype), "kv"):
        turned[part] = graph.op("TensorScatter", [past, turned[part], "write_index"], present, axis=2)
    attended = graph.op("Attention", [turned["q"], turned["k"], turned["v"], visible], f"{name}.attended",
                        scale=config.head_dim ** -0.5)
    rows = graph.op("Transpose", [attended], f"{name}.attended.turned", perm=[0, 2, 1, 3])
    rows = graph.op("Reshape", [rows, graph.constant([0, -1, heads["q"] * config.head_dim])], f"{name}.attended.rows")
    return graph.linear(rows, f"{name}.o")
