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
from export.mixers import attention


def portable_graph(manifest: dict, dtype: str) -> DecoderGraph:
    """Build the graph of a manifest's model. dtype: "float32", "float16" or "bfloat16", of activations and caches."""
    graph = DecoderGraph(manifest, dtype)
    config = graph.config
    graph.tokens()
    table = graph.dequantized("embed", 1)
    x = graph.embedded(graph.rows("embed", "embedded"))
    for layer in config.layers:
        if layer.mixer == "attention":
            attention.mask(graph, config.window(layer))
    _, x = graph.layers(x)
    x = graph.norm(graph.selected(x), "final_norm", "final")
    if config.tied_embeddings:
        # (table xᵀ)ᵀ, not x tableᵀ: for the latter TensorRT keeps a second, transposed table where the batch is dynamic.
        columns = graph.op("Transpose", [x], "head.columns", perm=[0, 2, 1])
        product = graph.op("MatMul", [table, columns], "head.product")
        graph.logits(graph.op("Transpose", [product], "head.rows", perm=[0, 2, 1]))
    else:
        graph.logits(graph.linear(x, "head"))
    return graph
