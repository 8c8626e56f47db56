"""What the graphs of a decoder have in common: inputs, caches, the walk through the layers, linears, norms, logits.

The interface of the portable and the fast one (docs/formats.md, "Graph interface"): input_ids, position_ids int64 [b, s], write_index int64 [b],
logits_positions int64 [b, k], past_key.L and past_value.L [b, kv_heads, capacity, head_dim]; logits float32
[b, k, vocab], present_key.L and present_value.L. Right padding; slot i of a cache row holds the token at position i. A model with recurrent
layers takes at most CHUNK tokens a call, and has more: counts int64 [b], how many of each row's tokens are real; past_conv.L
float32 [b, channels, kernel - 1], past_state.L float32 [b, heads, head_dim, state_dim], and present_conv.L, present_state.L.

A quantized linear is `DequantizeLinear` + `MatMul`: standard operators, which ONNX Runtime fuses into MatMulNBits while
loading and TensorRT keeps as a weight-only quantized product. Where the checkpoint rounds the inputs of its linears to
int8 (models/network/activations.py), the same numbers come from standard operators before the product: QuantizeLinear and
DequantizeLinear for stored scales; Abs, ReduceMax, Div, Round, Mul for a scale of each row, once for all linears that
read the input.

What a layer's mixer and MLP compute is in `mixers/`, a file each: a function of the graph, x [b, s, hidden] and the layer's number
that gives [b, s, hidden].
"""

import numpy as np

from export.graph import ELEMENT_TYPES, GraphBuilder
from export.mixers import attention, chunk, delta, gated, mamba, mlp, short_conv
from models.network.config import LayerConfig, ModelConfig
from runtime.layout import rope_name

OUTPUTS = {"attention": "o", "conv": "conv_out", "delta": "delta_out", "mamba": "mamba_out"}      # the last linear of a mixer
RECURRENT = {"conv": short_conv.mixer, "delta": delta.mixer, "mamba": mamba.mixer, "gru": gated.mixer, "lstm": gated.mixer}

class DecoderGraph(GraphBuilder):
    """A graph builder for the model of a manifest, computing in dtype: "float32", "float16" or "bfloat16"."""

    def __init__(self, manifest: dict, dtype: str):
        super().__init__(manifest["weights"])
        self.config, self.dtype = ModelConfig.from_dict(manifest["model"]["config"]), dtype
        self.int8_rows = manifest["model"].get("activations", {}).get("per") == "row"
        self._made: dict[str, str] = {}                     # what several linears read: tables, rounded inputs

    def tokens(self, *, positions: bool = True) -> None:
        """Declare the token inputs; `positions` False leaves out position_ids, for a graph that does not read them."""
        self.input("input_ids", "int64", ["b", "s"])
        if positions:
            self.input("position_ids", "int64", ["b", "s"])
        self.input("write_index", "int64", ["b"])
        self.input("logits_positions", "int64", ["b", "k"])
        if self.config.recurrent:
            self.input("counts", "int64", ["b"])
        self.output("logits", "float32", ["b", "k", self.config.vocab_size])

    def embedded(self, rows: str) -> str:
        """Rows of the token table, plus those of the positions where they are learned."""
        if self.config.positions != "learned":
            return rows
        positions = self.op("Gather", [self.weight("position_embed.weight"), "position_ids"], "positions")
        return self.op("Add", [rows, positions], "embedded.positions")

    def layers(self, x: str, last: str | None = None) -> tuple[str, str]:
        """The stream after all layers, normalized by the norm `last` where it is given and not, and as it is."""
        config, normed = self.config, self.normed(x, "layers.0.attn_norm")
        for number, layer in enumerate(config.layers):
            name, following = f"layers.{number}", f"layers.{number + 1}.attn_norm" if number + 1 < len(config.layers) else last
            mixed = RECURRENT[layer.mixer](self, normed, number) if layer.mixer in RECURRENT else self.attention(normed, number)
            if not layer.mlp_size:
                normed, x = self.added(x, mixed, f"{name}.attn", "", following)
                continue
            normed, x = self.added(x, mixed, f"{name}.attn", OUTPUTS[layer.mixer], f"{name}.mlp_norm")
            made = mlp.experts(self, normed, number) if layer.experts else mlp.mlp(self, normed, name, layer.mlp_size, self.block_output)
            if config.per_layer_size or config.layer_scalar:
                _, x = self.added(x, made, f"{name}.mlp", "down", None)
                x = mlp.per_layer(self, x, number)
                normed = self.normed(x, following)
            else:
                normed, x = self.added(x, made, f"{name}.mlp", "down", following)
        return normed, x

    def added(self, x: str, made: str, block: str, linear: str, following: str | None) -> tuple[str, str]:
        """(norm(x + made), x + made) for what a block has made, itself normalized before where the model does that. linear: the
        block's last, whose bias is in `made` already; following: the norm to come, None for none."""
        if f"{block}_post_norm.weight" in self.stored:
            made = self.norm(made, f"{block}_post_norm", f"{block}_post")
        layer, _, kind = block.rpartition(".")
        x = self.op("Add", [x, made], f"{layer}.after_{'attention' if kind == 'attn' else kind}")
        return self.normed(x, following), x

    def normed(self, x: str, norm: str | None) -> str:
        return self.norm(x, norm, norm.replace("_norm", "_input")) if f"{norm}.weight" in self.stored else x

    def block_output(self, x: str, name: str) -> str:
        """The last linear of a block."""
        return self.linear(x, name)

    def attention(self, x: str, layer: int) -> str:
        return attention.mixer(self, x, layer)

    def cache(self, layer: int, dtype: str) -> list[tuple[str, str]]:
        """Declare a layer's caches: (past, present) of the keys and of the values."""
        config = self.config.layers[layer]
        shape = ["b", config.kv_heads, "capacity", self.config.head_size(config)]
        return [(self.input(f"past_{kind}.{layer}", dtype, shape),
                 self.output(f"present_{kind}.{layer}", dtype, shape)) for kind in ("key", "value")]

    def state(self, layer: int, kind: str) -> tuple[str, str]:
        """Declare a recurrent layer's "conv" [channels, kernel - 1] or "state" [heads, keys, values]: (past, present)."""
        config = self.config.layers[layer]
        shape = ["b", *self.config.state_shapes(config)[kind]]
        if kind == "state" and config.mixer == "mamba":       # whose keys are B, and values x
            shape[2:] = shape[:1:-1]
        return (self.input(f"past_{kind}.{layer}", "float32", shape), self.output(f"present_{kind}.{layer}", "float32", shape))

    def rope(self, layer: LayerConfig, *parts: str) -> list[str]:
        """Those of a layer's rotary tables ("cos", "sin", "query") that there are."""
        rotates = self.config.rope(layer) is not None
        return self.weights(rope_name(layer.rope), *parts) if rotates else []

    def once(self, name: str, make) -> str:
        """The value `name`, made by `make()` when first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def cast(self, value: str, dtype: str, output: str) -> str:
        return self.op("Cast", [value], output, to=ELEMENT_TYPES[dtype])

    def wide(self, value: str) -> str:
        """A value of the graph's type in float32."""
        return value if self.dtype == "float32" else self.once(f"{value}.float32", lambda: self.cast(value, "float32", f"{value}.float32"))

    def own_type(self, value: str, dtype: str, output: str) -> str:
        """A value of `dtype` in the type that the graph computes in."""
        return value if dtype == self.dtype else self.cast(value, self.dtype, output)

    def weights(self, name: str, *parts: str) -> list[str]:
        """Those of a matrix's or a norm's tensors that are stored."""
        return [self.weight(f"{name}.{part}") for part in parts if f"{name}.{part}" in self.stored]

    def holds(self, name: str) -> bool:
        """Whether a matrix is stored under this name."""
        return f"{name}.weight" in self.stored or f"{name}.codes" in self.stored

    def dequantized(self, name: str, axis: int) -> str:
        """A stored matrix in the graph's type. axis: of the inputs of its product, along which scales repeat over a group.

        Asked for twice, as a tied table is, it is one value.
        """
        if f"{name}.weight" in self.stored:
            return self.weight(f"{name}.weight")
        if name not in self._made:
            shape, scales = (self.stored[f"{name}.{part}"]["shape"] for part in ("codes", "scales"))
            scale = self.own_type(self.weight(f"{name}.scales"), "float16", f"{name}.scales.cast")
            codes, *zeros = self.weights(name, "codes", "zeros")
            blocks = {"axis": axis, "block_size": shape[axis] // scales[axis]} if len(scales) == 2 else {"axis": 1 - axis}
            self._made[name] = self.op("DequantizeLinear", [codes, scale, *zeros], f"{name}.dequantized", **blocks)
        return self._made[name]

    def linear(self, x: str, name: str, *, bias: bool = True) -> str:
        """x @ W, plus the bias where there is one and the caller does not add it. x is rounded where the model asks for it."""
        product = self.product(x, name)
        if not (bias and f"{name}.bias" in self.stored):
            return product
        return self.op("Add", [product, self.weight(f"{name}.bias")], f"{name}.sum")

    def product(self, x: str, name: str) -> str:
        """x @ W, x [..., K] rounded as the checkpoint says."""
        if f"{name}.input_scale" in self.stored:
            x = self.fake_int8(x, f"{name}.input_scale", f"{name}.rounded")
        elif self.rounds_rows(name):
            x = self.fake_int8_rows(x)
        return self.op("MatMul", [x, self.dequantized(name, 0)], f"{name}.product")

    def rounds_rows(self, name: str) -> bool:
        return self.int8_rows and name.startswith("layers.") and f"{name}.codes" in self.stored

    def fake_int8_rows(self, x: str) -> str:
        """x rounded to int8 row by row: models.network.activations.round_rows, step for step and in float32."""
        if f"{x}.rounded" not in self._made:
            wide, scale = self.row_scales(x)
            steps = self.op("Round", [self.op("Div", [wide, scale], f"{x}.scaled")], f"{x}.whole")
            rounded = self.op("Mul", [steps, scale], f"{x}.rounded")
            self._made[rounded] = self.own_type(rounded, "float32", f"{x}.rounded.cast")
        return self._made[f"{x}.rounded"]

    def row_scales(self, x: str) -> tuple[str, str]:
        """x [..., K] in float32, and max|x| / 127 of each row, [..., 1]."""
        wide, scales = self.wide(x), f"{x}.row_scales"
        if scales not in self._made:
            largest = self.op("ReduceMax", [self.op("Abs", [wide], f"{x}.abs"), self.constant([-1])], f"{x}.max")
            # a row of zeros has a scale too
            largest = self.op("Max", [largest, self.constant(1e-30, np.float32)], f"{x}.max.positive")
            self._made[scales] = self.op("Div", [largest, self.constant(127, np.float32)], scales)
        return wide, scales

    def fake_int8(self, x: str, scale: str, output: str) -> str:
        """x rounded to int8 with a stored float32 scalar as scale, as QuantizeLinear and DequantizeLinear do."""
        scale, zero = self.own_type(self.weight(scale), "float32", f"{output}.scale"), self.constant(0, np.int8)
        return self.op("DequantizeLinear", [self.op("QuantizeLinear", [x, scale, zero], f"{output}.codes"), scale, zero], output)

    def cached_values(self, x: str, layer: int, part: str) -> str:
        """Keys or values [b, kv_heads, s, head_dim] with the values an int8 cache has for them, where the model asks for one."""
        scale, name = f"layers.{layer}.{part}_scale", f"layers.{layer}.{part}.int8"
        if scale not in self.stored:
            return x
        per_channel = self.stored[scale]["shape"][0] > 1
        config = self.config.layers[layer]
        shape = [1, config.kv_heads, 1, self.config.head_size(config)] if per_channel else [1]
        step = self.op("Reshape", [self.weight(scale), self.constant(shape)], f"{name}.scale")
        step = self.own_type(step, "float32", f"{name}.scale.cast")
        low, high = (self.constant(limit, self.dtype) for limit in (-128, 127))
        steps = self.op("Round", [self.op("Div", [x, step], f"{name}.steps")], f"{name}.rounded")
        return self.op("Mul", [self.op("Clip", [steps, low, high], f"{name}.codes"), step], name)

    def split_linear(self, x: str, name: str, parts: dict[str, int]) -> list[str]:
        """Linears of one input, fused as `name` or stored one by one: {part: outputs} -> one value a part."""
        prefix = name.rpartition(".")[0]
        if not self.holds(name):
            return [self.linear(x, f"{prefix}.{part}") for part in parts]
        return self.op("Split", [self.linear(x, name), self.constant(list(parts.values()))],
                       [f"{prefix}.{part}.split" for part in parts], axis=-1)

    def activation(self, x: str, output: str) -> str:
        if self.config.activation == "silu":
            return self.op("Mul", [x, self.op("Sigmoid", [x], f"{output}.sigmoid")], output)
        return self.op("Gelu", [x], output, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")

    def norm(self, x: str, name: str, output: str) -> str:
        """RMSNorm or LayerNorm over the last axis, by whether a bias is stored."""
        weights = self.weights(name, "weight", "bias")
        return self.op("LayerNormalization" if len(weights) > 1 else "RMSNormalization", [x, *weights], output, axis=-1,
                       epsilon=self.config.norm_eps)

    def rows(self, table: str, output: str) -> str:
        """Rows of a table, [b, s, ...], of input_ids."""
        return self.op("Gather", [self.dequantized(table, 1), "input_ids"], output)

    def recurrence(self, layer: int, q: str, k: str, v: str, decay: str, beta: str | None = None) -> str:
        return chunk.recurrence(self, layer, q, k, v, decay, beta)

    def selected(self, x: str) -> str:
        """Rows of x [b, s, hidden] at logits_positions: [b, k, hidden]."""
        index = self.op("Unsqueeze", ["logits_positions", self.constant([-1])], "logits_index")
        return self.op("GatherND", [x, index], "selected", batch_dims=1)

    def logits(self, value: str) -> None:
        """Name the output, in float32 whatever the graph computes in."""
        if cap := self.config.logits_softcap:
            share = self.op("Div", [self.wide(value), self.constant(cap, np.float32)], "head.share")
            self.op("Mul", [self.op("Tanh", [share], "head.capped"), self.constant(cap, np.float32)], "logits")
        else:
            self.cast(value, "float32", "logits") if self.dtype != "float32" else self.op("Identity", [value], "logits")
