"""Run an ONNX model once on ONNX Runtime's CPU with made-up inputs, where ONNX Runtime is installed.

It answers what the file cannot: which shapes the model takes (`example`), the true shape of an output that is declared
wrongly, whether an input has any effect, and whether a simplified model is still the same function. Graph optimizations
are off. Floats are random; integers and booleans are 1, which is an id, a length and a mask that nearly any model takes.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from export.tensorrt.model import graphs, inputs, shape_of

SEARCH_S, MOST_TRIES = 15, 125
TOLERANCE = 1e-3                 # of the largest output: float32 sums in another order
# Sizes to try for a dynamic dimension: (smallest, usual, largest), first those that an image, rows or tokens likely have.
ROWS, PIXELS, LENGTH = (1, 1, 4), (64, 320, 640), (1, 64, 256)
OTHER_PIXELS, OTHER_LENGTHS = (64, 224, 48, 32, 512, 128, 16, 1), (16, 1, 32, 512, 8, 2, 128, 576)

Shapes = dict[str, tuple[int, ...]]


class Sample:
    """A model on ONNX Runtime; `run` gives None wherever it cannot run, for whatever reason. `refused`: ONNX Runtime is
    here and does not take the model."""

    def __init__(self, model: onnx.ModelProto, path: Path):
        self.inputs, self.outputs = inputs(model), [o.name for o in model.graph.output]
        self.session, self.refused = None, False
        if any(node.op_type == "Loop" for graph in graphs(model.graph) for node in graph.node):
            return                               # made-up values may never end it
        try:
            import onnxruntime
            self.refused = True
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 4
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
            self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            self.refused = False
        except Exception:                        # absent, or a model it refuses: its errors have no common type
            pass

    def run(self, shapes: Shapes, change: str | None = None) -> dict[str, np.ndarray] | None:
        """Outputs for inputs of these shapes (fixed inputs need none); `change` names an input given other values."""
        try:
            results = self.session.run(None, {name: self._value(name, shapes, name == change) for name in self.inputs})
        except Exception:                        # no session, shapes that do not fit, an operator without a kernel
            return None
        return dict(zip(self.outputs, results))

    def ignores(self, name: str, shapes: Shapes) -> bool:
        """Whether the outputs are the same with other values of that input."""
        return _same(self.run(shapes), self.run(shapes, change=name), 0)

    def agrees(self, other: Sample, shapes: Shapes) -> bool | None:
        """Whether two models give the same outputs; None where the first does not run."""
        mine = self.run(shapes)
        return None if mine is None else _same(mine, other.run(shapes), TOLERANCE)

    def _value(self, name, shapes, changed):
        info = self.inputs[name]
        shape = shapes.get(name, shape_of(info))
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if dtype.kind in "biu":
            return np.full(shape, 0 if changed and dtype.kind == "b" else 2 if changed else 1, dtype)
        return np.random.default_rng(len(name) + changed).standard_normal(shape).astype(dtype)


def _same(a, b, tolerance) -> bool:
    return a is not None and b is not None and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and np.allclose(
            a[k].astype(np.float64), b[k].astype(np.float64), rtol=tolerance,
            atol=tolerance * float(np.abs(a[k]).max(initial=0)), equal_nan=True) for k in a)


def example(model: onnx.ModelProto, path: Path) -> dict[str, tuple[tuple, tuple, tuple]]:
    """Shapes (smallest, usual, largest) of every input with a dynamic dimension, which ONNX Runtime has run.

    Where it is not installed, or finds none within SEARCH_S, they are a guess.
    """
    shapes = {name: shape_of(info) for name, info in inputs(model).items()}
    shapes = {name: shape for name, shape in shapes.items() if any(isinstance(d, str) for d in shape)}
    keys = {name: [d if isinstance(d, int) else (name, axis) if d == "?" else d for axis, d in enumerate(shape)]
            for name, shape in shapes.items()}
    kinds = {}                                   # a dimension's key -> the sizes to try
    for name, dims in keys.items():
        for axis, key in enumerate(dims):
            if not isinstance(key, int):
                kinds.setdefault(key, ROWS if axis == 0 else PIXELS if len(dims) == 4 and axis > 1 else LENGTH)
    sample, until = Sample(model, path), time.monotonic() + SEARCH_S

    def filled(sizes):
        return {name: tuple(d if isinstance(d, int) else sizes[d] for d in dims) for name, dims in keys.items()}

    def runs(sizes):
        outputs = sample.run(filled(sizes)) if time.monotonic() < until else None
        return outputs is not None and all(output.size for output in outputs.values())
    usual = next(filter(runs, _candidates(kinds)), None)
    if usual is None:
        low, usual, high = ({key: sizes[i] for key, sizes in kinds.items()} for i in range(3))
    else:
        low, high = dict(usual), dict(usual)
        for key, (least, _, most) in kinds.items():
            for sizes, size in ((low, min(least, usual[key])), (high, max(most, usual[key]))):
                if runs(sizes | {key: size}):
                    sizes[key] = size
    return {name: tuple(filled(sizes)[name] for sizes in (low, usual, high)) for name in keys}


def _candidates(kinds):
    """Ways to give every dimension a size: the usual ones, all alike, then combinations."""
    usual = {key: sizes[1] for key, sizes in kinds.items()}
    yield usual
    for pixels, length in zip(OTHER_PIXELS, OTHER_LENGTHS):
        yield {key: 1 if sizes is ROWS else pixels if sizes is PIXELS else length for key, sizes in kinds.items()}
    for combination in itertools.islice(itertools.product((1, 16, 64, 256, 512), repeat=len(kinds)), MOST_TRIES):
        yield dict(zip(kinds, combination))
