"""A linear recurrence over at most 64 tokens in closed form, by matrix products: no loop over tokens.

    S_t = exp(g_t) S_{t-1} + k_t d_t^T,    o_t = S_t^T q_t,    d_t = v_t,  or  beta_t (v_t - exp(g_t) S_{t-1}^T k_t)

With G the sums of g up to a token, o = exp(G) q S_0 + (q k^T * E) d and S = exp(G_last) S_0 + (k exp(G_last - G))^T d, where
E[t, j] = exp(G_t - G_j) for j <= t, which is at most 1, and 0 beyond. The delta rule (Yang et al. 2024) asks for d with
(I + L) d = beta (v - exp(G) k S_0), L[t, j] = beta_t E[t, j] k_t . k_j for j < t. The inverse of I + L is built from the inverses X of
its diagonal blocks of 1, 2, 4 .. 32 tokens: a block twice as large has -X L X in its corner. (The product of I + (-L)^(2^n) costs as
much and is useless in float32 where keys repeat, as in a row of blanks: the powers grow to 1e17 before they cancel.)

Padding has g = 0 and d = 0, so that it leaves the state alone. All of it is float32, states too.
"""

import numpy as np

LEVELS = (1, 2, 4, 8, 16, 32)


def recurrence(graph, layer: int, q: str, k: str, v: str, decay: str, beta: str | None) -> str:
    """o [b, s, heads, values]; q, k [b, s, heads, keys], v [b, s, heads, values], decay (g) and beta (None: d = v) [b, s, heads].

    State: [b, heads, keys, values].
    """
    name, (past, present) = f"layers.{layer}.chunk", graph.state(layer, "state")

    def op(kind, inputs, output, **how):
        return graph.op(kind, inputs, f"{name}.{output}", **how)

    def turned(x, output, perm=(0, 2, 1, 3)):
        return op("Transpose", [x], output, perm=list(perm))

    lower = graph.once("chunk.lower", lambda: _masks(graph))
    q, k, v = (turned(x, f"{part}") for x, part in zip((q, k, v), "qkv"))
    keys = turned(k, "k.columns", (0, 1, 3, 2))
    g = op("Unsqueeze", [turned(decay, "g.heads", (0, 2, 1)), graph.constant([3])], "g")                       # [b, heads, s, 1]
    sums = op("MatMul", [lower, g], "sums")
    last = op("ReduceSum", [g, graph.constant([2])], "sums.last")
    since = op("Sub", [sums, turned(sums, "sums.row", (0, 1, 3, 2))], "since")
    since = op("Exp", [op("Add", [since, "chunk.beyond"], "since.causal")], "since.decay")                     # E
    so_far, to_come = op("Exp", [sums], "decay"), op("Exp", [op("Sub", [last, sums], "rest")], "rest.decay")
    if beta:
        beta = op("Unsqueeze", [turned(beta, "beta.heads", (0, 2, 1)), graph.constant([3])], "beta")
        seen = op("Mul", [op("MatMul", [k, past], "seen.past"), so_far], "seen")
        v = op("Mul", [op("Sub", [v, seen], "news"), beta], "delta.alone")
        among = op("Mul", [op("Mul", [op("MatMul", [k, keys], "k.k"), since], "among"), beta], "among.beta")   # L, and more
        v = op("MatMul", [_inverse(graph, op, among), v], "delta")
    scores = op("Mul", [op("MatMul", [q, keys], "q.k"), since], "scores")
    before = op("Mul", [op("MatMul", [q, past], "before.past"), so_far], "before")
    out = op("Add", [before, op("MatMul", [scores, v], "within")], "out")
    added = op("MatMul", [keys, op("Mul", [v, to_come], "v.rest")], "added")
    graph.op("Add", [op("Mul", [past, op("Exp", [last], "decay.last")], "kept"), added], present)
    return turned(out, "out.rows")


def _inverse(graph, op, lower: str) -> str:
    """The inverse of I + L, [b, heads, s, s]; lower: has L below its diagonal."""
    def corner(level):
        return op("Mul", [lower, f"chunk.level.{level}"], f"corner.{level}")

    inverse = op("Sub", ["chunk.unit", corner(LEVELS[0])], f"inverse.{LEVELS[0]}")
    for level in LEVELS[1:]:
        product = op("MatMul", [op("MatMul", [inverse, corner(level)], f"left.{level}"), inverse], f"both.{level}")
        inverse = op("Sub", [inverse, product], f"inverse.{level}")
    return inverse


def valid(graph) -> str:
    """1 for real tokens and 0 for padding, float32 [b, s, 1]."""
    def make():
        tokens = graph.op("Squeeze", [graph.op("Shape", ["input_ids"], "tokens.shape", start=1, end=2)], "tokens.count")
        steps = graph.op("Range", [graph.constant(0), tokens, graph.constant(1)], "steps")
        real = graph.op("Less", [steps, graph.op("Unsqueeze", ["counts", graph.constant([1])], "counts.column")], "steps.real")
        return graph.cast(graph.op("Unsqueeze", [real, graph.constant([2])], "steps.real.column"), "float32", "valid")
    return graph.once("valid", make)


def repeated(graph, x: str, heads: int, times: int, size: int, output: str) -> str:
    """x [b, s, heads, size], each head `times` in a row."""
    if times == 1:
        return x
    x = graph.op("Unsqueeze", [x, graph.constant([3])], f"{output}.apart")
    x = graph.op("Expand", [x, graph.constant([1, 1, 1, times, 1])], f"{output}.repeated")
    return graph.op("Reshape", [x, graph.constant([0, 0, heads * times, size])], output)


def _masks(graph) -> str:
    """[s, s], float32: chunk.lower, 1 where j <= t; chunk.beyond, -1e9 where j > t; chunk.unit; chunk.level.n, 1 where t is in the
    second half of a block of 2n tokens and j in its first."""
    valid(graph)
    rows, columns = (graph.op("Unsqueeze", ["steps", graph.constant([axis])], f"steps.{axis}") for axis in (1, 0))
    graph.cast(graph.op("Equal", [rows, columns], "chunk.same"), "float32", "chunk.unit")
    lower = graph.cast(graph.op("GreaterOrEqual", [rows, columns], "chunk.past"), "float32", "chunk.lower")
    one, far = graph.constant(1, np.float32), graph.constant(-1e9, np.float32)
    graph.op("Mul", [graph.op("Sub", [one, lower], "chunk.upper"), far], "chunk.beyond")
    if any(layer.mixer == "delta" for layer in graph.config.layers):
        blocks = {1: (rows, columns)}
        for level in (*LEVELS, 2 * LEVELS[-1]):
            if level > 1:
                blocks[level] = [graph.op("Div", [x, graph.constant(level)], f"{x}.block.{level}") for x in (rows, columns)]
        for level in LEVELS:
            together = graph.op("Equal", blocks[2 * level], f"chunk.together.{level}")
            after = graph.op("Greater", blocks[level], f"chunk.after.{level}")
            graph.cast(graph.op("And", [together, after], f"chunk.corner.{level}"), "float32", f"chunk.level.{level}")
    return lower
