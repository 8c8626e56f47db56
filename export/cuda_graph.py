"""The graph for ONNX Runtime on an NVIDIA GPU, of a bundle in fp16: one step with nothing of it on the host. Never run on a GPU.

The fast graph (`fast_graph.py`), and what differs from it:

- lengths come in. GroupQueryAttention wants `seqlens_k` int32 [b], each row's last slot in use, on the device and
  `total_sequence_length`, an int32 scalar, on the host: computed in the graph they would cross over twice a step;
- quantized linears and a tied head are MatMulNBits as such. Their codes in blocks are no tensors of the weights file: the runtime makes
  them while it opens the session (`runtime/nbits.py`) and hands them over. A session that was not given them does not open, because
  here they lie beyond the file's end;
- rows of the token table are taken from the head's blocks, so that the device has the table once;
- the likeliest tokens are found on the device: `top_ids` int64 and `top_logits` float32 [b, k, 64], largest first, and
  `next_token` int64 [b, k], the first of them (of equal logits, the lower id);
- a CUDA kernel for every node, of an opset (23) for which ONNX Runtime has had them for some time: its list of kernels
  (docs/OperatorKernels.md) is in tests/export/test_cuda_graph.py, and tests/export/test_cuda_placement.py has the CUDA provider of
  1.31.1 place all nodes on the device and record a step, over a CUDA runtime that computes nothing: SmolLM2's is 314 kernels;
- nothing that copies from the host while it runs, as GatherND does (whose copy a recorded CUDA graph would repeat from freed memory):
  GatherElements in its place.

Of GroupQueryAttention's rules two concern the caller on CUDA too: several tokens for several rows only where total_sequence_length is their
number, else one row; past and present of a layer in one buffer.

`lacks` says which models have no such graph.
"""

from export.fast_graph import FastGraph
from export.graph import MICROSOFT
from models.network.config import ModelConfig
from runtime.nbits import TABLES, block_size, shapes

TOP = 64                          # likeliest tokens that come back


def lacks(manifest: dict) -> str | None:
    """What of a manifest's model the CUDA graph does not express, in the plural; None where it can be had."""
    model, config = manifest["model"], ModelConfig.from_dict(manifest["model"]["config"])
    stored = {tensor["name"]: tensor for tensor in manifest["weights"]["tensors"]}
    if config.recurrent:
        return "recurrent layers"
    if any(layer.experts for layer in config.layers):
        return "mixtures of experts"
    if any(layer.cache_source is not None for layer in config.layers):
        return "layers that read another's keys and values"
    if config.per_layer_size:
        return "inputs of every layer"
    if model.get("activations"):
        return "linears that round their inputs to int8"
    for name in (tensor.removesuffix(".codes") for tensor in stored if tensor.endswith(".codes")):
        if block_size(stored, name) is None:
            return f"the codes of {name}, which MatMulNBits cannot have in blocks"
    return None


class CudaGraph(FastGraph):
    """A decoder graph for CUDA, of a model that does not `lack` anything."""

    opset = 23

    def build(self) -> None:
        """Add every node."""
        config = self.config
        self.input("input_ids", "int64", ["b", "s"])
        if self.positions:
            self.input("position_ids", "int64", ["b", "s"])
        self.lengths = [self.input("seqlens_k", "int32", ["b"]), self.input("total_sequence_length", "int32", [])]
        self.input("logits_positions", "int64", ["b", "k"])
        self.output("logits", "float32", ["b", "k", config.vocab_size])
        x = self.embedded(self.rows("embed", "embedded"))
        normed, _ = self.layers(x, "final_norm")
        selected = self.selected(normed)
        self.logits(self.tied_head(selected) if config.tied_embeddings else self.linear(selected, "head"))
        self._choices()

    def product(self, x: str, name: str) -> str:
        """x @ W: a dense one, or MatMulNBits over the matrix's blocks."""
        if f"{name}.codes" not in self.stored:
            return super().product(x, name)
        blocks, scales, *zeros = self.made(name)
        rows, count, _ = shapes(self.stored, name)[blocks][1]
        block, outputs = block_size(self.stored, name), self.stored[f"{name}.codes"]["shape"][name not in TABLES]
        product = self.op("MatMulNBits", [x, blocks, scales, *zeros], f"{name}.product", domain=MICROSOFT, K=count * block, N=rows,
                          bits=self._bits(name), block_size=block)
        if outputs == rows:
            return product
        return self.op("Slice", [product, *(self.constant([value]) for value in (0, outputs, -1))], f"{name}.product.outputs")

    def tied_head(self, x: str) -> str:
        return self.product(x, "embed") if "embed.codes" in self.stored else super().tied_head(x)

    def rows(self, table: str, output: str) -> str:
        """Rows of a table: of its blocks, (code - zero) * scale."""
        if f"{table}.codes" not in self.stored:
            return super().rows(table, output)
        blocks, scales, *zeros = self.made(table)
        _, width = self.stored[f"{table}.codes"]["shape"]
        codes = self._cast_rows(blocks, f"{output}.codes")                                     # [b, s, blocks, bytes]
        if self._bits(table) == 4:
            codes = self._nibbles(codes, width // block_size(self.stored, table), output)
        scale = self._column(self.op("Gather", [scales, "input_ids"], f"{output}.scales"))
        zero = self.constant(1 << self._bits(table) - 1, self.dtype)
        if zeros:
            zero = self._column(self._cast_rows(zeros[0], f"{output}.zeros"))
        centred = self.op("Sub", [codes, zero], f"{output}.centred")
        scaled = self.op("Mul", [centred, scale], f"{output}.scaled")
        return self.op("Reshape", [scaled, self.constant([0, 0, width])], output)

    def selected(self, x: str) -> str:
        index = self._column("logits_positions")
        index = self.op("Expand", [index, self.constant([1, 1, self.config.hidden_size])], "logits_index")
        return self.op("GatherElements", [x, index], "selected", axis=1)

    def activation(self, x: str, output: str) -> str:
        """SiLU, x * sigmoid(x), as one operator."""
        if self.config.activation != "silu":
            return super().activation(x, output)
        return self.op("QuickGelu", [x], output, domain=MICROSOFT, alpha=1.0)

    def made(self, name: str) -> list[str]:
        """Blocks, scales and, where there are any, zero points of a quantized matrix: initializers that the runtime hands over."""
        return [self.handed_over(part, dtype, shape) for part, (dtype, shape) in shapes(self.stored, name).items()]

    def _bits(self, name: str) -> int:
        return int(self.stored[f"{name}.codes"]["dtype"][3:])

    def _cast_rows(self, table: str, output: str) -> str:
        return self.cast(self.op("Gather", [table, "input_ids"], output), self.dtype, f"{output}.cast")

    def _column(self, x: str) -> str:
        return self.op("Unsqueeze", [x, self.constant([-1])], f"{x}.column")

    def _nibbles(self, pairs: str, blocks: int, output: str) -> str:
        """The two codes of each byte of `pairs` [b, s, blocks, bytes]: [b, s, blocks, 2 * bytes]. Exact in fp16."""
        sixteen = self.constant(16, self.dtype)
        high = self.op("Floor", [self.op("Div", [pairs, sixteen], f"{output}.sixteenths")], f"{output}.high")
        low = self.op("Sub", [pairs, self.op("Mul", [high, sixteen], f"{output}.high.shifted")], f"{output}.low")
        both = self.op("Concat", [self._column(low), self._column(high)], f"{output}.nibbles", axis=-1)
        return self.op("Reshape", [both, self.constant([0, 0, blocks, -1])], f"{output}.code")

    def _choices(self) -> None:
        """The likeliest tokens of each row of logits."""
        count = min(TOP, self.config.vocab_size)
        self.op("TopK", ["logits", self.constant([count])], [self.output("top_logits", "float32", ["b", "k", count]),
                                                             self.output("top_ids", "int64", ["b", "k", count])], axis=-1)
        self.op("Gather", ["top_ids", self.constant(0)], self.output("next_token", "int64", ["b", "k"]), axis=-1)
