"""Write a safetensors file as a stream: one tensor in memory at a time, in the order they come.

A safetensors file is the header's length (uint64, little-endian), a JSON header with every tensor's dtype, shape and
place, then the bytes. Here the header comes last into room kept for it and is padded with spaces, which the format
allows. Reading is the `safetensors` library's.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
           torch.float8_e4m3fn: "F8_E4M3"}


def save_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors that are all there already. Raises OSError where the disk is full."""
    room = sum(3 * len(name) + 400 for name in tensors) + 2 * len(json.dumps(metadata))
    write_safetensors(file, tensors.items(), room, metadata)


def write_safetensors(file: Path, tensors: Iterable[tuple[str, torch.Tensor]], header_room: int,
                      metadata: dict[str, str] | None = None) -> dict[str, int]:
    """Write `tensors` to `file`; returns bytes by dtype name.

    header_room: bytes kept for the header, about 100 and the name's length for each tensor. Raises ValueError for a
    name that comes twice or a header that needs more; OSError where the disk is full.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    sizes: dict[str, int] = {}
    start = -(-(8 + header_room) // 64) * 64       # tensors start aligned
    with open(file, "wb") as out:
        out.seek(start)
        for name, tensor in tensors:
            if name in header:
                raise ValueError(f"tensor {name} comes twice")
            data = tensor.detach().cpu().contiguous()
            begin = out.tell() - start
            out.write(data.flatten().view(torch.uint8).numpy())
            dtype = _DTYPES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, out.tell() - start]}
            sizes[dtype] = sizes.get(dtype, 0) + data.nbytes
            del tensor, data                       # free it before the next one is made
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > start - 8:
            raise ValueError(f"the header takes {len(text)} bytes of {start - 8}: more tensors than the model has")
        out.seek(0)
        out.write((start - 8).to_bytes(8, "little") + text.ljust(start - 8))
    return sizes
