"""Optimization profiles: for which shapes of its inputs an engine is built.

A decoder's graph gets two, both with the cache at one fixed capacity: "decode" (one new token a row) and "prefill" (up
to a chunk of new tokens). TensorRT chooses kernels for the optimal shape: one row, and a prompt of 128 tokens. An engine
holds the kernels of every profile, so where its size counts more than its speed the second alone serves single tokens
too. An encoder's bundle gets one, for up to `--rows` texts of all the tokens it takes, best for one text of 64. Any other
model gets one, from `--shapes name:min,opt,max`, or none where its inputs are fixed.
"""

from pathlib import Path

import onnx

from export.tensorrt.build import Profiles
from export.tensorrt.model import inputs, shape_of
from export.tensorrt.sample import example
from runtime.errors import UserError
from runtime.layout import CHUNK

DECODER_INPUTS = ("input_ids", "position_ids", "write_index", "logits_positions")
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BEST_CHUNK, BEST_TEXT, LOGITS = 128, 64, 32         # prompt's and text's length to optimize for; most logits of a row in one call


def is_decoder(model: onnx.ModelProto) -> bool:
    """Whether the graph has the interface of a bundle's decoder."""
    return set(DECODER_INPUTS) <= {i.name for i in model.graph.input}


def fix_dimension(model: onnx.ModelProto, symbol: str, size: int) -> None:
    """Give every input, output and value's dimension of that symbol a number, in place."""
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_value = size


def decoder_profiles(model: onnx.ModelProto, rows: int, chunk: int, one: bool = False) -> Profiles:
    """Profiles of a decoder whose capacity is fixed: up to `rows` sequences, `chunk` new tokens each.

    A model with recurrent layers takes CHUNK tokens at most. `one` leaves out the profile of decode steps; the prefill profile
    reaches down to one token and runs them too.
    """
    if "counts" in inputs(model):
        chunk = min(chunk, CHUNK)

    def shapes(b, s, k):
        sizes = {"b": b, "s": s, "k": k}
        return {i.name: tuple(sizes.get(d, d) for d in shape_of(i)) for i in model.graph.input}

    def profile(best_s, high_s, high_k):
        low, best, high = shapes(1, 1, 1), shapes(1, best_s, 1), shapes(rows, high_s, high_k)
        return {key: (low[key], best[key], high[key]) for key in low}
    prefill = {"prefill": profile(min(BEST_CHUNK, chunk), chunk, min(LOGITS, chunk))}
    return prefill if one else {"decode": profile(1, 1, 1)} | prefill


def encoder_profile(model: onnx.ModelProto, rows: int, tokens: int, path: Path) -> Profiles:
    """The profile of an encoder's graph: up to `rows` texts of `tokens` tokens. Raises UserError for a graph of other inputs."""
    for name, info in inputs(model).items():
        if name not in ENCODER_INPUTS or len(shape_of(info) or ()) != 2:
            raise UserError(f"{path}: the input {name} is none of an encoder's ({', '.join(ENCODER_INPUTS)}, [batch, sequence]); export the "
                            "model again")
    return {"shapes": {name: ((1, 1), (1, min(BEST_TEXT, tokens)), (rows, tokens)) for name in inputs(model)}}


def given_profiles(model: onnx.ModelProto, given: tuple[str, ...], path: Path) -> Profiles:
    """The profile that `--shapes` describes. Raises UserError for a shape that does not fit the model, and for a
    dynamic input without one, with an example line to type. path: the model's file."""
    known = inputs(model)
    chosen = dict(_parse(text, known) for text in given)
    dynamic = {}
    for name, info in known.items():
        shape = shape_of(info)
        if shape is None:
            raise UserError(f"the input {name} has no known rank, and TensorRT needs one; export the model with shapes")
        if not all(isinstance(d, int) for d in shape) and name not in chosen:
            dynamic[name] = shape
    if dynamic:
        listed = ", ".join(f"{n} [{', '.join(map(str, s))}]" for n, s in dynamic.items())
        shapes = " ".join(f"{name}:{','.join(map(_typed, sizes if len(set(sizes)) > 1 else sizes[:1]))}"
                          for name, sizes in example(model, path).items())
        raise UserError(f"the model has dynamic inputs without shapes: {listed}; add for example --shapes {shapes}")
    return {"shapes": chosen} if chosen else {}


def _parse(text: str, inputs: dict) -> tuple[str, tuple]:
    name, _, sizes = text.rpartition(":")
    if name not in inputs:
        raise UserError(f"--shapes {text}: " + (f"the model has no input {name!r}; it has {', '.join(inputs)}" if name
                        else "write it as name:min,opt,max, for example input_ids:1x1,1x128,4x512"))
    try:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in sizes.split(",")]
    except ValueError:
        raise UserError(f"--shapes {text}: shapes are numbers with x between them, as in 1x128") from None
    if len(shapes) not in (1, 3):
        raise UserError(f"--shapes {text}: give one shape, or three: min,opt,max")
    low, best, high = shapes * 3 if len(shapes) == 1 else shapes
    expected = shape_of(inputs[name])
    for shape in (low, best, high):
        if expected is None or len(shape) != len(expected):
            raise UserError(f"--shapes {text}: {_typed(shape)} has {len(shape)} dimensions, but {name} is "
                            f"[{', '.join(map(str, expected or ()))}]")
        if any(size < 1 or isinstance(dimension, int) and size != dimension for size, dimension in zip(shape, expected)):
            raise UserError(f"--shapes {text}: {_typed(shape)} does not fit {name}, which is [{', '.join(map(str, expected))}]")
    if not all(a <= b <= c for a, b, c in zip(low, best, high)):
        raise UserError(f"--shapes {text}: every size must rise: min <= opt <= max")
    return name, (low, best, high)


def _typed(shape) -> str:
    return "x".join(map(str, shape))
