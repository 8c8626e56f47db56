"""What several commands of compress choose from, without PyTorch: what each backend runs, where predictions are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TEACHER_CACHE = Path("~/.cache/edgewright/teacher")


@dataclass(frozen=True)
class Backend:
    """What a backend runs of what a checkpoint may hold (models/network/quantized.py)."""

    bits: tuple[int, ...]
    zeros: bool = True                                # zero points
    negative_scales: bool = True
    float8: bool = False
    activations: tuple[str, ...] = ()                 # scales of int8 inputs: "row", "tensor"
    kv_cache: bool = False                            # keys and values in int8


BACKENDS = {"pytorch": Backend((2, 3, 4, 5, 6, 8), float8=True, activations=("row", "tensor"), kv_cache=True),
            "native": Backend((2, 3, 4, 5, 6, 8), activations=("row",), kv_cache=True),   # with finer scales of its own
            "onnx": Backend((4, 8), float8=True, activations=("row", "tensor"), kv_cache=True),
            "tensorrt": Backend((4, 8), zeros=False, negative_scales=False, activations=("row",))}
