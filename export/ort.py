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

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from models.formats import lineage
from models.network.config import ModelConfig
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
from export.graph import MICROSOFT, StoredTensor
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
    config = ModelConfig.from_dict(opened.model["config"])
    step = FUSED_HEADS[config.positions]
    if config.head_dim % step:
        raise UserError(f"{options.bundle}: no fast graph, because ONNX Runtime's GroupQueryAttention takes a head_dim that {step} "
                        f"divides, and this model's is {config.head_dim}; the bundle runs its portable graph instead, as it is")
    graph = fast_graph(config, bundles.stored_tensors(opened.manifest), DTYPES[portable["dtype"]], bundles.int8_rows(opened.model))
    data = graph.serialize(opened.name)
    stage = lineage.stage("export.ort", options, {"portable": opened.manifest["files"][portable["file"]]["sha256"]})
    manifest = bundles.without_file(opened.manifest, GRAPH)
    entry = graph_entry("fast", GRAPH, len(data), portable["dtype"], opened.max_context, portable["source_checkpoint"])
    manifest |= {"graphs": [*manifest["graphs"], entry], "lineage": [*manifest["lineage"], stage]}
    bundles.add_file(options.bundle, manifest, GRAPH, data)
    print(summary(options.bundle, manifest))


class FastGraph(DecoderGraph):
    """A decoder graph whose W8A8 linears are products of integers."""

    def product(self, x: str, name: str) -> str:
        if not self.rounds_rows(name) or self.has_weight(f"{name}.zeros") or self.stored(f"{name}.codes").dtype != "int8" \
                or len(self.stored(f"{name}.scales").shape) > 1:
            return super().product(x, name)
        codes, row_scales = self._int8_rows(x)
        scales = self.cast(self.weight(f"{name}.scales"), "float32", f"{name}.scales.float32")
        columns = self.op("MatMulIntegerToFloat", [codes, self.weight(f"{name}.codes"), self.constant(1, np.float32), scales,
                                                   self.constant(128, np.uint8)], f"{name}.columns", domain=MICROSOFT)
        product = self.op("Mul", [columns, row_scales], f"{name}.product")
        return product if self.dtype == "float32" else self.cast(product, self.dtype, f"{name}.product.cast")

    def _int8_rows(self, x: str) -> tuple[str, str]:
        """Codes of x's rows plus 128, which MLAS multiplies 40 times faster as uint8 than as int8, and the rows' scales."""
        codes, scales = f"{x}.codes", f"{x}.row_scales"
        if codes not in self._rounded:
            wide, scales = self.row_scales(x)
            steps = self.op("Div", [wide, scales], f"{x}.steps")
            self._rounded[codes] = self.op("QuantizeLinear", [steps, self.constant(1, np.float32), self.constant(128, np.uint8)], codes)
        return codes, scales


def fast_graph(config: ModelConfig, stored: dict[str, StoredTensor], dtype: str, int8_rows: bool = False) -> DecoderGraph:
    """Build the graph over stored tensors. dtype: "float32" or "float16", of activations and caches."""
    graph = FastGraph(config, stored, dtype, int8_rows)
    graph.tokens(positions=config.positions == "learned")
    table = Table(graph)
    x = table.rows()
    if config.positions == "learned":
        positions = graph.op("Gather", [graph.weight("position_embed.weight"), "position_ids"], "positions")
        x = graph.op("Add", [x, positions], "embedded.positions")
    lengths = _lengths(graph)
    normed = graph.norm(x, "layers.0.attn_norm", "layers.0.attn_input")
    for layer in range(len(config.layers)):
        name = f"layers.{layer}"
        following = f"layers.{layer + 1}.attn_norm" if layer + 1 < len(config.layers) else "final_norm"
        normed, x = _add_norm(graph, x, _attention(graph, normed, lengths, layer), f"{name}.o", f"{name}.mlp_norm")
        normed, x = _add_norm(graph, x, graph.mlp(normed, layer, bias=False), f"{name}.down", following)
    selected = graph.selected(normed)
    graph.logits(table.head(selected) if config.tied_embeddings else graph.linear(selected, "head"))
    return graph


def _lengths(graph: DecoderGraph) -> list[str]:
    """GroupQueryAttention's seqlens_k int32 [b] (a row's last slot) and total_sequence_length int32 scalar."""
    tokens = graph.op("Shape", ["input_ids"], "tokens", start=1, end=2)
    after = graph.op("Add", ["write_index", tokens], "lengths")
    last = graph.cast(graph.op("Sub", [after, graph.constant(1)], "last_slots"), "int32", "seqlens_k")
    longest = graph.op("ReduceMax", [after], "longest", keepdims=0)
    return [last, graph.cast(longest, "int32", "total_sequence_length")]


def _add_norm(graph: DecoderGraph, x: str, delta: str, linear: str, norm: str) -> tuple[str, str]:
    """(norm(x + delta + bias), x + delta + bias) as one operator; the bias is that of `linear`, which gave delta."""
    names = f"{norm}.normed", f"{norm}.residual"
    bias = [graph.weight(f"{linear}.bias")] if graph.has_weight(f"{linear}.bias") else []
    inputs = [x, delta, graph.weight(f"{norm}.weight")]
    if graph.has_weight(f"{norm}.bias"):
        kind, inputs = "SkipLayerNormalization", [*inputs, graph.weight(f"{norm}.bias")]
    else:
        kind = "SkipSimplifiedLayerNormalization"
    graph.op(kind, [*inputs, *bias], [names[0], "", "", names[1]], domain=MICROSOFT, epsilon=graph.config.norm_eps)
    return names


def _attention(graph: DecoderGraph, x: str, lengths: list[str], layer: int) -> str:
    """Output of the o projection, without its bias."""
    config, shape, name = graph.config, graph.config.layers[layer], f"layers.{layer}"
    fused = graph.has_weight(f"{name}.qkv.codes") or graph.has_weight(f"{name}.qkv.weight")
    if fused and not config.qk_norm:
        inputs = [graph.linear(x, f"{name}.qkv"), "", ""]
    else:
        sizes = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        inputs = graph.split_linear(x, f"{name}.qkv", {part: heads * config.head_dim for part, heads in sizes.items()})
        if config.qk_norm:
            for i, (part, heads) in enumerate(list(sizes.items())[:2]):
                normed = graph.head_norm(inputs[i], f"{name}.{part}_norm", heads)
                inputs[i] = graph.op("Reshape", [normed, graph.constant([0, -1, heads * config.head_dim])],
                                     f"{name}.{part}_norm.rows")
    scales, quantized = [], {}
    if graph.has_weight(f"{name}.k_scale"):
        scales = ["", "", "", graph.weight(f"{name}.k_scale"), graph.weight(f"{name}.v_scale")]
        kind = "PER_CHANNEL" if graph.stored(f"{name}.k_scale").shape[0] > 1 else "PER_TENSOR"
        quantized = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
    (past_key, present_key), (past_value, present_value) = graph.cache(layer, "int8" if scales else None)
    rope = [graph.weight("rope.cos"), graph.weight("rope.sin")] if config.positions == "rope" else []
    tables = [*(rope or ["", ""]), *scales] if scales else rope
    window = {"local_window_size": config.sliding_window} if config.sliding_window else {}
    attended = graph.op("GroupQueryAttention", [*inputs, past_key, past_value, *lengths, *tables],
                        [f"{name}.attended", present_key, present_value], domain=MICROSOFT, num_heads=shape.heads,
                        kv_num_heads=shape.kv_heads, do_rotary=int(bool(rope)), scale=config.head_dim ** -0.5, **window,
                        **quantized)
    return graph.linear(attended[0], f"{name}.o", bias=False)


class Table:
    """The token table: its rows as the network's input, and the head where it is tied."""

    def __init__(self, graph: DecoderGraph):
        self.graph, self.block = graph, None
        if graph.has_weight("embed.codes") and not graph.has_weight("embed.zeros") and graph.stored("embed.codes").dtype != "float8_e4m3fn":
            hidden, scales = graph.config.hidden_size, graph.stored("embed.scales").shape
            self.groups = scales[1] if len(scales) == 2 else 1
            self.four_bits = graph.stored("embed.codes").dtype == "int4"
            # inputs that share a scale in MatMulNBits' form of the table, whose kernels take these
            self.block = next((block for block in BLOCKS if hidden // self.groups % block == 0), None)

    def rows(self) -> str:
        """Embeddings [b, s, hidden] of input_ids."""
        graph = self.graph
        if self.block is None:
            return graph.op("Gather", [graph.dequantized("embed", 1), "input_ids"], "embedded")
        if self.four_bits:
            return graph.op("GatherBlockQuantized", [graph.weight("embed.codes"), "input_ids", self._block_scales],
                            "embedded", domain=MICROSOFT, bits=4, block_size=self.block, gather_axis=0, quantize_axis=1)
        hidden = graph.config.hidden_size
        codes = graph.op("Gather", [graph.weight("embed.codes"), "input_ids"], "embedded.codes")
        codes = graph.cast(codes, graph.dtype, "embedded.cast")
        scales = graph.op("Gather", [self._scales, "input_ids"], "embedded.scales")        # [b, s, groups, 1]
        codes = graph.op("Reshape", [codes, graph.constant([0, 0, self.groups, hidden // self.groups])],
                         "embedded.groups")
        scaled = graph.op("Mul", [codes, scales], "embedded.scaled")
        return graph.op("Reshape", [scaled, graph.constant([0, 0, hidden])], "embedded")

    def head(self, x: str) -> str:
        """Logits [b, k, vocab] of x [b, k, hidden] by the tied table."""
        graph = self.graph
        vocabulary, hidden = graph.config.vocab_size, graph.config.hidden_size
        if graph.has_weight("embed.weight"):
            return graph.op("FusedMatMul", [x, graph.weight("embed.weight")], "head.product", domain=MICROSOFT, transB=1)
        if self.block is None:
            turned = graph.op("Transpose", [graph.dequantized("embed", 1)], "embed.turned", perm=[1, 0])
            return graph.op("MatMul", [x, turned], "head.product")
        return graph.op("MatMulNBits", [x, self._unsigned_codes(), self._block_scales], "head.product",
                        domain=MICROSOFT, K=hidden, N=vocabulary, bits=4 if self.four_bits else 8,
                        block_size=self.block, accuracy_level=INT8_COMPUTE)

    # ONNX Runtime computes what follows once, while loading.

    def _unsigned_codes(self) -> str:
        """Codes + 2^(bits-1) as MatMulNBits reads them: uint8 [vocab, hidden / block, bytes of a block]."""
        graph, half = self.graph, 8 if self.four_bits else 128
        codes = graph.cast(graph.weight("embed.codes"), "uint8", "embed.bytes")
        codes = graph.op("BitwiseXor", [codes, graph.constant(half, np.uint8)], "embed.unsigned")
        if self.four_bits:                  # two codes a byte, the first in the low half; Cast has extended the sign
            codes = graph.op("BitwiseAnd", [codes, graph.constant(15, np.uint8)], "embed.nibbles")
            pairs = graph.op("Reshape", [codes, graph.constant([-1, 2])], "embed.pairs")
            low, high = graph.op("Split", [pairs], ["embed.low", "embed.high"], axis=1, num_outputs=2)
            high = graph.op("BitShift", [high, graph.constant(4, np.uint8)], "embed.shifted", direction="LEFT")
            codes = graph.op("BitwiseOr", [low, high], "embed.packed")
        shape = [graph.config.vocab_size, graph.config.hidden_size // self.block, -1]
        return graph.op("Reshape", [codes, graph.constant(shape)], "embed.blocks")

    @cached_property
    def _scales(self) -> str:
        """Scales [vocab, groups, 1]."""
        graph = self.graph
        scales = graph.weight("embed.scales")
        if graph.dtype != "float16":
            scales = graph.cast(scales, graph.dtype, "embed.scales.cast")
        shape = [graph.config.vocab_size, self.groups, 1]
        return graph.op("Reshape", [scales, graph.constant(shape)], "embed.scales.groups")

    @cached_property
    def _block_scales(self) -> str:
        """Scales [vocab, hidden / block], a group's repeated for each of its blocks."""
        graph = self.graph
        blocks = graph.config.hidden_size // self.block
        shape = [graph.config.vocab_size, self.groups, blocks // self.groups]
        repeated = graph.op("Expand", [self._scales, graph.constant(shape)], "embed.scales.repeated")
        return graph.op("Reshape", [repeated, graph.constant([shape[0], blocks])], "embed.scales.blocks")
