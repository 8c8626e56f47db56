"""The tensors of a bundle's weights file, in order: one walk over a model's configuration.

`export/weights.py` writes by it and `tensors.py` checks by it. What an item is stored as (codes, one fused matrix or several) is
theirs to say; what each tensor means is told in export/weights.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .errors import UserError

GATED = {"gru": 3, "lstm": 4}      # gates of the mixers that are gated recurrent units
CHUNK = 64                        # most tokens of a row that a graph with recurrent layers takes in one call


class Item(NamedTuple):
    """kind "linear": a matrix of `parts` outputs each and shape[0] inputs, fused as `name` or stored one by one beside it;
    "table": a matrix whose rows are looked up; "dense": of the type that the graphs compute in; "float32"."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: dict[str, int] | None = None
    bias: bool = False


def layout(model: dict, cache: dict | None) -> Iterator[Item]:
    """Everything that a manifest's "model" has. cache: how its int8 keys and values are scaled, if they are.

    Raises UserError, KeyError or TypeError where the configuration contradicts itself.
    """
    config, context, hidden = model["config"], model["max_context"], model["config"]["hidden_size"]
    own, count = config.get("per_layer_size", 0), len(config["layers"])
    yield Item("embed", "table", (config["vocab_size"], hidden))
    if config["positions"] == "learned":
        yield Item("position_embed.weight", "dense", (context, hidden))
    for number, size in ropes(config).items():
        for part in ("cos", "sin"):
            yield Item(f"{rope_name(number)}.{part}", "dense", (context, size // 2))
        if (rope_scaling(config, number) or {}).get("llama_4_scaling_beta"):
            yield Item(f"{rope_name(number)}.query", "dense", (context,))
    if own:
        yield Item("per_layer_embed", "table", (config["vocab_size"], count * own))
        yield Item("per_layer_projection", "linear", (hidden,), {"per_layer_projection": count * own})
        yield Item("per_layer_norm.weight", "dense", (own,))
    for number, layer in enumerate(config["layers"]):
        for item in _layer(config, layer, cache):
            yield item._replace(name=f"layers.{number}.{item.name}")
    yield from _norm(config, "final_norm")
    if not config["tied_embeddings"]:
        yield Item("head", "linear", (hidden,), {"head": config["vocab_size"]})


def head_size(config: dict, layer: dict) -> int:
    return layer.get("head_dim") or config["head_dim"]


def ropes(config: dict) -> dict[int, int]:
    """The rotary tables that some layer reads, and the size of the heads they are for. Raises UserError where those differ."""
    found = {}
    for layer in config["layers"] if config["positions"] != "learned" else ():
        number, size = layer.get("rope", 0), head_size(config, layer)
        if layer.get("mixer", "attention") == "attention" and number >= 0 and found.setdefault(number, size) != size:
            raise UserError(f"RoPE {number} is for heads of {found[number]} and of {size}, and a bundle has one table of it")
    return dict(sorted(found.items()))


def rope_name(number: int) -> str:
    return f"rope.{number}" if number else "rope"


def rope_scaling(config: dict, number: int) -> dict | None:
    return config["ropes"][number - 1]["scaling"] if number else config["rope_scaling"]


def _norm(config: dict, name: str) -> Iterator[Item]:
    for part in ("weight", "bias") if config["norm"] == "layer" else ("weight",):
        yield Item(f"{name}.{part}", "dense", (config["hidden_size"],))


def _layer(config: dict, layer: dict, cache: dict | None) -> Iterator[Item]:
    hidden, size, mixer = config["hidden_size"], head_size(config, layer), layer.get("mixer", "attention")
    order, own, attends = config.get("norm_order", "pre"), config.get("per_layer_size", 0), mixer == "attention"
    heads, groups, width, kernel = layer["heads"], layer["kv_heads"], layer.get("state_dim", 0), layer.get("kernel", 0)
    shares, norms = layer.get("cache_source") is not None, []
    if attends and config["qk_norm"]:
        whole = config.get("qk_norm_over", "head") == "all"
        norms = [("q_norm", heads * size if whole else size), ("k_norm", groups * size if whole else size)][:1 if shares else 2]
    yield from _norm(config, "attn_norm") if order != "post" else ()
    for name, length in norms:
        yield Item(f"{name}.weight", "dense", (length,))
    yield from _norm(config, "attn_post_norm") if order != "pre" else ()
    if mixer in GATED:
        for part in ("input", "state"):
            yield Item(f"gates_{part}", "dense", (1, GATED[mixer] * hidden, hidden))
        for part in ("input", "state"):
            yield Item(f"gates_{part}_bias", "dense", (GATED[mixer] * hidden,))
        return
    yield from _norm(config, "mlp_norm") if order != "post" else ()
    yield from _norm(config, "mlp_post_norm") if order != "pre" else ()
    if attends:
        q, kv, bias = heads * size, groups * size, config["attention_bias"]
        yield Item("q", "linear", (hidden,), {"q": q}, bias) if shares else Item("qkv", "linear", (hidden,), {"q": q, "k": kv, "v": kv}, bias)
        if config.get("attention_gate"):
            yield Item("attn_gate", "linear", (hidden,), {"attn_gate": q}, bias)
        yield Item("o", "linear", (q,), {"o": hidden}, config["output_bias"])
    elif mixer == "conv":
        bias = bool(config.get("conv_bias"))
        yield Item("conv_in", "linear", (hidden,), {f"conv_{part}": hidden for part in "bcx"}, bias)
        yield from _convolution(hidden, kernel, bias)
        yield Item("conv_out", "linear", (hidden,), {"conv_out": hidden}, bias)
    elif mixer == "delta":
        channels, values = 2 * groups * size + heads * width, heads * width
        yield Item("delta_in", "linear", (hidden,), {"delta_qkv": channels, "delta_z": values})
        yield Item("delta_b", "linear", (hidden,), {"delta_b": heads})
        yield Item("delta_a", "linear", (hidden,), {"delta_a": heads})
        yield from _convolution(channels, kernel, False)
        yield from _recurrence(heads, width)
        yield Item("delta_out", "linear", (values,), {"delta_out": hidden})
    elif mixer == "mamba":
        values = heads * size
        channels = values + 2 * groups * width
        yield Item("mamba_in", "linear", (hidden,), {"mamba_z": values, "mamba_xbc": channels})
        yield Item("mamba_dt", "linear", (hidden,), {"mamba_dt": heads})
        yield from _convolution(channels, kernel, bool(config.get("conv_bias")))
        yield Item("skip", "float32", (heads,))
        yield from _recurrence(heads, values)
        yield Item("mamba_out", "linear", (values,), {"mamba_out": hidden})
    else:
        raise UserError(f"a layer is of the kind {mixer!r}, which this version does not know")
    if experts := layer.get("experts", 0):
        yield Item("router", "linear", (hidden,), {"router": experts})
        if config.get("router_bias"):
            yield Item("router_bias", "float32", (experts,))
        for number in range(experts):
            yield from _mlp(config, f"experts.{number}.", layer["mlp_size"])
        if layer.get("shared_size", 0):
            yield from _mlp(config, "shared.", layer["shared_size"])
    else:
        yield from _mlp(config, "", layer["mlp_size"])
    if own:
        yield Item("per_layer_gate", "linear", (hidden,), {"per_layer_gate": own})
        yield Item("per_layer_proj", "linear", (own,), {"per_layer_proj": hidden})
        yield from _norm(config, "per_layer_norm")
    if config.get("layer_scalar"):
        yield Item("scalar", "float32", (1,))
    for part in ("k_scale", "v_scale") if cache and attends and not shares else ():
        yield Item(part, "float32", (groups * size if cache["per"] == "channel" else 1,))


def _convolution(channels: int, kernel: int, bias: bool) -> Iterator[Item]:
    yield Item("conv.weight", "float32", (channels, kernel))
    if bias:
        yield Item("conv.bias", "float32", (channels,))


def _recurrence(heads: int, normed: int) -> Iterator[Item]:
    yield Item("decay", "float32", (heads,))
    yield Item("dt_bias", "float32", (heads,))
    yield Item("state_norm.weight", "dense", (normed,))


def _mlp(config: dict, name: str, size: int) -> Iterator[Item]:
    hidden, bias = config["hidden_size"], config["mlp_bias"]
    parts = {"gate": size, "up": size} if config["gated_mlp"] else {"up": size}
    yield Item(name + ("gate_up" if config["gated_mlp"] else "up"), "linear", (hidden,), parts, bias)
    yield Item(f"{name}down", "linear", (size,), {"down": hidden}, bias)
