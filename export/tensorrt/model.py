"""Read an ONNX model of any maker into the form that the lint and TensorRT are given.

`load` reads the file without its external data, which must be there, names every unnamed node after its first output
(so that all that is said of a node names it), and frees the dimensions that exporters write as -1, 0 or "?": they are
dynamic. `fix_inputs` turns inputs into constants. `simplify` folds constants and takes the branches of `If` that they
decide (onnxscript's optimizer): TensorRT cannot analyse many branches that other runtimes decide while loading.
`skeleton` is the model without its large constants: checkers read it at any size.
"""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import UserError

LARGEST_FILE = 2**31 - 1         # of protobuf, in bytes
NAMELESS = {"", "?", "-1", "None"}
SMALL = 1024                     # elements of a constant that may say a shape, an axis or a limit


def load(path: Path) -> onnx.ModelProto:
    """The model at `path`, prepared. Raises UserError for a file that is none, or whose weights are not beside it."""
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path}: larger than 2 GB, which no ONNX file can be; save the model with its weights as external "
                        "data (onnx.save(..., save_as_external_data=True))")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:                  # the protobuf parser's errors have no common type
        raise UserError(f"{path}: not an ONNX model ({error or 'unreadable'})") from None
    if not model.graph.node:
        raise UserError(f"{path}: not an ONNX model (it has no nodes)")
    for tensor in filter(is_external, tensors(model.graph)):
        _refuse_absent(tensor, path)
    for graph in graphs(model.graph):
        for node in graph.node:
            node.name = node.name or next(filter(None, node.output), node.op_type)
    for info in (*model.graph.input, *model.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0 or dim.HasField("dim_param") and dim.dim_param in NAMELESS:
                dim.Clear()
    return model


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every body of an If, Loop or Scan inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs):
                yield from graphs(body)


def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of the graph and its bodies, those in attributes too."""
    for inner in graphs(graph):
        yield from inner.initializer
        yield from (a.t for node in inner.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def external_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files beside the model that hold its weights."""
    return sorted({entry.value for tensor in tensors(model.graph) for entry in tensor.external_data if entry.key == "location"})


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def inputs(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """The inputs that a caller gives: older models list their initializers among them."""
    constants = {t.name for t in model.graph.initializer}
    return {i.name: i for i in model.graph.input if i.name not in constants}


def shape_of(info: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    """Numbers and symbols ("?" for a nameless one) of an input or output; None where the rank is unknown."""
    if not info.type.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in info.type.tensor_type.shape.dim)


def fix_inputs(model: onnx.ModelProto, given: tuple[str, ...]) -> None:
    """Turn each input that "NAME=VALUE" names into a constant, in place; several numbers have commas between."""
    for text in given:
        name, _, value = text.rpartition("=")
        known = inputs(model)
        if name not in known:
            raise UserError(f"--fix {text}: " + (f"the model has no input {name!r}; it has {', '.join(known)}" if name else
                                                 "write it as name=value, for example sr=16000"))
        shape = shape_of(known[name]) or ()
        dtype = helper.tensor_dtype_to_np_dtype(known[name].type.tensor_type.elem_type)
        try:
            numbers = np.array([float(v) if dtype.kind == "f" else int(v) for v in value.split(",")]).astype(dtype)
            if all(isinstance(d, int) for d in shape):
                numbers = np.broadcast_to(numbers if shape else numbers.reshape(()), shape)
        except (ValueError, OverflowError, TypeError):
            raise UserError(f"--fix {text}: {name} takes {dtype} of shape [{', '.join(map(str, shape))}]; give one number "
                            "or all, with commas between") from None
        model.graph.input.remove(known[name])
        model.graph.initializer.append(numpy_helper.from_array(numbers.copy(), name))


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with constants folded and decided branches inlined; as it was, where its weights are external.

    Interface and function stay the same; `sample.py` holds the one against the other.
    """
    if any(map(is_external, tensors(model.graph))):
        return model
    import onnxscript.optimizer
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.CRITICAL)     # what they leave as it is
    try:
        return onnxscript.optimizer.optimize(copy.deepcopy(model))
    except Exception:                            # of a library that promises no type; TensorRT may still take the model
        return model


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large and external constants are inputs, and whose outputs have names alone: nothing is declared."""
    graph = onnx.GraphProto(name=model.graph.name or "graph", node=model.graph.node, input=model.graph.input)
    listed = {i.name for i in graph.input}
    for tensor in model.graph.initializer:
        if not is_external(tensor) and np.prod(tensor.dims, dtype=np.float64) <= SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.output.extend(onnx.ValueInfoProto(name=output.name) for output in model.graph.output)
    return onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph)


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The skeleton with the types and shapes that ONNX infers from the inputs, whatever the model declares."""
    bare = skeleton(model)
    try:
        return onnx.shape_inference.infer_shapes(bare)
    except (onnx.shape_inference.InferenceError, ValueError):   # operators without a schema
        return bare


def _refuse_absent(tensor: TensorProto, path: Path) -> None:
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = path.parent / place.get("location", "")
    need = int(place.get("offset", 0)) + int(place.get("length", 0))
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(f"{path}: the tensor {tensor.name} is kept in {place.get('location')}, outside the model's folder; "
                        "save the model with its weights beside it")
    if not file.is_file() or file.stat().st_size < need:
        raise UserError(f"{file}: the weights of {path.name} are missing or too short (the tensor {tensor.name} "
                        f"ends at byte {need}); put the file beside the model")
