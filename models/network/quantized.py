"""Quantized weights: integer codes, scales, zero points and tables of levels, and how a checkpoint stores them.

A quantized weight W [N, K] (out, in) is decided once (in compress/), as unsigned codes of `bits` bits with one scale for
each group of `group` inputs of a row (group 0: one for the whole row), and every consumer computes from these codes:

    W[n, k] = (codes[n, k] - zero) * float32(scales[n, k // group])         zero = 2^(bits-1), or zeros[n, k // group]
    W[n, k] = levels[codes[n, k]] * float32(scales[n, k // group])          of kind "levels", bits 2, 3 or 4

In a checkpoint, module M has `M.codes` uint8 [N, ceil(K*bits/8)], each row a little-endian bit stream (code i occupies
bits i*bits .. (i+1)*bits-1), `M.scales` float16 [N, K/group] ([N, 1] for group 0) and, where asymmetric, `M.zeros`
uint8 of the scales' shape, all in place of `M.weight`. config.json says which modules, and how:

    "quantization_config": {"quant_method": "edgewright", "version": 1,
                            "tensors": {"model.layers.0.mlp.up_proj": {"bits": 4, "group": 32, "symmetric": true}},
                            "activations": {"bits": 8, "per": "tensor"}, "kv_cache": {"bits": 8, "per": "channel"}}

Version 2, which readers of version 1 refuse, is written where a tensor has either of these:
    "kind": "levels"    values that need not be evenly spaced: `M.levels` int8 [2^bits], strictly rising, within -127 .. 127
    "scale_bits": 8     a scale in one byte: `M.scales` int8 [N, K/group], not 0 and not -128, and `M.row_scales` float16 [N, 1],
                        positive; the scale is float32(int8) * float32(row scale), and the largest of a row is 127 or -127

A tensor of kind "e4m3" has 8-bit floating-point codes instead (torch.float8_e4m3fn, value = code * scale). "activations"
({} for none) says how the layers' linears round their inputs (activations.py): "per" row, or tensor with one
stored scale `M.input_scale` float32 [1]; those whose last name "except" lists do not round. "kv_cache" (null for none):
keys (after RoPE) and values are kept as round(x / scale) in int8, scales `model.layers.N.self_attn.k_scale` and `.v_scale`
float32 [1], or [kv_heads * head_dim] per channel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch

from runtime.errors import UserError

METHOD, VERSION, VERSIONS = "edgewright", 1, (1, 2)        # 2: with levels or 8-bit scales
BITS = range(2, 9)
USUAL = {"kind": "int", "scale_bits": 16}                    # not said in config.json
SMALLEST = 2.0**-24           # the smallest positive fp16: a scale is never zero
LARGEST = 65504.0
ACTIVATIONS = ({}, {"bits": 8, "per": "row"}, {"bits": 8, "per": "tensor"},
               {"bits": 8, "per": "tensor", "except": ["down_proj"]})
KV_CACHES = (None, {"bits": 8, "per": "tensor"}, {"bits": 8, "per": "channel"})


@dataclass(frozen=True)
class TensorFormat:
    """How one weight is stored. group 0 is one scale for each output row."""

    bits: int
    group: int
    symmetric: bool = True
    kind: str = "int"             # "e4m3": 8-bit floats; "levels": a table of values
    scale_bits: int = 16          # 8: int8 times one fp16 a row

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in BITS:
            raise UserError(f"bits is {self.bits!r}, which should be from {BITS[0]} to {BITS[-1]}")
        if type(self.group) is not int or self.group < 0:
            raise UserError(f"group is {self.group!r}, which should be 0 (one scale a row) or a positive number")
        if type(self.symmetric) is not bool:
            raise UserError(f"symmetric is {self.symmetric!r}, which should be true or false")
        widths = {"int": BITS, "e4m3": (8,), "levels": (2, 3, 4)}.get(self.kind, ())
        if self.bits not in widths or self.kind != "int" and not self.symmetric:
            raise UserError(f"kind is {self.kind!r} with {self.bits} bits: supported are int, e4m3 with 8 bits and levels with 2 to 4 "
                            f"bits, the latter two without zero points")
        small = self.scale_bits == 8 and self.group > 0 and self.kind != "e4m3"
        if type(self.scale_bits) is not int or not (small or self.scale_bits == 16):
            raise UserError(f"scale_bits is {self.scale_bits!r}, which should be 16, or 8 where a row has several groups of integers or "
                            f"levels")

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns` inputs. Raises UserError where the group does not divide them."""
        if self.group and columns % self.group:
            raise UserError(f"the group of {self.group} does not divide the {columns} inputs")
        return columns // self.group if self.group else 1

    def stored_shapes(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Suffix -> dtype and shape of the tensors that store a weight [rows, columns]."""
        scales = (rows, self.groups(columns))
        codes = torch.float8_e4m3fn if self.kind == "e4m3" else torch.uint8
        shapes = {"codes": (codes, (rows, -(-columns * self.bits // 8))), "scales": (torch.float16, scales)}
        if self.scale_bits == 8:
            shapes |= {"scales": (torch.int8, scales), "row_scales": (torch.float16, (rows, 1))}
        if self.kind == "levels":
            shapes["levels"] = torch.int8, (2**self.bits,)
        return shapes if self.symmetric else shapes | {"zeros": (torch.uint8, scales)}


@dataclass(frozen=True)
class Quantization:
    """The `quantization_config` of a checkpoint: which modules are quantized, and how."""

    tensors: dict[str, TensorFormat]
    activations: dict = field(default_factory=dict)
    kv_cache: dict | None = None

    def to_dict(self) -> dict:
        version = 2 if any(map(_newer, self.tensors.values())) else VERSION
        return {"quant_method": METHOD, "version": version, "activations": self.activations, "kv_cache": self.kv_cache,
                "tensors": {name: described(form) for name, form in self.tensors.items()}}

    def extra_shapes(self, kv_channels: list[int]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the float32 scales of activations and caches; kv_channels: kv_heads * head_dim of each layer, 0 where it keeps none."""
        shapes = {}
        if self.activations.get("per") == "tensor":
            shapes |= {f"{name}.input_scale": (1,) for name in self.rounding_linears()}
        if self.kv_cache:
            for layer, channels in enumerate(kv_channels):
                if not channels:
                    continue
                shape = (channels if self.kv_cache["per"] == "channel" else 1,)
                shapes |= {f"model.layers.{layer}.self_attn.{part}_scale": shape for part in "kv"}
        return shapes

    def rounding_linears(self) -> list[str]:
        """The linears that round their inputs where activations are quantized: those of the layers, not the head."""
        excepted = self.activations.get("except", ())
        return [name for name in self.tensors if self.activations
                and name.startswith("model.layers.") and name.rsplit(".", 1)[1] not in excepted]

    @classmethod
    def from_dict(cls, data: dict) -> Quantization:
        """Raises UserError for another method, another version, or fields that cannot be."""
        if not isinstance(data, dict) or data.get("quant_method") != METHOD:
            method = data.get("quant_method") if isinstance(data, dict) else data
            raise UserError(f"quantization method {method!r} is not supported: supported is {METHOD!r}")
        if (version := data.get("version")) not in VERSIONS:
            raise UserError(f"quantization version {version!r} is not supported: this program reads versions "
                            f"{' and '.join(map(str, VERSIONS))}, so quantize the original checkpoint again")
        tensors, activations, kv_cache = data.get("tensors"), data.get("activations", {}), data.get("kv_cache")
        for name, value, known in (("tensors", tensors, None), ("activations", activations, ACTIVATIONS),
                                   ("kv_cache", kv_cache, KV_CACHES)):
            if not isinstance(value, dict) and not (value is None and known is KV_CACHES):
                raise UserError(f"quantization_config has {name} {value!r}, which should be an object")
            if known and value not in known:
                raise UserError(f"quantization_config has {name} {value!r}: supported are {', '.join(map(str, known))}")
        formats = {}
        for name, value in tensors.items():
            try:
                formats[name] = TensorFormat(**value)
            except (TypeError, UserError) as error:
                raise UserError(f"quantization_config of {name} cannot be used: {error}") from None
            if version == VERSION and _newer(formats[name]):
                raise UserError(f"quantization_config of {name} has levels or 8-bit scales, which version {VERSION} does not know: "
                                f"quantize the original checkpoint again")
        return cls(formats, activations, kv_cache)


def described(form: TensorFormat) -> dict:
    """A format in config.json; kind and scale_bits only where they are not the usual ones."""
    return {name: value for name, value in asdict(form).items() if value != USUAL.get(name)}


def _newer(form: TensorFormat) -> bool:
    """Whether a format is of version 2."""
    return form.kind == "levels" or form.scale_bits != 16


def byte_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float [N, G] in a byte each: int8 [N, G], not 0 and not -128, and float16 [N, 1] by which to multiply them.

    The largest of a row becomes 127 or -127. Scales that come from here, float32(int8) * float32(row), give the same again."""
    largest = scales.abs().amax(1, keepdim=True)
    rows = (largest / torch.full_like(largest, 127)).clamp(SMALLEST, LARGEST).half()        # by a tensor: as exact on a device
    sign = torch.where(scales < 0, -1.0, 1.0)
    codes = torch.where(scales.abs() == largest, 127 * sign, (scales / rows.float()).round().clamp(-127, 127))
    return torch.where(codes == 0, sign, codes).to(torch.int8), rows


def of_bytes(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The scales, float32 [N, G], that `byte_scales` stands for. Raises UserError where they are none."""
    if int(codes.min()) == -128 or bool((codes == 0).any()):
        raise UserError("scales holds 0 or -128, which should be from 1 to 127 or from -127 to -1")
    if not float(rows.min()) > 0:
        raise UserError(f"row_scales holds {float(rows.min()):g}, which should be positive")
    return codes.float() * rows.float()


def check_levels(levels: torch.Tensor) -> None:
    """Raises UserError for a table that does not rise strictly within -127 .. 127."""
    if int(levels.min()) == -128 or not bool((levels[1:] > levels[:-1]).all()):
        raise UserError(f"levels holds {', '.join(map(str, levels.tolist()))}, which should rise strictly within -127 .. 127")


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight [N, K] in memory: codes unpacked, one to a byte."""

    codes: torch.Tensor                 # uint8 [N, K], unsigned; float8_e4m3fn for that kind
    scales: torch.Tensor                # float16 [N, K/group], [N, 1] for group 0; with 8-bit scales float32, what they stand for
    zeros: torch.Tensor | None          # uint8, the scales' shape; None where symmetric
    bits: int
    group: int
    symmetric: bool
    kind: str = "int"
    scale_bits: int = 16
    levels: torch.Tensor | None = None  # int8 [2^bits], of that kind

    @property
    def format(self) -> TensorFormat:
        return TensorFormat(self.bits, self.group, self.symmetric, self.kind, self.scale_bits)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device),
                       zeros=None if self.zeros is None else self.zeros.to(device),
                       levels=None if self.levels is None else self.levels.to(device))

    def split(self, rows: list[int]) -> list[QuantizedTensor]:
        """Weights of so many rows each, in views."""
        zeros = [None] * len(rows) if self.zeros is None else self.zeros.split(rows)
        return [replace(self, codes=codes, scales=scales, zeros=zero)
                for codes, scales, zero in zip(self.codes.split(rows), self.scales.split(rows), zeros)]

    def dequantize(self) -> torch.Tensor:
        """The values the codes stand for, float32 [N, K]."""
        rows, columns = self.codes.shape
        if self.kind == "levels":
            values = self.levels.float().index_select(0, self.codes.flatten().int()).view(rows, self.scales.shape[1], -1)
            return values.mul_(self.scales.float()[:, :, None]).view(rows, columns)
        zeros = self.zeros.float()[:, :, None] if self.zeros is not None else 2 ** (self.bits - 1) if self.kind == "int" else 0
        values = self.codes.view(rows, self.scales.shape[1], -1).float()
        return values.sub_(zeros).mul_(self.scales.float()[:, :, None]).view(rows, columns)

    def signed(self) -> torch.Tensor:
        """Codes less 2^(bits-1), int8 [N, K]: two's complement of `bits` bits, as ONNX stores them."""
        return (self.codes - 2 ** (self.bits - 1)).view(torch.int8)      # uint8 wraps around

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors that store this weight, by their names in a checkpoint."""
        codes = self.codes if self.kind == "e4m3" else pack(self.codes, self.bits)
        stored = {"codes": codes, "scales": self.scales}
        if self.scale_bits == 8:
            stored["scales"], stored["row_scales"] = byte_scales(self.scales)
        if self.kind == "levels":
            stored["levels"] = self.levels
        if self.zeros is not None:
            stored["zeros"] = self.zeros
        return {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}

    @classmethod
    def stored(cls, form: TensorFormat, columns: int, parts: dict[str, torch.Tensor]) -> QuantizedTensor:
        """A weight of `columns` inputs from its stored tensors by suffix. Raises UserError for what cannot be."""
        codes, scales, zeros, levels = parts["codes"], parts["scales"], parts.get("zeros"), parts.get("levels")
        if zeros is not None and int(zeros.max()) >= 2**form.bits:
            raise UserError(f"zeros holds {int(zeros.max())}, which {form.bits} bits cannot")
        if form.kind != "e4m3":
            codes = unpack(codes, form.bits, columns)
        if levels is not None:
            check_levels(levels)
        if form.scale_bits == 8:
            scales = of_bytes(scales, parts["row_scales"])
        return cls(codes, scales, zeros, form.bits, form.group, form.symmetric, form.kind, form.scale_bits, levels)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [N, K] below 2^bits as a little-endian bit stream a row: uint8 [N, ceil(K*bits/8)]."""
    if bits == 8:
        return codes
    rows, columns = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8)    # 8 codes are `bits` bytes
    words = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= eights[:, :, i].long() << (i * bits)
    stream = words[:, :, None].view(torch.uint8)[:, :, :bits]
    return stream.reshape(rows, -1)[:, :-(-columns * bits // 8)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo `pack`: uint8 [N, ceil(columns*bits/8)] to codes uint8 [N, columns]."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if 8 % bits == 0:               # codes do not straddle bytes: ten times faster than what follows
        parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, 2).view(rows, -1)[:, :columns].contiguous()
    stream = torch.nn.functional.pad(packed, (0, -(-columns // 8) * bits - packed.shape[1])).view(rows, -1, bits)
    words = torch.nn.functional.pad(stream, (0, 8 - bits)).view(torch.int64)         # [N, columns/8, 1]
    codes = torch.empty(rows, words.shape[1], 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[:, :, i] = (words[:, :, 0] >> (i * bits)) & (2**bits - 1)
    return codes.view(rows, -1)[:, :columns].contiguous()
