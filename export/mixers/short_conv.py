"""The short convolution of LFM2, out(c(u) * conv(b(u) * x(u))), and the causal depthwise convolution that other mixers begin with.

A tap is a shifted product, so that [b, s, channels] stays as the linears have it. State: the last kernel - 1 real inputs,
float32 [b, channels, kernel - 1].
"""

from runtime.errors import UserError

END = 2**31 - 1                   # of a slice


def mixer(graph, u: str, layer: int) -> str:
    name, hidden = f"layers.{layer}", graph.config.hidden_size
    b, c, x = graph.split_linear(u, f"{name}.conv_in", {f"conv_{part}": hidden for part in "bcx"})
    mixed = convolved(graph, graph.op("Mul", [b, x], f"{name}.conv.input"), layer)
    mixed = graph.own_type(mixed, "float32", f"{name}.conv.output")
    return graph.block_output(graph.op("Mul", [c, mixed], f"{name}.conv.gated"), f"{name}.conv_out")


def convolved(graph, x: str, layer: int) -> str:
    """The layer's convolution over x [b, s, channels], float32; its state goes on by `counts` inputs."""
    name, taps = f"layers.{layer}.conv", graph.config.layers[layer].kernel
    if taps < 2:
        raise UserError(f"layer {layer} has a convolution of {taps} tap, which no graph has; the native core may")
    past, present = graph.state(layer, "conv")
    past = graph.op("Transpose", [past], f"{name}.past", perm=[0, 2, 1])
    whole = graph.op("Concat", [past, graph.wide(x)], f"{name}.whole", axis=1)
    last = graph.op("GatherND", [whole, graph.once(f"last.{taps}", lambda: _last(graph, taps))], f"{name}.last", batch_dims=1)
    graph.op("Transpose", [last], present, perm=[0, 2, 1])
    columns = graph.op("Transpose", [graph.weight(f"{name}.weight")], f"{name}.columns", perm=[1, 0])
    total = None
    for tap, column in enumerate(graph.op("Split", [columns], [f"{name}.tap.{n}" for n in range(taps)], axis=0, num_outputs=taps)):
        end = tap - taps + 1 or END
        shifted = graph.op("Slice", [whole, *map(graph.constant, ([tap], [end], [1]))], f"{name}.shifted.{tap}")
        product = graph.op("Mul", [shifted, column], f"{name}.product.{tap}")
        total = product if total is None else graph.op("Add", [total, product], f"{name}.sum.{tap}")
    for bias in graph.weights(name, "bias"):
        total = graph.op("Add", [total, bias], f"{name}.biased")
    return total


def _last(graph, taps: int) -> str:
    """Where a row's last taps - 1 real inputs are among those kept and the new ones: int64 [b, taps - 1, 1]."""
    first = graph.op("Unsqueeze", ["counts", graph.constant([1])], f"last.{taps}.first")
    steps = graph.op("Add", [first, graph.constant(list(range(taps - 1)))], f"last.{taps}.steps")
    return graph.op("Unsqueeze", [steps, graph.constant([2])], f"last.{taps}")
