"""A checkpoint's tensors, laid out as a bundle's weights file: what every graph and the native core read.

    embed.weight [V, H]                     or embed.codes + embed.scales [V] or [V, H/G]
    position_embed.weight [max_context, H]  rope.cos, rope.sin [max_context, head_dim/2]
    rope.n.cos, rope.n.sin, of the n-th further RoPE; rope.query, rope.n.query [max_context], what queries are multiplied by
    layers.L.attn_norm, .mlp_norm, final_norm: .weight [H] (, .bias), before a layer's mixer, whatever it is, and its MLP;
    .attn_post_norm, .mlp_post_norm after them; .q_norm.weight, .k_norm.weight [head_dim] or [heads * head_dim]
    linears layers.L.qkv, .o, .gate_up, .down, and head where it is not tied:
        X.weight [K, N]    or X.codes [K, N] + X.scales [K/G, N] ([N] for one scale per output);  X.bias [N]

q, k and v (gate and up) are one linear where they are stored alike, else layers.L.q, .k, .v (.gate, .up); a plain MLP
has only .up, a layer that reads another's keys only .q. An attention gate is .attn_gate; experts are .router (, .router_bias),
.experts.E.gate_up, .experts.E.down, .shared.gate_up, .shared.down; the other mixers, whose decay is -exp(A_log):

    short convolution  .conv_in (.conv_b, .conv_c, .conv_x), .conv.weight [channels, kernel] (, .conv.bias), .conv_out
    gated delta rule   .delta_in (.delta_qkv, .delta_z), .delta_b, .delta_a, .conv.weight, .decay, .dt_bias [heads],
                       .state_norm.weight, .delta_out
    Mamba-2            .mamba_in (.mamba_z, .mamba_xbc), .mamba_dt, .conv.weight, .conv.bias, .skip, .decay, .dt_bias,
                       .state_norm.weight, .mamba_out
    GRU, LSTM          .gates_input, .gates_state [1, gates * H, H], .gates_input_bias, .gates_state_bias [gates * H], in ONNX's order of
                       gates: z, r, h and i, o, f, c; such a layer has no MLP
    Gemma 4            per_layer_embed (a table, as embed is), per_layer_projection, per_layer_norm;
                       .per_layer_gate, .per_layer_proj, .per_layer_norm, .scalar

Codes are signed int4 or int8, value for value those of the checkpoint minus 2^(bits-1); scales float16;
asymmetric weights add zeros of the codes' type and the scales' shape. 8-bit floats are codes of type float8_e4m3fn, as
they are. X.input_scale, float32 scalar, is the step to which the linear's inputs are rounded in int8;
layers.L.k_scale and .v_scale, float32 [1 or kv_heads * head_dim], those of an int8 KV cache. What ONNX lacks and
the native core reads, codes of 2, 3, 5 and 6 bits, of levels and those with 8-bit scales, keeps the checkpoint's form whatever the
width: X.codes "uint2" .. "uint8" [N, K], packed row by row, X.scales [N, K/G], with 8-bit scales int8 and X.row_scales float16 [N, 1]
after them, then X.levels int8 [1, 2^bits], then X.zeros. Matrices of levels are never joined: each has its own. What convolutions and recurrences are made of is float32, everything else float32 or float16, as the
graph computes. runtime/layout.py has the order.

Tensors pass through one at a time, large ones in pieces, and the checkpoint is opened anew now and then, which gives
back the pages mapped so far.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from export.bundle import WeightsWriter
from models.checkpoint import Checkpoint, open_checkpoint
from models.network.config import ModelConfig
from models.network.quantized import QuantizedTensor, byte_scales, described, pack
from models.network.rope import query_factors, rotations
from models.progress import progress
from runtime.capabilities import BACKENDS
from runtime.errors import UserError
from runtime.layout import layout, rope_name, ropes

_PIECE = 1 << 20                  # elements converted at a time
_REOPEN = 32 << 20                # bytes written between two openings of the checkpoint


# bundle -> checkpoint: what a layer's parts are called
MODULES = {"attn_norm": "input_layernorm", "attn_post_norm": "post_mixer_norm", "mlp_norm": "post_attention_layernorm",
           "mlp_post_norm": "post_mlp_norm", "per_layer_norm": "post_per_layer_norm", "per_layer_gate": "per_layer_gate",
           "per_layer_proj": "per_layer_proj", "scalar": "layer_scalar", "attn_gate": "self_attn.g_proj", "router": "moe.router",
           "router_bias": "moe.router_bias", **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm", "k_scale", "v_scale")},
           **{name: f"self_attn.{name}_proj" for name in "qkvo"}, **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}}
MIXERS = {"conv": "conv", "delta": "linear_attn", "mamba": "mamba", "gru": "gru", "lstm": "lstm"}
STATES = {"conv": "conv", "decay": "A_log", "dt_bias": "dt_bias", "skip": "D", "state_norm": "norm", "gates_input": "weight_ih",
          "gates_state": "weight_hh", "gates_input_bias": "bias_ih", "gates_state_bias": "bias_hh"}
GATES = {3: [1, 0, 2], 4: [0, 3, 1, 2]}     # of r, z, n and of i, f, g, o: in ONNX's order
WHOLE = {"embed": "model.embed_tokens", "position_embed": "model.embed_positions", "final_norm": "model.norm", "head": "lm_head"}


def write_weights(checkpoint: Checkpoint, out: WeightsWriter, dtype: str, model: dict) -> None:
    """Write every tensor of a manifest's "model". dtype: "float32", "float16" or "bfloat16", of what is not quantized.

    Raises UserError where a weight is not finite, or too large for float16.
    """
    config, opened, tables = checkpoint.config, 0, {}
    for number, size in ropes(model["config"]).items():
        tables |= rope_tables(config, number, size, model["max_context"])
    writer = _Writer(open_checkpoint(checkpoint.path), out, dtype)
    for item in progress(list(layout(model, model["kv_cache"])), label="writing weights", unit="tensor"):
        if out.size - opened > _REOPEN:
            writer, opened = _Writer(open_checkpoint(checkpoint.path), out, dtype), out.size
        if item.name in tables:
            writer.dense(item.name, tables[item.name])
        elif item.kind == "linear":
            writer.linear(item.name, {part: theirs(config, f"{item.name.rpartition('.')[0]}.{part}".lstrip(".")) for part in item.parts})
        elif item.kind == "table":
            writer.linear(item.name, {item.name: theirs(config, item.name)}, turned=False)
        elif item.kind == "float32":
            tensor = writer.checkpoint.read(theirs(config, item.name)).float().reshape(item.shape)
            writer.float32(item.name, -tensor.exp() if item.name.endswith(".decay") else tensor)
        else:
            tensor = writer.checkpoint.read(theirs(config, item.name))
            if item.name == "position_embed.weight":
                tensor = tensor[:model["max_context"]]
            elif ".gates_" in item.name:
                gates = tensor.unflatten(0, (-1, config.hidden_size))
                tensor = gates[GATES[len(gates)]].reshape(item.shape)
            writer.dense(item.name, tensor)


def rope_tables(config: ModelConfig, number: int, head_dim: int, context: int) -> dict[str, torch.Tensor]:
    """The tables of one of the model's RoPEs, by name."""
    layer = next(layer for layer in config.layers if layer.rope == number and layer.mixer == "attention")
    rope, name, positions = config.rope(layer), rope_name(number), torch.arange(context)
    tables = dict(zip((f"{name}.cos", f"{name}.sin"), rotations(rope, head_dim, positions, context)))
    factors = query_factors(rope, positions)
    return tables if factors is None else tables | {f"{name}.query": factors}


def theirs(config: ModelConfig, name: str) -> str:
    """What a checkpoint calls the module or tensor that is `name` in a bundle."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return WHOLE.get(first, f"model.{first}") + (rest and f".{rest}")
    number, first, *rest = rest.split(".")
    kind, _, what = first.partition("_")
    mixer = MIXERS.get(config.layers[int(number)].mixer)
    if first in ("experts", "shared"):
        module, rest = ".".join(["moe", first, *rest]) + "_proj", []
    elif mixer and first in STATES:
        module = f"{mixer}.{STATES[first]}"
    else:
        module = MODULES.get(first) or f"{MIXERS[kind]}.{what}_proj"
    return ".".join([f"model.layers.{number}", module, *rest])


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

    def linear(self, name: str, parts: dict[str, str], turned: bool = True) -> None:
        """Linears of one input, part -> module: one matrix where they are stored alike, else one a part. `turned`: as [K, N]."""
        modules = list(parts.values())
        forms = {self.formats.get(module) for module in modules}
        if len(forms) > 1 or len(modules) > 1 and any(form and form.kind == "levels" for form in forms):
            for part, module in parts.items():
                self.linear(f"{name.rpartition('.')[0]}.{part}", {part: module})
            return
        if modules[0] in self.formats:
            self._codes(name, [self.checkpoint.quantized(module) for module in modules], turned)
        else:
            self.dense(f"{name}.weight", *(self.checkpoint.read(f"{module}.weight") for module in modules), turned=turned)
        if (scale := f"{modules[0]}.input_scale") in self.names:                  # modules that read one input share it
            self.float32(f"{name}.input_scale", self.checkpoint.read(scale).reshape(()))
        if f"{modules[0]}.bias" in self.names:
            self.dense(f"{name}.bias", *(self.checkpoint.read(f"{module}.bias") for module in modules))

    def float32(self, name: str, tensor: torch.Tensor) -> None:
        """A few numbers that stay in float32 whatever the graph computes in."""
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.checkpoint.path}: {name} has values that are not finite: mend the checkpoint")
        self.out.add(name, "float32", tuple(tensor.shape), [tensor.contiguous().numpy()])

    def _codes(self, name: str, parts: list[QuantizedTensor], turned: bool) -> None:
        """Codes, scales, levels and zero points of tensors [N, K] stored alike, stacked; `turned`: stored as [K, N]."""
        first, scales, zeros = parts[0], [part.scales for part in parts], [part.zeros for part in parts]
        small = first.scale_bits == 8
        self.out.formats[name] = described(first.format)
        bits, kind, stored = first.bits, "float8_e4m3fn", torch.Tensor.contiguous
        if bits not in BACKENDS["onnx"].bits or first.kind == "levels" or small:                # the checkpoint's own form
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
        if small:
            scales, rows = zip(*map(byte_scales, scales))
            self._stack(f"{name}.scales", "int8", scales, turned)
            self._stack(f"{name}.row_scales", "float16", rows, turned)
        else:
            self._stack(f"{name}.scales", "float16", scales, turned)
        if first.kind == "levels":
            self._stack(f"{name}.levels", "int8", [first.levels[None]], turned)
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
