"""Mixed precision: a format for every module, so that a target size is spent where it saves most.

    formats = mixed_formats(checkpoint, sensitivity, budget_bytes, "onnx")

The candidates are the widths a backend can run, in groups of 32, 64 and 128 (8 bits also one scale a row); what each
costs in KL comes from compress/sensitivity.py, and compress/allocate.py finds the best combination. A size counts every
byte of a bundle's weights file: codes, scales, zero points, what is not quantized, RoPE's tables (for the context that
export.onnx gives a bundle by default) and the gaps that align tensors.

`BACKENDS` is the table of widths each backend runs; `check_backend` refuses formats it cannot, before any work.
"""

from __future__ import annotations

import math
import re

from compress.allocate import Choice, allocate, size_bytes
from compress.sensitivity import Sensitivity
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.quantized import TensorFormat
from runtime.errors import UserError

BACKENDS = {"native": (2, 3, 4, 5, 6, 8), "onnx": (4, 8), "tensorrt": (4, 8)}
GROUPS = (32, 64, 128)
BUNDLE_CONTEXT = 8192             # most positions of a bundle's RoPE tables, unless export.onnx is told otherwise
VECTOR, PAGE = 64, 4096           # what a bundle's tensors are aligned to: any tensor, one over 1 MiB


def candidates(backend: str) -> list[TensorFormat]:
    """The symmetric formats that mixed precision chooses from for a backend."""
    forms = [TensorFormat(bits, group) for bits in BACKENDS[backend] for group in GROUPS]
    return [*forms, *(TensorFormat(bits, 0) for bits in BACKENDS[backend] if bits >= 5)]


def check_backend(formats: dict[str, TensorFormat], backend: str) -> None:
    """Raises UserError for the first module whose format the backend cannot run."""
    for module, form in formats.items():
        if form.bits not in BACKENDS[backend]:
            raise UserError(f"{module} would have {form.bits} bits, and {backend} bundles run {_words(BACKENDS[backend])} "
                            f"bits: choose one of these, or --backend native")
        if backend == "tensorrt" and not form.symmetric:
            raise UserError(f"{module} would have zero points, and TensorRT runs none: leave out --no-symmetric")


def parse_size(text: str) -> int:
    """Bytes of a size such as "92MB" or "90000000". Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?B?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--target-size is {text!r}, which should be a size such as 92MB")
    return int(float(match[1]) * {"": 1, "B": 1, "kB": 1e3, "k": 1e3, "MB": 1e6, "M": 1e6, "GB": 1e9, "G": 1e9}[match[2]])


def budget(checkpoint: Checkpoint, target_size: str | None, target_bpw: float | None) -> int:
    """Bytes of tensors that a target allows. Raises UserError for a target that cannot be."""
    if target_size is not None:
        return parse_size(target_size)
    if not 0 < target_bpw <= 32:
        raise UserError(f"--target-bpw is {target_bpw}, which should be above 0 and at most 32")
    return int(target_bpw * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()) / 8)


def mixed_formats(checkpoint: Checkpoint, sensitivity: Sensitivity, budget_bytes: int, backend: str,
                  skip: tuple[str, ...] = ()) -> tuple[dict[str, TensorFormat], float]:
    """Module -> format of least predicted damage within the budget, and that damage (nats a token).

    skip: modules to leave as they are. Raises UserError where the budget cannot be met.
    """
    allowed, choices = set(candidates(backend)), {}
    for module, row in sensitivity.damage.items():
        if module not in skip:
            shape = checkpoint.shape(f"{module}.weight")
            choices[module] = [Choice(form, size_bytes(shape, form), value) for form, value in row.items() if form in allowed]
    rest = sum(checkpoint.nbytes(name) for name in checkpoint.names() if name.removesuffix(".weight") not in choices)
    rest += bundle_extras(checkpoint.config)
    try:
        found = allocate(choices, budget_bytes - rest)
    except UserError as error:
        raise UserError(f"the target of {budget_bytes / 1e6:.2f} MB is out of reach ({rest / 1e6:.2f} MB are tables or "
                        f"stay as they are): {error}") from None
    return {module: choice.format for module, choice in found.items()}, sum(choice.damage for choice in found.values())


def bundle_extras(config: ModelConfig) -> int:
    """Bytes that a bundle's weights file has beyond the checkpoint's tensors: RoPE's tables, and at most this alignment."""
    tables = 4 * min(config.context_length, BUNDLE_CONTEXT) * config.head_dim if config.positions == "rope" else 0
    return tables + sum(16 * VECTOR + 2 * PAGE for _ in config.layers) + 2 * PAGE


def _words(bits: tuple[int, ...]) -> str:
    return ", ".join(map(str, bits[:-1])) + f" and {bits[-1]}"
