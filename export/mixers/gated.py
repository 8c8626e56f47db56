"""GRU and LSTM layers as the ONNX operators of those names, which loop over the tokens inside.

Computed in float32, whatever the graph computes in. State: float32 [b, 1, vectors, hidden], h, or h and c. Padding behind a row's
`counts` tokens is left out by sequence_lens; of a row of none, ONNX does not say what comes out, so it keeps its state by a choice of ours.
"""

import numpy as np


def mixer(graph, x: str, layer: int) -> str:
    shape, hidden, name = graph.config.layers[layer], graph.config.hidden_size, f"layers.{layer}"
    past, present = graph.state(layer, "state")
    lengths = graph.once("lengths.rows", lambda: graph.cast("counts", "int32", "lengths.rows"))

    def op(kind, inputs, output, **how):
        return graph.op(kind, inputs, f"{name}.gates.{output}", **how)

    before = op("Transpose", [past], "before", perm=[2, 1, 0, 3])                                       # [vectors, 1, b, hidden]
    vectors = [f"{name}.gates.before.{number}" for number in range(shape.head_dim)]
    vectors = graph.op("Split", [before], vectors, axis=0, num_outputs=len(vectors)) if len(vectors) > 1 else [before]
    first = [op("Squeeze", [vector, graph.constant([0])], f"first.{number}") for number, vector in enumerate(vectors)]
    tokens = op("Transpose", [graph.wide(x)], "tokens", perm=[1, 0, 2])                                 # [s, b, hidden]
    weights = [graph.wide(graph.weight(f"{name}.gates_{part}")) for part in ("input", "state")]
    biases = op("Concat", [graph.wide(graph.weight(f"{name}.gates_{part}_bias")) for part in ("input", "state")], "biases", axis=0)
    biases = op("Unsqueeze", [biases, graph.constant([0])], "bias")
    made = [f"{name}.gates.{part}" for part in ("all", "last.0", "last.1")][:1 + len(first)]
    how = {"linear_before_reset": 1} if shape.mixer == "gru" else {}
    graph.op(shape.mixer.upper(), [tokens, *weights, biases, lengths, *first], made, hidden_size=hidden, **how)
    last = [op("Unsqueeze", [vector, graph.constant([0])], f"after.{number}") for number, vector in enumerate(made[1:])]
    last = op("Concat", last, "after", axis=0) if len(last) > 1 else last[0]
    moved = graph.once("lengths.moved", lambda: graph.op("Unsqueeze", [graph.op("Greater", [lengths, graph.constant(0, np.int32)], "lengths.some"),
                                                                       graph.constant([1])], "lengths.moved"))
    kept = op("Where", [moved, last, before], "kept")
    graph.op("Transpose", [kept], present, perm=[2, 1, 0, 3])
    rows = op("Transpose", [op("Squeeze", [made[0], graph.constant([1])], "rows")], "output", perm=[1, 0, 2])
    return graph.own_type(rows, "float32", f"{name}.gates.output.cast")
