"""A checkpoint's tensors, laid out as a bundle's weights file: what every graph and the native core read.

    embed.weight [V, H]                     or embed.codes + embed.scales [V] or [V, H/G]
    position_embed.weight [max_context, H]  rope.cos, rope.sin [max_context, head_dim/2]
    layers.L.attn_norm, .mlp_norm, final_norm: .weight [H] (, .bias);  layers.L.q_norm.weight, .k_norm.weight [head_dim]
    linears layers.L.qkv, .o, .gate_up, .down, and head where it is not tied:
        X.weight [K, N]    or X.codes [K, N] + X.scales [K/G, N] ([N] for one scale per output);  X.bias [N]

q, k and v (gate and up) are one linear where they are stored alike, else layers.L.q, .k, .v (.gate, .up); a plain MLP
has only .up. Codes are signed int4 or int8, value for value those of the checkpoint minus 2^(bits-1); scales float16;
asymmetric weights add zeros of the codes' type and the scales' shape. 8-bit floats are codes of type float8_e4m3fn, as
they are. X.input_scale, float32 scalar, is the step to which the linear's inputs are rounded in int8;
layers.L.k_scale and .v_scale, float32 [1 or kv_heads * head_dim], those of an int8 KV cache. Codes of other widths (2,
3, 5, 6 bits), which ONNX lacks and the native core reads, keep the checkpoint's form: unsigned, [N, K], packed row by
row, scales [N, K/G]. Everything else is float32 or float16, as the graph computes.

Tensors pass through one at a time, large ones in pieces, and the checkpoint is opened anew now and then, which gives
back the pages mapped so far.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from export.bundle import WeightsWriter
from models.checkpoint import Checkpoint, open_checkpoint
from models.network.rope import rotations
from models.progress import progress
from models.network.quantized import QuantizedTensor, described, pack
from runtime.capabilities import BACKENDS
from runtime.errors import UserError

_PIECE = 1 << 20                  # elements converted at a time
_REOPEN = 32 << 20                # bytes written between two openings of the checkpoint


# name in the bundle -> what it is called in a checkpoint's layer; linears of one input may be fused
NORMS = {"attn_norm": "input_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
         "mlp_norm": "post_attention_layernorm"}
LINEARS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
           "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "up": ("mlp.up_proj",), "down": ("mlp.down_proj",)}


def write_weights(checkpoint: Checkpoint, out: WeightsWriter, dtype: str, max_context: int) -> None:
    """Write every tensor. dtype: "float32", "float16" or "bfloat16", of what is not quantized.

    Raises UserError where a weight is not finite, or too large for float16.
    """
    config = checkpoint.config
    writer = _Writer(open_checkpoint(checkpoint.path), out, dtype)
    writer.linear("embed", ("model.embed_tokens",), turned=False)
    if config.positions == "learned":
        writer.dense("position_embed.weight", writer.checkpoint.read("model.embed_positions.weight")[:max_context])
    else:
        rope = config.rope(config.layers[0])
        for name, table in zip(("rope.cos", "rope.sin"), rotations(rope, config.head_dim, torch.arange(max_context), max_context)):
            writer.dense(name, table)
    opened, absent = 0, "up" if config.gated_mlp else "gate_up"
    for layer in progress(range(len(config.layers)), label="writing weights", unit="layer"):
        if out.size - opened > _REOPEN:
            writer, opened = _Writer(open_checkpoint(checkpoint.path), out, dtype), out.size
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for name, module in NORMS.items():
            writer.norm(f"{ours}.{name}", f"{theirs}.{module}")
        for name, modules in LINEARS.items():
            if name != absent:
                writer.linear(f"{ours}.{name}", tuple(f"{theirs}.{module}" for module in modules))
        for scale in ("k_scale", "v_scale"):
            writer.float32(f"{ours}.{scale}", f"{theirs}.self_attn.{scale}")
    writer.norm("final_norm", "model.norm")
    if not config.tied_embeddings:
        writer.linear("head", ("lm_head",))


class _Writer:
    """Writes the tensors of one opening of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, out: WeightsWriter, dtype: str):
        self.checkpoint, self.out, self.dtype = checkpoint, out, dtype
        self.formats = checkpoint.quantization.tensors if checkpoint.quantization else {}
        self.names = set(checkpoint.names())

    def dense(self, name: str, *tensors: torch.Tensor, turned: bool = False) -> None:
        """Float tensors of any dtype, stacked along the first axis, or the transpose of that stack."""
        self._stack(name, self.dtype, tensors, turned, lambda piece: self._converted(name, piece))

    def _converted(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        piece = piece.to(getattr(torch, self.dtype))
        if not torch.isfinite(piece).all():
            raise UserError(f"{self.checkpoint.path}: {name} has values that are not finite in {self.dtype}: mend the "
                            f"checkpoint, or if they are only too large, export with --dtype fp32")
        return piece.view(torch.int16) if piece.dtype == torch.bfloat16 else piece       # which numpy lacks: its bits

    def norm(self, name: str, module: str) -> None:
        for suffix in ("weight", "bias"):
            if f"{module}.{suffix}" in self.names:
                self.dense(f"{name}.{suffix}", self.checkpoint.read(f"{module}.{suffix}"))

    def linear(self, name: str, modules: tuple[str, ...], turned: bool = True) -> None:
        """Linears that read the same input: as one where they are stored alike, else one by one. `turned`: as [K, N]."""
        if len({self.formats.get(module) for module in modules}) > 1:
            for module in modules:
                part = module.rsplit(".", 1)[1].removesuffix("_proj")
                self.linear(f"{name.rpartition('.')[0]}.{part}", (module,))
            return
        if modules[0] in self.formats:
            self._codes(name, [self.checkpoint.quantized(module) for module in modules], turned)
        else:
            self.dense(f"{name}.weight", *(self.checkpoint.read(f"{module}.weight") for module in modules), turned=turned)
        self.float32(f"{name}.input_scale", f"{modules[0]}.input_scale", ())       # modules that read one input share it
        if f"{modules[0]}.bias" in self.names:
            self.dense(f"{name}.bias", *(self.checkpoint.read(f"{module}.bias") for module in modules))

    def float32(self, name: str, theirs: str, shape: tuple[int, ...] = (-1,)) -> None:
        """A few numbers, where the checkpoint has them, that stay in float32 whatever the graph computes in."""
        if theirs in self.names:
            tensor = self.checkpoint.read(theirs).reshape(shape)
            self.out.add(name, "float32", tuple(tensor.shape), [tensor.contiguous().numpy()])

    def _codes(self, name: str, parts: list[QuantizedTensor], turned: bool) -> None:
        """Codes, scales and zero points of tensors [N, K] stored alike, stacked; `turned`: stored as [K, N]."""
        first, scales, zeros = parts[0], [part.scales for part in parts], [part.zeros for part in parts]
        self.out.formats[name] = described(first.format)
        bits, kind, stored = first.bits, "float8_e4m3fn", torch.Tensor.contiguous
        if bits not in BACKENDS["onnx"].bits:                # the checkpoint's own form
            kind, shape = "uint8", (sum(len(part.codes) for part in parts), first.codes.shape[1])
            self.out.add(f"{name}.codes", f"uint{bits}", shape, (pack(part.codes, bits).numpy() for part in parts))
            turned = False
        else:
            if first.kind == "int":
                kind, stored = f"int{bits}", lambda piece: _signed(piece, bits)
            self._stack(f"{name}.codes", kind, [part.codes.view(torch.uint8) for part in parts], turned, stored)
            turned = turned and first.group > 0
            if not first.group:             # in one piece: two int4 share a byte across parts of odd size
                scales, zeros = ([torch.cat([part[:, 0] for part in those])] if those[0] is not None else those
                                 for those in (scales, zeros))
        self._stack(f"{name}.scales", "float16", scales, turned)
        if not first.symmetric:
            self._stack(f"{name}.zeros", kind, zeros, turned, stored)

    def _stack(self, name: str, dtype: str, tensors: Sequence[torch.Tensor], turned, stored=lambda piece: piece) -> None:
        """Tensors stacked along the first axis, or the transpose of that stack; stored: a piece of them as it is written."""
        shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
        self.out.add(name, dtype, shape[::-1] if turned else shape,
                     (stored(piece).contiguous().numpy() for piece in _pieces(tensors, turned)))


def _pieces(tensors: Sequence[torch.Tensor], turned: bool) -> Iterator[torch.Tensor]:
    """Tensors [N, ...] stacked along N, in consecutive pieces of rows; `turned`: of the stack's transpose [K, N]."""
    row = sum(len(tensor) for tensor in tensors) if turned else math.prod(tensors[0].shape[1:])
    step = max(2, _PIECE // max(row, 1) // 2 * 2)           # even, so that a piece of int4 ends on a byte
    if turned:
        for start in range(0, tensors[0].shape[1], step):
            yield torch.cat([tensor[:, start:start + step] for tensor in tensors]).T
    else:
        for tensor in tensors:
            for start in range(0, len(tensor), step):
                yield tensor[start:start + step]


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes to the bytes of signed ones (code - 2^(bits-1)); two int4 a byte, the first in the low half."""
    codes = (codes ^ (1 << (bits - 1))).reshape(-1)
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return codes[0::2] | codes[1::2] << 4
