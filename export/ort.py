"""Add ONNX Runtime's fast graph to a bundle: `python -m export.ort BUNDLE`.

`fast.onnx` reads the same weights.bin, to the byte, and has the interface of the portable graph. What it fuses:

- attention, rotation and cache update in `GroupQueryAttention`, whose lengths are computed in the graph from
  write_index; QK-norm stays a norm of its own before it; its caches are int8 where the checkpoint has scales for them;
- residual addition, bias and norm in `SkipSimplifiedLayerNormalization` or `SkipLayerNormalization`;
- quantized linears: left as DequantizeLinear + MatMul, which ONNX Runtime makes MatMulNBits while loading. Where inputs
  are rounded to int8 row by row and the weights are int8 with one scale an output, an int8 product with int32 sums;
- a tied quantized table. ONNX Runtime would unfold DequantizeLinear -> Transpose -> MatMul at every step, so the head is
  a MatMulNBits over unsigned codes, computed in the graph from the same initializer: ONNX Runtime folds that once,
  while loading, packs the result and frees it. Rows of an 8-bit table are looked up in the mapped file, so that only
  the rows used take memory.

GroupQueryAttention takes several new tokens on top of a filled cache only at batch 1; one new token, or prompts into
empty rows, at any batch. It rotates heads of a multiple of 16 numbers, and attends without rotation to a multiple of 8;
models with others are refused, and run the portable graph. Tables with zero points, of 8-bit floats, or of a width no
block divides keep the portable form: right, but slow.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from models.formats import lineage
from runtime.bundle import open_bundle
from runtime.capabilities import BACKENDS, FUSED_HEADS
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.tensors import check_tensors
from runtime.files import sole_writer

EXAMPLES = """example:
  python -m export.ort build/smollm2-135m-int4
"""


@dataclass(frozen=True)
class Options:
    """Add ONNX Runtime's fast graph to a bundle, over the same weights file."""
    bundle: Path = arg(positional=True, help="folder of the bundle")


def main(argv=None) -> int:
    return run(Options, "add_fast_graph", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from export import bundle as bundles
from export.decoder_graph import DecoderGraph
from export.graph import MICROSOFT
from export.onnx import DTYPES, graph_entry, summary

GRAPH = "fast.onnx"
BLOCKS = (32, 16)                 # inputs that share a scale in the table's MatMulNBits (64: no faster, KL a third more)
INT8_COMPUTE = 4                  # MatMulNBits' accuracy level: activations in int8 per block, as for the other linears


@sole_writer("bundle")
def add_fast_graph(options: Options) -> None:
    """Run the stage. Raises UserError for a bundle that cannot be opened, has no portable graph, or whose heads do not fit."""
    opened = open_bundle(options.bundle)
    check_tensors(opened)
    portable = opened.graph("portable")
    if portable is None:
        raise UserError(f"{options.bundle} has no portable graph to lower: its weights have widths that ONNX lacks")
    if portable["dtype"] not in (able := BACKENDS["onnx"].dtypes):
        raise UserError(f"{options.bundle} computes in {portable['dtype']}, which ONNX Runtime's CPU does not; export with --dtype "
                        + " or ".join(able))
    graph = FastGraph(opened.manifest, DTYPES[portable["dtype"]])
    step = FUSED_HEADS["learned" if graph.config.positions == "learned" else "rope"]
    if graph.config.head_dim % step:
        raise UserError(f"{options.bundle}: no fast graph, because ONNX Runtime's GroupQueryAttention takes a head_dim that {step} "
                        f"divides, and this model's is {graph.config.head_dim}; the bundle runs its portable graph instead, as it is")
    graph.build()
    data = graph.serialize(opened.name)
    stage = lineage.stage("export.ort", options, {"portable": opened.manifest["files"][portable["file"]]["sha256"]})
    manifest = bundles.without_file(opened.manifest, GRAPH)
    entry = graph_entry("fast", GRAPH, len(data), portable["dtype"], opened.max_context, portable["source_checkpoint"])
    manifest |= {"graphs": [*manifest["graphs"], entry], "lineage": [*manifest["lineage"], stage]}
    bundles.add_file(options.bundle, manifest, GRAPH, data)
    print(summary(options.bundle, manifest))


class FastGraph(DecoderGraph):
    """A decoder graph of ONNX Runtime's fused operators; W8A8 linears are products of integers."""

    def __init__(self, manifest: dict, dtype: str):
        super().__init__(manifest, dtype)
        table, hidden = self.stored.get("embed.codes", {"dtype": None})["dtype"], self.config.hidden_size
        self.table_bits = {"int4": 4, "int8": 8}.get(table)
        self.block = None                   # inputs of the table that share a scale in MatMulNBits; None: the portable form
        if self.table_bits and "embed.zeros" not in self.stored:
            scales = self.stored["embed.scales"]["shape"]
            self.groups = scales[1] if len(scales) == 2 else 1
            self.block = next((block for block in BLOCKS if hidden // self.groups % block == 0), None)

    def build(self) -> None:
        """Add every node."""
        config = self.config
        self.tokens(positions=config.positions == "learned")
        x = self.embedded(self._table_rows())
        lengths = self._lengths()
        normed = self.norm(x, "layers.0.attn_norm", "layers.0.attn_input")
        for layer in range(len(config.layers)):
            name = f"layers.{layer}"
            following = f"layers.{layer + 1}.attn_norm" if layer + 1 < len(config.layers) else "final_norm"
            normed, x = self._add_norm(x, self._attention(normed, lengths, layer), f"{name}.o", f"{name}.mlp_norm")
            normed, x = self._add_norm(x, self.mlp(normed, layer, bias=False), f"{name}.down", following)
        selected = self.selected(normed)
        self.logits(self._tied_head(selected) if config.tied_embeddings else self.linear(selected, "head"))

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

    def _add_norm(self, x: str, delta: str, linear: str, norm: str) -> tuple[str, str]:
        """(norm(x + delta + bias), x + delta + bias) as one operator; the bias is that of `linear`, which gave delta."""
        bias, weights = self.weights(linear, "bias"), self.weights(norm, "weight", "bias")
        kind = "SkipLayerNormalization" if len(weights) > 1 else "SkipSimplifiedLayerNormalization"
        normed, residual = f"{norm}.normed", f"{norm}.residual"
        self.op(kind, [x, delta, *weights, *bias], [normed, "", "", residual], domain=MICROSOFT, epsilon=self.config.norm_eps)
        return normed, residual

    def _attention(self, x: str, lengths: list[str], layer: int) -> str:
        """Output of the o projection, without its bias."""
        config, shape, name = self.config, self.config.layers[layer], f"layers.{layer}"
        if self.holds(f"{name}.qkv") and not config.qk_norm:
            inputs = [self.linear(x, f"{name}.qkv"), "", ""]
        else:
            heads, inputs = self.queries_keys_values(x, layer)
            for i, part in enumerate("qk" if config.qk_norm else ()):
                normed = self.head_norm(inputs[i], f"{name}.{part}_norm", heads[part])
                inputs[i] = self.op("Reshape", [normed, self.constant([0, -1, heads[part] * config.head_dim])],
                                    f"{name}.{part}_norm.rows")
        scales, how = self.weights(name, "k_scale", "v_scale"), {}
        if scales:
            kind = "PER_CHANNEL" if self.stored[scales[0]]["shape"][0] > 1 else "PER_TENSOR"
            how = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
        if config.sliding_window:
            how["local_window_size"] = config.sliding_window
        (past_key, present_key), (past_value, present_value) = self.cache(layer, "int8" if scales else self.dtype)
        tables = self.weights("rope", "cos", "sin")
        options = [*(tables or ["", ""]), "", "", "", *scales] if scales else tables
        self.op("GroupQueryAttention", [*inputs, past_key, past_value, *lengths, *options],
                [f"{name}.attended", present_key, present_value], domain=MICROSOFT, num_heads=shape.heads,
                kv_num_heads=shape.kv_heads, do_rotary=int(bool(tables)), scale=config.head_dim ** -0.5, **how)
        return self.linear(f"{name}.attended", f"{name}.o", bias=False)

    def _table_rows(self) -> str:
        """Embeddings [b, s, hidden] of input_ids."""
        if self.block is None:
            return self.op("Gather", [self.dequantized("embed", 1), "input_ids"], "embedded")
        if self.table_bits == 4:
            return self.op("GatherBlockQuantized", [self.weight("embed.codes"), "input_ids", self._block_scales],
                           "embedded", domain=MICROSOFT, bits=4, block_size=self.block, gather_axis=0, quantize_axis=1)
        hidden = self.config.hidden_size
        codes = self.op("Gather", [self.weight("embed.codes"), "input_ids"], "embedded.codes")
        codes = self.cast(codes, self.dtype, "embedded.cast")
        scales = self.op("Gather", [self._scales, "input_ids"], "embedded.scales")        # [b, s, groups, 1]
        codes = self.op("Reshape", [codes, self.constant([0, 0, self.groups, hidden // self.groups])], "embedded.groups")
        scaled = self.op("Mul", [codes, scales], "embedded.scaled")
        return self.op("Reshape", [scaled, self.constant([0, 0, hidden])], "embedded")

    def _tied_head(self, x: str) -> str:
        """Logits [b, k, vocab] of x [b, k, hidden] by the tied table."""
        if "embed.weight" in self.stored:
            return self.op("FusedMatMul", [x, self.weight("embed.weight")], "head.product", domain=MICROSOFT, transB=1)
        if self.block is None:
            turned = self.op("Transpose", [self.dequantized("embed", 1)], "embed.turned", perm=[1, 0])
            return self.op("MatMul", [x, turned], "head.product")
        return self.op("MatMulNBits", [x, self._unsigned_codes(), self._block_scales], "head.product", domain=MICROSOFT,
                       K=self.config.hidden_size, N=self.config.vocab_size, bits=self.table_bits, block_size=self.block,
                       accuracy_level=INT8_COMPUTE)

    # ONNX Runtime computes what follows once, while loading.

    def _unsigned_codes(self) -> str:
        """Codes + 2^(bits-1) as MatMulNBits reads them: uint8 [vocab, hidden / block, bytes of a block]."""
        codes = self.cast(self.weight("embed.codes"), "uint8", "embed.bytes")
        codes = self.op("BitwiseXor", [codes, self.constant(1 << self.table_bits - 1, np.uint8)], "embed.unsigned")
        if self.table_bits == 4:            # two codes a byte, the first in the low half; Cast has extended the sign
            codes = self.op("BitwiseAnd", [codes, self.constant(15, np.uint8)], "embed.nibbles")
            pairs = self.op("Reshape", [codes, self.constant([-1, 2])], "embed.pairs")
            low, high = self.op("Split", [pairs], ["embed.low", "embed.high"], axis=1, num_outputs=2)
            high = self.op("BitShift", [high, self.constant(4, np.uint8)], "embed.shifted", direction="LEFT")
            codes = self.op("BitwiseOr", [low, high], "embed.packed")
        shape = [self.config.vocab_size, self.config.hidden_size // self.block, -1]
        return self.op("Reshape", [codes, self.constant(shape)], "embed.blocks")

    @cached_property
    def _scales(self) -> str:
        """Scales [vocab, groups, 1]."""
        scales = self.own_type(self.weight("embed.scales"), "float16", "embed.scales.cast")
        return self.op("Reshape", [scales, self.constant([self.config.vocab_size, self.groups, 1])], "embed.scales.groups")

    @cached_property
    def _block_scales(self) -> str:
        """Scales [vocab, hidden / block], a group's repeated for each of its blocks."""
        vocabulary, blocks = self.config.vocab_size, self.config.hidden_size // self.block
        shape = [vocabulary, self.groups, blocks // self.groups]
        repeated = self.op("Expand", [self._scales, self.constant(shape)], "embed.scales.repeated")
        return self.op("Reshape", [repeated, self.constant([vocabulary, blocks])], "embed.scales.blocks")
