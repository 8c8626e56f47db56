"""A bundle's quantized matrices as ONNX Runtime's MatMulNBits reads them, made from the mapped weights while a session is opened.

    for name, array in made(bundle): ...      # "layers.0.qkv.blocks", "layers.0.qkv.block_scales", ...

A bundle stores signed codes [K, N] (a table: [N, K]) with scales by groups of inputs. MatMulNBits wants every output's row in
blocks: unsigned codes uint8 [N, K / block, block * bits / 8], two of 4 bits a byte, the first in the low half; scales fp16 [N,
K / block]; zero points, where there are any, uint8 [N, ceil(K / block * bits / 8)]. N is the number of outputs, and rows of zeros up to
a multiple of 8, without which CUDA has no kernel for a single token and would dequantize at every step.

`cuda.onnx` (export/cuda_graph.py) names these tensors and has no bytes for them: whoever opens it hands them over
(`SessionOptions.add_external_initializers`). With SmolLM2's 4-bit linears numpy needs 0.15 s and 60 MB for them; the same as nodes of
the graph, which ONNX Runtime folds while loading, costs 0.8 s and 650 MB.

A block is a group of the codes where that has 16, 32, 64 or 128 inputs; else 32 or 16 of them, and the group's scale is repeated.
What has no such block (`block_size` says None) is for the graphs that dequantize.
"""

import math
from collections.abc import Iterator

import numpy as np

from .bundle import Bundle
from .errors import UserError

BLOCKS = (16, 32, 64, 128)        # that CUDA's kernels of both widths have
COLUMNS = 8                       # outputs that one of their thread blocks has
TABLES = ("embed",)               # stored by outputs


def block_size(stored: dict[str, dict], name: str) -> int | None:
    """Inputs of the matrix `name` that share a scale in MatMulNBits, or None where it cannot be had. stored: tensors by name."""
    codes, scales = stored[f"{name}.codes"], stored[f"{name}.scales"]["shape"]
    outputs, inputs = _sizes(codes, name)
    groups = 1 if len(scales) == 1 else scales[name in TABLES]
    group = inputs // groups
    if codes["dtype"] not in ("int4", "int8") or codes["dtype"] == "int4" and (outputs % 2 or name in TABLES and f"{name}.zeros" in stored):
        return None
    return group if group in BLOCKS else next((block for block in (32, 16) if group % block == 0), None)


def shapes(stored: dict[str, dict], name: str) -> dict[str, tuple[str, list[int]]]:
    """What `made` gives for a matrix: name -> (dtype, shape)."""
    codes, block = stored[f"{name}.codes"], block_size(stored, name)
    (outputs, inputs), bits = _sizes(codes, name), int(codes["dtype"][3:])
    count, rows = inputs // block, -(-outputs // COLUMNS) * COLUMNS
    found = {f"{name}.blocks": ("uint8", [rows, count, block * bits // 8]), f"{name}.block_scales": ("float16", [rows, count])}
    if f"{name}.zeros" in stored:
        found[f"{name}.block_zeros"] = "uint8", [rows, -(-count * bits // 8)]
    return found


def made(bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of everything that `shapes` says of the bundle's quantized matrices, one after the other. Each is contiguous
    and nobody else's. Raises UserError for a matrix that has no such blocks."""
    stored = {tensor["name"]: tensor for tensor in bundle.manifest["weights"]["tensors"]}
    for name in [tensor.removesuffix(".codes") for tensor in stored if tensor.endswith(".codes")]:
        block = block_size(stored, name)
        if block is None:
            raise UserError(f"{bundle.folder}: the codes of {name} cannot be had in blocks, as cuda.onnx needs them; run "
                            "`python -m export.ort` again, which leaves that graph out")
        outputs, inputs = _sizes(stored[f"{name}.codes"], name)
        bits, by_inputs, wanted = int(stored[f"{name}.codes"]["dtype"][3:]), name not in TABLES, shapes(stored, name)
        count = inputs // block
        values = {"blocks": _blocks(bundle.tensor(f"{name}.codes").reshape(-1).view(np.uint8), outputs, inputs, bits, by_inputs),
                  "block_scales": _repeated(bundle.tensor(f"{name}.scales"), outputs, count, by_inputs)}
        if f"{name}.zeros" in stored:
            zeros = bundle.tensor(f"{name}.zeros").reshape(-1).view(np.uint8)
            if bits == 4:
                zeros = np.stack([zeros & 15, zeros >> 4], axis=1)
            shape = stored[f"{name}.zeros"]["shape"]
            zeros = _repeated(zeros.reshape(-1)[:math.prod(shape)].reshape(shape), outputs, count, by_inputs) ^ (1 << bits - 1)
            if bits == 4:
                zeros = np.pad(zeros, ((0, 0), (0, count % 2)))
                zeros = zeros[:, ::2] | zeros[:, 1::2] << 4
            values["block_zeros"] = zeros
        for part, value in values.items():
            shape = wanted[f"{name}.{part}"][1]
            if outputs < shape[0]:
                value = np.pad(value, ((0, shape[0] - outputs), (0, 0)))
            yield f"{name}.{part}", np.ascontiguousarray(value).reshape(shape)


def _sizes(codes: dict, name: str) -> tuple[int, int]:
    """Outputs and inputs of a matrix."""
    first, second = codes["shape"]
    return (first, second) if name in TABLES else (second, first)


def _blocks(codes: np.ndarray, outputs: int, inputs: int, bits: int, by_inputs: bool) -> np.ndarray:
    """The bytes of unsigned codes by outputs, uint8 [N, K * bits / 8], of stored signed ones."""
    if not by_inputs or bits == 8:
        rows = codes.reshape(outputs, -1) if not by_inputs else codes.reshape(inputs, outputs).T
        return rows ^ (0x88 if bits == 4 else 0x80)
    codes, made = codes.reshape(inputs, outputs // 2), np.empty((outputs, inputs // 2), np.uint8)
    even, odd = codes[::2], codes[1::2]                     # of two inputs, and in each byte two outputs
    made[::2] = ((even & 15 | odd << 4) ^ 0x88).T
    made[1::2] = ((even >> 4 | odd & 0xf0) ^ 0x88).T
    return made


def _repeated(values: np.ndarray, outputs: int, count: int, by_inputs: bool) -> np.ndarray:
    """Scales or zero points of groups, by outputs and for each of `count` blocks: [N, count]."""
    rows = values.reshape(outputs, -1) if values.ndim == 1 or not by_inputs else values.T
    return np.repeat(rows, count // rows.shape[1], axis=1)
