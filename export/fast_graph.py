"""ONNX Runtime's fast graph of a decoder: its fused operators on the CPU, over the portable graph's weights and with its interface.

- attention, rotation and cache update in `GroupQueryAttention`, whose lengths are computed in the graph from
  write_index; QK-norm stays a norm of its own before it; its caches are int8 where the checkpoint has scales for them;
- a linear recurrence (gated delta rule, Mamba-2) in `LinearAttention`, token by token inside the operator;
- residual addition, bias and norm in `SkipSimplifiedLayerNormalization` or `SkipLayerNormalization`;
- quantized linears: left as DequantizeLinear + MatMul, which ONNX Runtime makes MatMulNBits while loading. Where inputs
  are rounded to int8 row by row and the weights are int8 with one scale an output, an int8 product with int32 sums;
- a tied quantized table. ONNX Runtime would unfold DequantizeLinear -> Transpose -> MatMul at every step, so the head is
  a MatMulNBits over unsigned codes, computed in the graph from the same initializer: ONNX Runtime folds that once,
  while loading, packs the result and frees it. Rows of an 8-bit table are looked up in the mapped file, so that only
  the rows used take memory.

GroupQueryAttention takes several new tokens on top of a filled cache only at batch 1; one new token, or prompts into
empty rows, at any batch. It rotates heads of a multiple of 16 numbers, and attends without rotation to a multiple of 8. A layer
that reads another's cache, which it cannot, keeps the portable form. Tables with zero points, of 8-bit floats, or of a width no
block divides keep the portable form: right, but slow.
"""

import numpy as np

from export.decoder_graph import DecoderGraph
from export.graph import MICROSOFT
from export.mixers import attention
from models.network.config import LayerConfig
from runtime.layout import rope_name

BLOCKS = (32, 16)                 # inputs that share a scale in the table's MatMulNBits (64: no faster, KL a third more)
INT8_COMPUTE = 4                  # MatMulNBits' accuracy level: activations in int8 per block, as for the other linears


class FastGraph(DecoderGraph):
    """A decoder graph of ONNX Runtime's fused operators; W8A8 linears are products of integers."""

    def __init__(self, manifest: dict, dtype: str):
        super().__init__(manifest, dtype)
        config = self.config
        self.late_bias = config.norm_order == "pre" and not config.per_layer_size and not config.layer_scalar     # added with the residual
        self.positions = config.positions == "learned" or any(
            layer.mixer == "attention" and (not self.fuses(layer) or config.rope(layer) and (
                not self.rotates(layer) or f"{rope_name(layer.rope)}.query" in self.stored)) for layer in config.layers)

    def build(self) -> None:
        """Add every node."""
        config = self.config
        self.tokens(positions=self.positions)
        x = self.embedded(self.rows("embed", "embedded"))
        self.lengths = self._lengths()
        normed, _ = self.layers(x, "final_norm")
        selected = self.selected(normed)
        self.logits(self.tied_head(selected) if config.tied_embeddings else self.linear(selected, "head"))

    def fuses(self, layer: LayerConfig) -> bool:
        """Whether GroupQueryAttention computes a layer: it cannot read another's cache."""
        return layer.mixer == "attention" and layer.cache_source is None

    def rotates(self, layer: LayerConfig) -> bool:
        """Whether GroupQueryAttention rotates queries and keys: not where they are normalized afterwards, or do not turn."""
        config = self.config
        return config.rope(layer) is not None and not (config.qk_norm and config.qk_norm_last and config.qk_norm_over == "head")

    def product(self, x: str, name: str) -> str:
        if not self.rounds_rows(name) or f"{name}.zeros" in self.stored or self.stored[f"{name}.codes"]["dtype"] != "int8" \
                or len(self.stored[f"{name}.scales"]["shape"]) > 1:
            return super().product(x, name)
        codes, row_scales = self._int8_rows(x)
        scales = self.cast(self.weight(f"{name}.scales"), "float32", f"{name}.scales.float32")
        columns = self.op("MatMulIntegerToFloat", [codes, self.weight(f"{name}.codes"), self.constant(1, np.float32), scales,
                                                   self.constant(128, np.uint8)], f"{name}.columns", domain=MICROSOFT)
        product = self.op("Mul", [columns, row_scales], f"{name}.product")
        return self.own_type(product, "float32", f"{name}.product.cast")

    def _int8_rows(self, x: str) -> tuple[str, str]:
        """Codes of x's rows plus 128, which MLAS multiplies 40 times faster as uint8 than as int8, and the rows' scales."""
        codes, scales = f"{x}.codes", f"{x}.row_scales"
        if codes not in self._made:
            wide, scales = self.row_scales(x)
            steps = self.op("Div", [wide, scales], f"{x}.steps")
            self._made[codes] = self.op("QuantizeLinear", [steps, self.constant(1, np.float32), self.constant(128, np.uint8)], codes)
        return codes, scales

    def _lengths(self) -> list[str]:
        """GroupQueryAttention's seqlens_k int32 [b] (a row's last slot) and total_sequence_length int32 scalar."""
        tokens = self.op("Shape", ["input_ids"], "tokens", start=1, end=2)
        after = self.op("Add", ["write_index", tokens], "lengths")
        last = self.cast(self.op("Sub", [after, self.constant(1)], "last_slots"), "int32", "seqlens_k")
        longest = self.op("ReduceMax", [after], "longest", keepdims=0)
        return [last, self.cast(longest, "int32", "total_sequence_length")]

    def block_output(self, x: str, name: str) -> str:
        return self.linear(x, name, bias=not self.late_bias)

    def added(self, x: str, made: str, block: str, linear: str, following: str | None) -> tuple[str, str]:
        """As one operator, with the bias of `linear` in it, where a norm follows."""
        if f"{following}.weight" not in self.stored:
            return super().added(x, made, block, linear, None)
        if f"{block}_post_norm.weight" in self.stored:
            made = self.norm(made, f"{block}_post_norm", f"{block}_post")
        bias = self.weights(f"{block.rpartition('.')[0]}.{linear}", "bias") if self.late_bias else []
        weights = self.weights(following, "weight", "bias")
        kind = "SkipLayerNormalization" if len(weights) > 1 else "SkipSimplifiedLayerNormalization"
        normed, residual = f"{following}.normed", f"{following}.residual"
        self.op(kind, [x, made, *weights, *bias], [normed, "", "", residual], domain=MICROSOFT, epsilon=self.config.norm_eps)
        return normed, residual

    def attention(self, x: str, layer: int) -> str:
        config, shape, name = self.config, self.config.layers[layer], f"layers.{layer}"
        if not self.fuses(shape):
            return super().attention(x, layer)
        if self.holds(f"{name}.qkv") and not (config.qk_norm or config.v_norm or self.rope(shape, "query")):
            inputs = [self.linear(x, f"{name}.qkv"), "", ""]
        else:
            heads, inputs = attention.queries_keys_values(self, x, layer)
            for i, (part, count) in enumerate(heads.items()):
                inputs[i] = self._heads(inputs[i], layer, part, count)
        scales, how = self.weights(name, "k_scale", "v_scale"), {}
        if scales:
            kind = "PER_CHANNEL" if self.stored[scales[0]]["shape"][0] > 1 else "PER_TENSOR"
            how = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
        if window := config.window(shape):
            how["local_window_size"] = window
        if config.attention_softcap:
            how["softcap"] = config.attention_softcap
        (past_key, present_key), (past_value, present_value) = self.cache(layer, "int8" if scales else self.dtype)
        tables = self.rope(shape, "cos", "sin") if self.rotates(shape) else []
        options = [*(tables or ["", ""]), "", "", "", *scales] if scales else tables
        self.op("GroupQueryAttention", [*inputs, past_key, past_value, *self.lengths, *options],
                [f"{name}.attended", present_key, present_value], domain=MICROSOFT, num_heads=shape.heads,
                kv_num_heads=shape.kv_heads, do_rotary=int(bool(tables)), scale=config.scale(shape), **how)
        return self.block_output(attention.gated(self, f"{name}.attended", x, layer), f"{name}.o")

    def _heads(self, x: str, layer: int, part: str, heads: int) -> str:
        """Queries, keys or values [b, s, heads * head_dim] as GroupQueryAttention takes them."""
        config, shape, name = self.config, self.config.layers[layer], f"layers.{layer}.{part}"
        if part != "v" and not self.rotates(shape) and (tables := self.rope(shape, "cos", "sin")):
            x = self.op("RotaryEmbedding", [x, *tables, "position_ids"], f"{name}.rotated", num_heads=heads)
        if config.v_norm if part == "v" else config.qk_norm:
            x = attention.last_norm(self, attention.head_norm(self, x, layer, part), layer, part)
            x = self.op("Reshape", [x, self.constant([0, -1, heads * config.head_size(shape)])], f"{name}_norm.rows")
        return attention.query_factor(self, x, layer, [2]) if part == "q" else x

    def recurrence(self, layer: int, q: str, k: str, v: str, decay: str, beta: str | None = None) -> str:
        """As chunk.py has it; token by token inside the operator, whatever their number."""
        shape, name, (past, present) = self.config.layers[layer], f"layers.{layer}.recurrence", self.state(layer, "state")
        packed = [self.op("Reshape", [x, self.constant([0, 0, -1])], f"{x}.packed") for x in (q, k, v)]
        self.op("LinearAttention", [*packed, past, decay, *([beta] if beta else [])], [name, present], domain=MICROSOFT, scale=1.0,
                q_num_heads=shape.heads, kv_num_heads=shape.heads, update_rule="gated_delta" if beta else "gated")
        return self.op("Reshape", [name, self.constant([0, 0, shape.heads, -1])], f"{name}.heads")

    def rows(self, table: str, output: str) -> str:
        bits, groups, block = self._table(table)
        if block is None:
            return super().rows(table, output)
        if bits == 4:
            return self.op("GatherBlockQuantized", [self.weight(f"{table}.codes"), "input_ids", self._block_scales(table)],
                           output, domain=MICROSOFT, bits=4, block_size=block, gather_axis=0, quantize_axis=1)
        width = self.stored[f"{table}.codes"]["shape"][1]
        codes = self.op("Gather", [self.weight(f"{table}.codes"), "input_ids"], f"{output}.codes")
        codes = self.cast(codes, self.dtype, f"{output}.cast")
        scales = self.op("Gather", [self._scales(table), "input_ids"], f"{output}.scales")        # [b, s, groups, 1]
        codes = self.op("Reshape", [codes, self.constant([0, 0, groups, width // groups])], f"{output}.groups")
        scaled = self.op("Mul", [codes, scales], f"{output}.scaled")
        return self.op("Reshape", [scaled, self.constant([0, 0, width])], output)

    def _table(self, name: str) -> tuple[int, int, int | None]:
        """Bits and groups of a quantized table, and the inputs that share a scale in MatMulNBits; None: the portable form."""
        codes = self.stored.get(f"{name}.codes")
        if not codes or codes["dtype"] not in ("int4", "int8") or f"{name}.zeros" in self.stored:
            return 0, 0, None
        scales = self.stored[f"{name}.scales"]["shape"]
        groups = scales[1] if len(scales) == 2 else 1
        return int(codes["dtype"][3:]), groups, next((block for block in BLOCKS if codes["shape"][1] // groups % block == 0), None)

    def tied_head(self, x: str) -> str:
        """Logits [b, k, vocab] of x [b, k, hidden] by the tied table."""
        bits, _, block = self._table("embed")
        if "embed.weight" in self.stored:
            return self.op("FusedMatMul", [x, self.weight("embed.weight")], "head.product", domain=MICROSOFT, transB=1)
        if block is None:
            turned = self.op("Transpose", [self.dequantized("embed", 1)], "embed.turned", perm=[1, 0])
            return self.op("MatMul", [x, turned], "head.product")
        return self.op("MatMulNBits", [x, self._unsigned_codes(bits, block), self._block_scales("embed")], "head.product", domain=MICROSOFT,
                       K=self.config.hidden_size, N=self.config.vocab_size, bits=bits, block_size=block, accuracy_level=INT8_COMPUTE)

    # ONNX Runtime computes what follows once, while loading.

    def _unsigned_codes(self, bits: int, block: int) -> str:
        """Codes + 2^(bits-1) as MatMulNBits reads them: uint8 [vocab, hidden / block, bytes of a block]."""
        codes = self.cast(self.weight("embed.codes"), "uint8", "embed.bytes")
        codes = self.op("BitwiseXor", [codes, self.constant(1 << bits - 1, np.uint8)], "embed.unsigned")
        if bits == 4:                       # two codes a byte, the first in the low half; Cast has extended the sign
            codes = self.op("BitwiseAnd", [codes, self.constant(15, np.uint8)], "embed.nibbles")
            pairs = self.op("Reshape", [codes, self.constant([-1, 2])], "embed.pairs")
            low, high = self.op("Split", [pairs], ["embed.low", "embed.high"], axis=1, num_outputs=2)
            high = self.op("BitShift", [high, self.constant(4, np.uint8)], "embed.shifted", direction="LEFT")
            codes = self.op("BitwiseOr", [low, high], "embed.packed")
        shape = [self.config.vocab_size, self.config.hidden_size // block, -1]
        return self.op("Reshape", [codes, self.constant(shape)], "embed.blocks")

    def _scales(self, table: str) -> str:
        """Scales [vocab, groups, 1]."""
        def make():
            scales = self.own_type(self.weight(f"{table}.scales"), "float16", f"{table}.scales.cast")
            return self.op("Reshape", [scales, self.constant([self.config.vocab_size, self._table(table)[1], 1])], f"{table}.scales.groups")
        return self.once(f"{table}.scales.groups", make)

    def _block_scales(self, table: str) -> str:
        """Scales [vocab, inputs / block], a group's repeated for each of its blocks."""
        def make():
            (_, groups, block), vocabulary = self._table(table), self.config.vocab_size
            blocks = self.stored[f"{table}.codes"]["shape"][1] // block
            repeated = self.op("Expand", [self._scales(table), self.constant([vocabulary, groups, blocks // groups])], f"{table}.scales.repeated")
            return self.op("Reshape", [repeated, self.constant([vocabulary, blocks])], f"{table}.scales.blocks")
        return self.once(f"{table}.scales.blocks", make)
