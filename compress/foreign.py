"""Quantized checkpoints of others as ours, their codes kept: GPTQ, AWQ and compressed-tensors int4 as on the hub.

    python -m compress.foreign FOLDER -o OUT

What config.json's `quantization_config` names decides how a linear [N, K] with groups of K is stored (G groups, bits b):
    gptq                qweight int32 [K b/32, N] packed along K, qzeros int32 [G, N b/32] (less 1, but in format
                        "gptq_v2"), scales [G, N], g_idx [K]
    awq                 qweight int32 [K, N b/32] and qzeros int32 [G, N b/32], eight codes a word in the order
                        0 2 4 6 1 3 5 7, scales [G, N]
    compressed-tensors  weight_packed int32 [N, K b/32] packed along K, symmetric, weight_scale [N, G]
Codes and zero points are written as they are; scales become fp16. Zero points that are all 2^(b-1) become symmetric.

Refused, in words: widths other than 2, 4 and 8 bits; groups out of place, as activation order may leave them (g_idx);
asymmetric compressed-tensors; rotations and quantized activations; pickles; every key of the configuration that is not
understood (compress/quantizing/foreign_keys.py), and every tensor of the file that has no place.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.formats import lineage
from models.network.config import ModelConfig
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
from torch import Tensor

from compress.quantizing.foreign_keys import scheme
from models.checkpoint import check_output, open_checkpoint, stored_tensors, write_checkpoint
from models.families import FAMILIES
from models.formats.weight_names import Naming
from models.network.decoder import tensor_shapes
from models.network.quantized import Quantization, QuantizedTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TABLE = "model.embed_tokens.weight"
SUFFIX = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}


class FolderTensors:
    """All tensors of a folder, read one at a time; `left` are those that nobody asked for."""

    def __init__(self, folder: Path):
        files: dict = {}
        self.places = {name: file for file, name in stored_tensors(folder, files)}
        self.left, self._files = set(self.places), files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.places:
            raise UserError(f"the checkpoint lacks {name}, which its quantization_config asks for")
        self.left.discard(name)
        return self._files[self.places[name]].get_tensor(name)

    def integers(self, name: str, dims: int = 2) -> Tensor:
        """A tensor of int32 (shapes and orders: int64 too) with so many axes, or a UserError."""
        tensor = self[name]
        if tensor.ndim != dims or tensor.dtype != torch.int32 and (dims == 2 or tensor.dtype != torch.int64):
            raise UserError(f"{name} is {list(tensor.shape)} of {tensor.dtype}, where {'a matrix' if dims == 2 else 'a list'} of int32 should be")
        return tensor


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits]: codes of a word from its lowest bits up."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.long()[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def read_gptq(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    codes = unpack_words(tensors.integers(f"{module}.qweight").T, bits)                         # [N, K]
    if f"{module}.g_idx" not in tensors.places and config.get("desc_act"):
        raise UserError(f"{module} has no g_idx, which desc_act asks for")
    zeros = unpack_words(tensors.integers(f"{module}.qzeros"), bits).T                          # [N, G]
    if (config.get("checkpoint_format") or config.get("format")) != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)                                            # as its kernels wrap
    return _tensor(tensors, module, codes, tensors[f"{module}.scales"].T, zeros, bits, group, "g_idx")


def read_awq(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    if bits != 4:
        raise UserError(f"AWQ of {bits} bits is not known here: 4 is")
    order = torch.tensor(AWQ_ORDER).argsort()
    codes, zeros = (unpack_words(tensors.integers(f"{module}.{name}"), bits).unflatten(-1, (-1, 8))[..., order].flatten(-2).T
                    for name in ("qweight", "qzeros"))
    return _tensor(tensors, module, codes, tensors[f"{module}.scales"].T, zeros, bits, group)


def read_compressed(tensors, module: str, bits: int, group: int, config: dict) -> QuantizedTensor:
    if f"{module}.weight_zero_point" in tensors.places:
        raise UserError(f"{module} has packed zero points: of compressed-tensors only symmetric weights are read")
    scales = tensors[f"{module}.weight_scale"]
    shape = tensors.integers(f"{module}.weight_shape", 1).tolist()
    packed = unpack_words(tensors.integers(f"{module}.weight_packed"), bits)
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if packed.shape[0] != rows or not 0 <= packed.shape[1] - columns < 32 // bits:
        raise UserError(f"{module}.weight_shape says {shape}, and weight_packed holds {list(packed.shape)} codes")
    weights = next(iter(config["config_groups"].values()))["weights"]
    if weights.get("actorder") in ("group", "dynamic", True) and f"{module}.weight_g_idx" not in tensors.places:
        raise UserError(f"{module} has no weight_g_idx, which actorder {weights['actorder']!r} asks for")
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return _tensor(tensors, module, packed[:, :columns], scales, zeros, bits, group, "weight_g_idx")


READERS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed}


def _tensor(tensors, module: str, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int,
            order: str = "") -> QuantizedTensor:
    """Codes [N, K], scales and zeros [N, G] as ours. order: the tensor that may say which group an input belongs to."""
    columns = codes.shape[1]
    group = columns if group in (-1, 0) else group
    if f"{module}.{order}" in tensors.places:
        found = tensors.integers(f"{module}.{order}", 1).long()            # group k // group for input k; all -1 means the same
        if not torch.equal(found, torch.arange(columns) // group) and not (len(found) == columns and bool((found == -1).all())):
            raise UserError(f"{module}.{order}: it was quantized in activation order with its groups out of place, which contiguous groups "
                            f"cannot hold: quantize it again without activation order (desc_act, actorder) or with static groups")
    exact, scales = scales.float(), scales.half()
    if not scales.ndim == codes.ndim == 2:
        raise UserError(f"{module}: its codes are {list(codes.shape)} and its scales {list(scales.shape)}, which should be matrices")
    if scales.shape != zeros.shape or scales.shape[1] * group != columns:
        raise UserError(f"{module} has {columns} inputs and {list(scales.shape)} scales, which do not fit groups of {group}")
    if not torch.isfinite(scales).all():
        raise UserError(f"{module}.scales holds values that are not finite in fp16: the checkpoint cannot be used")
    if ((scales.float() - exact).abs() > exact.abs() / 256).any():
        raise UserError(f"{module} has scales as small as {float(exact[exact != 0].abs().min()):.1e}, which fp16 cannot hold")
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    if not symmetric and int(zeros.max()) >= 2**bits:
        raise UserError(f"{module} has zero point {int(zeros.max())}, which {bits} bits cannot hold")
    return QuantizedTensor(codes.contiguous(), scales.contiguous(), None if symmetric else zeros.contiguous(), bits,
                           0 if scales.shape[1] == 1 else group, symmetric)


def adopt(options: Options) -> None:
    """Run the stage. Raises UserError for a checkpoint that cannot be read so; then nothing is written."""
    folder = options.checkpoint
    hf_config = read_json(folder / "config.json", strict=False)
    quantization = hf_config.get("quantization_config") or {}
    if not quantization:
        raise UserError(f"{folder} is not quantized: compress.quantize reads it as it is")
    if not isinstance(quantization, dict):
        raise UserError(f"{folder / 'config.json'}: quantization_config is {quantization!r:.60}, where an object should be")
    if quantization.get("quant_method") == "edgewright":
        raise UserError(f"{folder} is one of ours already")
    method, bits, group = scheme(quantization)
    plain = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    config = ModelConfig.from_hf(plain)
    if FAMILIES[config.family].naming != Naming():
        raise UserError(f"{folder}: linears of a {config.family} are stored under other names or in another form than the decoder's, which "
                        f"is not read from {method}: quantize the original with compress.quantize")
    check_output(options.out, folder)
    tensors = FolderTensors(folder)
    modules = sorted(name.removesuffix(f".{SUFFIX[method]}") for name in tensors.places if name.endswith(f".{SUFFIX[method]}"))
    shapes = tensor_shapes(config)
    known = {name.removesuffix(".weight") for name in shapes}
    if not modules or not known.issuperset(modules):
        raise UserError(f"{folder} holds no {method} linears of a {config.family} model under their published names")
    formats = {}
    for module in modules:
        tensor = READERS[method](tensors, module, bits, group, quantization)
        if tuple(tensor.codes.shape) != shapes[f"{module}.weight"]:
            raise UserError(f"{module} has {list(tensor.codes.shape)} codes, where config.json asks for {list(shapes[f'{module}.weight'])}")
        formats[module] = tensor.format
    dense = {name: name for name in shapes if name.removesuffix(".weight") not in formats}
    if config.tied_embeddings and "lm_head.weight" in tensors.places:
        if TABLE not in tensors.places:
            dense[TABLE] = "lm_head.weight"
        elif not torch.equal(tensors["lm_head.weight"], tensors[TABLE]):
            raise UserError(f"{folder} holds lm_head.weight beside {TABLE} with other values, while config.json ties the two")
    _check_left(folder, tensors, set(dense.values()), modules)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for module in modules:
            yield from READERS[method](tensors, module, bits, group, quantization).tensors(module).items()
        for name, theirs in dense.items():
            tensor = tensors[theirs]
            if tuple(tensor.shape) != shapes[name] or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise UserError(f"{theirs} is {list(tensor.shape)} of {tensor.dtype}, where config.json asks for "
                                f"{list(shapes[name])} floats")
            yield name, tensor
    stage = lineage.stage("compress.foreign", options, {"config": _sha256(folder)})
    write_checkpoint(options.out, plain | {"quantization_config": Quantization(formats).to_dict()}, stored(), folder, stage)
    print(f"{len(formats)} linears of {bits} bits from {method}: {open_checkpoint(options.out).path}")


def _check_left(folder: Path, tensors: FolderTensors, dense: set[str], modules: list[str]) -> None:
    """Raises UserError for a tensor that nothing reads; biases of zeros, as GPTQ's tools add, and RoPE's buffers are none."""
    for name in sorted(tensors.left - dense):
        zero_bias = name.removesuffix(".bias") in modules and name.endswith(".bias") and not tensors[name].any()
        if not zero_bias and not name.endswith(".rotary_emb.inv_freq"):
            raise UserError(f"{folder} holds {name}, which is not understood: leaving it out would change the model")


def _sha256(folder: Path) -> str:
    """sha256 over config.json and the safetensors files of a folder."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
