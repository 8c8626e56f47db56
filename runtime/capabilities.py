"""What each backend runs of what a checkpoint or a bundle may hold: one table, read wherever a format is chosen, written or opened.

    lack = next(lacks("onnx", plan), None)         # Lack("model.layers.0.mlp.up_proj", "3 bits", "bits"), or None

A plan is a checkpoint's `quantization_config` (models/network/quantized.py), or what `tensors.check_tensors` found in a bundle:
"tensors", name -> {"bits", "group", "symmetric" and, where they are not the usual, "kind" and
"scale_bits"}; "activations"; "kv_cache".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .errors import Unavailable


@dataclass(frozen=True)
class Capabilities:
    bits: tuple[int, ...]                             # of integer codes
    zeros: bool = True                                # zero points
    negative_scales: bool = True
    float8: bool = False                              # codes that are 8-bit floats
    levels: bool = False                              # tables of values that are not evenly spaced
    scale_bits: tuple[int, ...] = (16,)               # of scales
    group_multiple: int = 1                           # of the inputs that share a scale, where a row has several
    activations: tuple[str, ...] = ()                 # scales of linears' int8 inputs: "row", "tensor"
    kv_cache: bool = False                            # int8 keys and values with stored scales
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")       # of activations and of what is not quantized


BACKENDS = {
    "pytorch": Capabilities((2, 3, 4, 5, 6, 8), float8=True, levels=True, scale_bits=(8, 16), activations=("row", "tensor"), kv_cache=True),
    # rounds activations and caches by finer scales of its own
    "native": Capabilities((2, 3, 4, 5, 6, 8), levels=True, scale_bits=(8, 16), group_multiple=32, activations=("row",), kv_cache=True),
    # the CPU's operators; graphs of bf16 are for TensorRT
    "onnx": Capabilities((4, 8), float8=True, activations=("row", "tensor"), kv_cache=True, dtypes=("fp32", "fp16")),
    # export.trt builds 8-bit floats, stored scales and int8 caches too, but nobody has seen their numbers
    "tensorrt": Capabilities((4, 8), zeros=False, negative_scales=False, activations=("row",)),
}
TITLES = {"pytorch": "PyTorch", "native": "the native core", "onnx": "ONNX Runtime", "tensorrt": "TensorRT"}
FUSED_HEADS = {"rope": 16, "learned": 8}              # ONNX Runtime's fused attention: head_dim is a multiple, by positions
FIRST_SM = {"bf16": 80, "int4": 80, "fp8": 89, "fp4": 120}   # compute capability from which on TensorRT has a type


class Lack(NamedTuple):
    where: str                                        # a matrix, or what else holds it
    what: str                                         # in the plural
    field: str                                        # of Capabilities


def lacks(backend: str, plan: dict) -> Iterator[Lack]:
    """Everything in a plan that a backend does not run, but for groups: of how many inputs a row has, it says nothing."""
    able = BACKENDS[backend]
    for name, form in plan["tensors"].items():
        if form.get("kind", "int") == "e4m3":
            if not able.float8:
                yield Lack(name, "8-bit floats", "float8")
        elif form.get("kind") == "levels" and not able.levels:
            yield Lack(name, "tables of levels", "levels")
        elif form["bits"] not in able.bits:
            yield Lack(name, f"{form['bits']} bits", "bits")
        if form.get("scale_bits", 16) not in able.scale_bits:
            yield Lack(name, f"scales of {form['scale_bits']} bits", "scale_bits")
        if not form["symmetric"] and not able.zeros:
            yield Lack(name, "zero points", "zeros")
    per = plan["activations"].get("per")
    if per and per not in able.activations:
        what = "stored scales" if per == "tensor" else f"a scale for each {per}"
        yield Lack("the linears' inputs", f"int8 activations with {what}", "activations")
    if plan["kv_cache"] and not able.kv_cache:
        yield Lack("the KV cache", "int8 keys and values with stored scales", "kv_cache")


def check_runs(backend: str, plan: dict, where: object) -> None:
    """Raises Unavailable, which begins with `where`, for the first thing in a plan that the backend does not run."""
    for lack in lacks(backend, plan):
        instead = ", but by scales of its own: the replies would not be those the bundle was proven with" \
            if lack.field == "activations" else ""
        raise Unavailable(f"{where}: {lack.where}: {lack.what}, which {TITLES[backend]} does not run{instead}")
