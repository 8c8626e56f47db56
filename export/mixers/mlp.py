"""MLPs, mixtures of experts (Shazeer et al. 2017) and what Gemma 4 adds after them.

An expert is an ordinary MLP that sees all tokens, and what it gives is weighed by the router: 0 for tokens that did not choose it.
Every product is then a linear as any other, which is quantized and fused as such, at the price of computing what nobody asked for:
experts / experts_per_token times the work of an engine that gathers tokens (the native core).
"""

import numpy as np


def mlp(graph, x: str, name: str, size: int, down=None) -> str:
    """down(act(gate(x)) * up(x)), or down(act(up(x))), of the linears below `name`. down: how the last of them is made."""
    if graph.config.gated_mlp:
        gate, up = graph.split_linear(x, f"{name}.gate_up", {"gate": size, "up": size})
        hidden = graph.op("Mul", [graph.activation(gate, f"{name}.activated"), up], f"{name}.gated")
    else:
        hidden = graph.activation(graph.linear(x, f"{name}.up"), f"{name}.activated")
    return (down or graph.linear)(hidden, f"{name}.down")


def experts(graph, x: str, layer: int) -> str:
    """The sum of the chosen experts, and of the MLP that every token passes where there is one."""
    shape, name = graph.config.layers[layer], f"layers.{layer}"
    columns = graph.op("Split", [_weights(graph, x, layer)], [f"{name}.weight.{number}" for number in range(shape.experts)], axis=-1,
                       num_outputs=shape.experts)
    total = mlp(graph, x, f"{name}.shared", shape.shared_size) if shape.shared_size else None
    for number, weight in enumerate([columns] if shape.experts == 1 else columns):
        expert = f"{name}.experts.{number}"
        made = graph.op("Mul", [mlp(graph, x, expert, shape.mlp_size), weight], f"{expert}.weighed")
        total = made if total is None else graph.op("Add", [total, made], f"{expert}.total")
    return total


def _weights(graph, x: str, layer: int) -> str:
    """What each expert counts for each token, [b, s, experts]: computed in float32, in the graph's type."""
    config, shape, name = graph.config, graph.config.layers[layer], f"layers.{layer}.router"
    logits = graph.wide(graph.linear(x, name))
    scores = logits if config.router == "chosen" else graph.op("Sigmoid" if config.router == "sigmoid" else "Softmax", [logits],
                                                              f"{name}.scores")
    wanted = scores
    if f"{name}_bias" in graph.stored:
        wanted = graph.op("Add", [scores, graph.weight(f"{name}_bias")], f"{name}.wanted")
    best, index = graph.op("TopK", [wanted, graph.constant([shape.experts_per_token])], [f"{name}.best", f"{name}.chosen"])
    if wanted != scores:
        best = graph.op("GatherElements", [scores, index], f"{name}.gathered", axis=-1)
    if config.router == "chosen":
        best = graph.op("Softmax", [best], f"{name}.softmax")
    elif config.router_normalized:
        total = graph.op("ReduceSum", [best, graph.constant([-1])], f"{name}.sum")
        if config.router == "sigmoid":
            total = graph.op("Add", [total, graph.constant(1e-6, np.float32)], f"{name}.sum.positive")
        best = graph.op("Div", [best, total], f"{name}.normalized")
    none = graph.op("ConstantOfShape", [graph.op("Shape", [logits], f"{name}.shape")], f"{name}.none")
    return graph.own_type(graph.op("ScatterElements", [none, index, best], f"{name}.weights", axis=-1), "float32", f"{name}.weights.cast")


def per_layer(graph, x: str, layer: int) -> str:
    """The stream x after a layer's own input of each token is added and it is multiplied by the layer's number, where it has these."""
    config, name, own = graph.config, f"layers.{layer}", graph.config.per_layer_size
    if own:
        inputs = graph.once("per_layer_inputs", lambda: _per_layer_inputs(graph))
        mine = graph.op("Gather", [inputs, graph.constant(layer)], f"{name}.per_layer_input", axis=2)
        gate = graph.activation(graph.linear(x, f"{name}.per_layer_gate"), f"{name}.per_layer_gate.activated")
        made = graph.linear(graph.op("Mul", [gate, mine], f"{name}.per_layer_gated"), f"{name}.per_layer_proj")
        x = graph.op("Add", [x, graph.norm(made, f"{name}.per_layer_norm", f"{name}.per_layer")], f"{name}.after_per_layer")
    if config.layer_scalar:
        scalar = graph.own_type(graph.weight(f"{name}.scalar"), "float32", f"{name}.scalar.cast")
        x = graph.op("Mul", [x, scalar], f"{name}.scaled")
    return x


def _per_layer_inputs(graph) -> str:
    """Every layer's own input of each token, [b, s, layers, size]: from its embedding and from a table of its own."""
    shape = graph.constant([0, 0, len(graph.config.layers), graph.config.per_layer_size])
    projected = graph.op("Reshape", [graph.linear("embedded", "per_layer_projection"), shape], "per_layer_projection.layers")
    rows = graph.op("Reshape", [graph.rows("per_layer_embed", "per_layer_embed.rows"), shape], "per_layer_embed.layers")
    return graph.op("Add", [graph.norm(projected, "per_layer_norm", "per_layer_norm.normed"), rows], "per_layer_inputs")
