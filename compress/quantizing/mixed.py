"""Mixed precision: a format for every module, so that a target size is spent where it saves most.

    formats = mixed_formats(checkpoint, sensitivity, budget_bytes, "onnx")

The candidates are the widths a backend can run, in groups of 32, 64 and 128 (5 bits and more also one scale a row), where it runs them
with 8-bit scales and, of 2 to 4 bits, with levels: at the same bytes these lose less than even steps and fp16 scales. Zero points
are not among them: a byte a group buys with them what it buys as a smaller group (SmolLM2 in 92 MB: 0.3% less, by estimate). What each
costs in KL comes from sensitivity.py, and allocate.py finds the best combination. A size counts every byte of a bundle's
weights file: codes, scales, what is not quantized, RoPE's tables and the gaps that align tensors.
"""

import math

from compress.quantizing.allocate import Choice, allocate, size_bytes
from compress.quantizing.sensitivity import Sensitivity
from models.checkpoint import Checkpoint
from models.network.decoder import tensor_shapes
from models.network.quantized import Quantization, TensorFormat
from runtime.capabilities import BACKENDS, lacks
from runtime.errors import UserError
from runtime.tensors import DEFAULT_CONTEXT, LARGE, PAGE, VECTOR

GROUPS = (32, 64, 128)


def candidates(backend: str) -> list[TensorFormat]:
    """The symmetric formats that mixed precision chooses from for a backend."""
    able = BACKENDS[backend]
    forms = [TensorFormat(bits, group, kind="levels" if able.levels and bits <= 4 else "int", scale_bits=min(able.scale_bits))
             for bits in able.bits for group in GROUPS]
    return [*forms, *(TensorFormat(bits, 0) for bits in able.bits if bits >= 5)]


def measured() -> list[TensorFormat]:
    """The formats that sensitivity is measured of: those of every backend, so that one file serves all."""
    return list(dict.fromkeys(form for backend in BACKENDS for form in candidates(backend)))


def check_backend(plan: Quantization, backend: str) -> None:
    """Raises UserError for the first thing in a plan that the backend cannot run."""
    for lack in lacks(backend, plan.to_dict()):
        others = [name for name in BACKENDS if not any(lacks(name, plan.to_dict()))]
        mends = {"bits": f"choose {' or '.join(map(str, BACKENDS[backend].bits))} bits", "zeros": "leave out --no-symmetric"}
        ways = [mends[lack.field]] if lack.field in mends else []
        ways += [f"choose --backend {' or '.join(others)}"] if others else []
        raise UserError(f"{lack.where}: {lack.what} do not run in {backend}: {', or '.join(ways) or 'no backend runs all of it'}")


def check_target(checkpoint: Checkpoint, budget_bytes: int, backend: str, skip: tuple[str, ...] = ()) -> None:
    """Raises UserError for a target below the smallest size, and names that."""
    modules = [module for module in checkpoint.modules() if module not in skip]
    rest = _unquantized(checkpoint, modules)
    smallest = rest
    for module in modules:
        shape = checkpoint.shape(f"{module}.weight")
        smallest += min((size_bytes(shape, form) for form in candidates(backend) if not form.group or shape[1] % form.group == 0),
                        default=checkpoint.nbytes(f"{module}.weight"))
    if smallest > budget_bytes:
        raise UserError(f"the target of {budget_bytes / 1e6:.2f} MB is below what is possible: the smallest possible with the "
                        f"formats of --backend {backend} is {math.ceil(smallest / 1e4) / 100:.2f} MB, of which "
                        f"{rest / 1e6:.2f} MB are tables or stay as they are")


def _unquantized(checkpoint: Checkpoint, modules: list[str]) -> int:
    """Bytes of a bundle's weights file that are not weights of these modules."""
    weights = {f"{module}.weight" for module in modules}
    return sum(checkpoint.nbytes(name) for name in checkpoint.names() if name not in weights) + bundle_extras(checkpoint)


def mixed_formats(checkpoint: Checkpoint, sensitivity: Sensitivity, budget_bytes: int, backend: str,
                  skip: tuple[str, ...] = ()) -> tuple[dict[str, TensorFormat], float]:
    """Module -> format of least predicted damage within the budget, and that damage (nats a token).

    skip: modules to leave as they are. Raises UserError where the budget cannot be met (see `check_target`).
    """
    allowed, choices = set(candidates(backend)), {}
    for module, row in sensitivity.damage.items():
        if module not in skip:
            shape = checkpoint.shape(f"{module}.weight")
            choices[module] = [Choice(form, size_bytes(shape, form), value) for form, value in row.items() if form in allowed]
    found = allocate(choices, budget_bytes - _unquantized(checkpoint, list(choices)))
    return {module: choice.format for module, choice in found.items()}, sum(choice.damage for choice in found.values())


def bundle_extras(checkpoint: Checkpoint) -> int:
    """Bytes that a bundle's weights file has beyond the checkpoint's tensors: RoPE's tables, and at most this alignment."""
    config = checkpoint.config
    turns = {(layer.rope, config.head_size(layer)): config.rope(layer) for layer in config.layers if layer.mixer == "attention"}
    tables = 4 * min(config.context_length, DEFAULT_CONTEXT) * sum(
        size + ("llama_4_scaling_beta" in (rope.scaling or {})) for (_, size), rope in turns.items() if rope is not None)
    # gate and up, or q, k and v, may be stored as one
    shapes = tensor_shapes(config)
    large = sum(2 * math.prod(shapes[f"{module}.weight"]) >= LARGE for module in checkpoint.modules())
    tensors = sum(16 + 6 * layer.experts for layer in config.layers) + 4
    return tables + VECTOR * tensors + PAGE * large
