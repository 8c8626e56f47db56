"""Quantized checkpoints of others as ours, their codes kept: GPTQ, AWQ and compressed-tensors int4 as on the hub.

    python -m compress.foreign FOLDER -o OUT

What config.json's `quantization_config` names decides how a linear [N, K] with groups of K is stored (G groups, bits b):
    gptq                qweight int32 [K b/32, N] packed along K, qzeros int32 [G, N b/32] (less 1, but in format
                        "gptq_v2"), scales [G, N], g_idx [K]
    awq                 qweight int32 [K, N b/32] and qzeros int32 [G, N b/32], eight codes a word in the order
                        0 2 4 6 1 3 5 7, scales [G, N]
    compressed-tensors  weight_packed int32 [N, K b/32] packed along K, symmetric, weight_scale [N, G]
Codes and zero points are written as they are; scales become fp16. Zero points that are all 2^(b-1) become symmetric.

Refused, in words: widths other than 2, 4 and 8 bits; GPTQ in activation order with groups out of place (g_idx), which
no contiguous groups can hold; pickles; asymmetric compressed-tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models import lineage
from models.config import ModelConfig
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import read_json

EXAMPLES = """examples:
  python -m compress.foreign downloads/SmolLM2-135M-GPTQ -o build/smollm2-gptq
"""


@dataclass(frozen=True)
class Options:
    """Turn a GPTQ, AWQ or compressed-tensors checkpoint into one of ours, codes kept."""

    checkpoint: Path = arg(positional=True, help="Hugging Face folder with quantized safetensors")
    out: Path = arg(help="checkpoint folder to write", short="-o")


def main(argv=None) -> int:
    return run(Options, "adopt", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoint import check_output, open_checkpoint, write_checkpoint
from models.decoder import tensor_shapes
from models.quantized import Quantization, QuantizedTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIX = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}


class FolderTensors:
    """All tensors of a folder's safetensors files, read one at a time."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no safetensors files: pickles can run code, so save it again as safetensors")
        self.places = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None
            self.places |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.places:
            raise UserError(f"the checkpoint lacks {name}, which its quantization_config asks for")
        return self.places[name].get_tensor(name)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits]: codes of a word from its lowest bits up."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.long()[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def read_gptq(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    codes = unpack_words(tensors[f"{module}.qweight"].T, bits)                         # [N, K]
    columns = codes.shape[1]
    group = columns if group in (-1, 0) else group
    places = tensors.places.get(f"{module}.g_idx")
    if places is not None and not torch.equal(tensors[f"{module}.g_idx"].long(), torch.arange(columns) // group):
        raise UserError(f"{module} was quantized in activation order with its groups out of place (g_idx), which contiguous "
                        f"groups cannot hold: quantize it again with desc_act false or static groups")
    zeros = unpack_words(tensors[f"{module}.qzeros"], bits).T                          # [N, G]
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)                                            # as its kernels wrap
    return _tensor(module, codes, tensors[f"{module}.scales"].T, zeros, bits, group)


def read_awq(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    order = torch.tensor(AWQ_ORDER).argsort()

    def rows(words: Tensor) -> Tensor:
        return unpack_words(words, bits).unflatten(-1, (-1, 8))[..., order].flatten(-2).T
    if bits != 4:
        raise UserError(f"AWQ of {bits} bits is not known here: 4 is")
    codes = rows(tensors[f"{module}.qweight"])
    group = codes.shape[1] if group in (-1, 0) else group
    return _tensor(module, codes, tensors[f"{module}.scales"].T, rows(tensors[f"{module}.qzeros"]), bits, group)


def read_compressed(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    if f"{module}.weight_zero_point" in tensors.places:
        raise UserError(f"{module} has packed zero points: of compressed-tensors only symmetric weights are read")
    scales = tensors[f"{module}.weight_scale"]
    columns = int(tensors[f"{module}.weight_shape"][1])
    codes = unpack_words(tensors[f"{module}.weight_packed"], bits)[:, :columns]
    return _tensor(module, codes, scales, torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8), bits,
                   columns // scales.shape[1])


READERS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed}


def _tensor(module: str, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> QuantizedTensor:
    scales = scales.half()
    if scales.shape != zeros.shape or scales.shape[1] * group != codes.shape[1]:
        raise UserError(f"{module} has {codes.shape[1]} inputs and {list(scales.shape)} scales, which do not fit groups of {group}")
    if not torch.isfinite(scales).all():
        raise UserError(f"{module}.scales holds values that are not finite in fp16: the checkpoint cannot be used")
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    if not symmetric and int(zeros.max()) >= 2**bits:
        raise UserError(f"{module} has zero point {int(zeros.max())}, which {bits} bits cannot hold")
    return QuantizedTensor(codes.contiguous(), scales.contiguous(), None if symmetric else zeros.contiguous(), bits,
                           0 if scales.shape[1] == 1 else group, symmetric)


def _scheme(config: dict) -> tuple[str, int, int]:
    """Method, bits and group of a Hugging Face `quantization_config`. Raises UserError for one not known."""
    method = config.get("quant_method")
    if method not in READERS:
        raise UserError(f"quantization method {method!r} is not known: known are {', '.join(READERS)}")
    if method == "compressed-tensors":
        groups = list(config.get("config_groups", {}).values())
        weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
        if config.get("format") != "pack-quantized" or weights.get("type") != "int":
            raise UserError("of compressed-tensors only format pack-quantized with one group of int weights is read")
        bits, group = weights.get("num_bits"), weights.get("group_size") or -1
    else:
        bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits not in (2, 4, 8) or type(group) is not int:
        raise UserError(f"quantization_config has bits {bits!r} and group_size {group!r}: bits 2, 4 and 8 are read")
    return method, bits, group


def adopt(options: Options) -> None:
    """Run the stage. Raises UserError for a checkpoint that cannot be read so; then nothing is written."""
    folder = options.checkpoint
    hf_config = read_json(folder / "config.json", strict=False)
    quantization = hf_config.get("quantization_config") or {}
    if not quantization:
        raise UserError(f"{folder} is not quantized: compress.quantize reads it as it is")
    if quantization.get("quant_method") == "edgewright":
        raise UserError(f"{folder} is one of ours already")
    method, bits, group = _scheme(quantization)
    plain = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    config = ModelConfig.from_hf(plain)
    check_output(options.out, folder)
    tensors = FolderTensors(folder)
    modules = sorted(name.removesuffix(f".{SUFFIX[method]}") for name in tensors.places if name.endswith(f".{SUFFIX[method]}"))
    known = {name.removesuffix(".weight") for name in tensor_shapes(config)}
    if not modules or not known.issuperset(modules):
        raise UserError(f"{folder} holds no {method} linears of a {config.family} model under their published names")
    formats = {module: READERS[method](tensors, module, bits, group, quantization).format for module in modules}

    def stored() -> Iterator[tuple[str, Tensor]]:
        for module in modules:
            yield from READERS[method](tensors, module, bits, group, quantization).tensors(module).items()
        for name in tensor_shapes(config):
            if name.removesuffix(".weight") not in formats:
                yield name, tensors[name]
    stage = lineage.stage("compress.foreign", options, {"config": _sha256(folder)})
    write_checkpoint(options.out, plain | {"quantization_config": Quantization(formats).to_dict()}, stored(), folder, stage)
    print(f"{len(formats)} linears of {bits} bits from {method}: {open_checkpoint(options.out).path}")


def _sha256(folder: Path) -> str:
    """sha256 over config.json and the safetensors files of a folder."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
