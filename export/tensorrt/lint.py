"""What TensorRT refuses or silently misreads in an ONNX model, found before the parser sees it.

`lint(model, targets)` returns one `Finding` per fault: the node, what is wrong, and the mend. The faults are those seen
with TensorRT-RTX 1.7; the parser's own `supports_operator` answers True for several of them, and two are worse than a
refusal: opset-24 Attention's `nonpad_kv_seqlen` is ignored and its `is_causal` is read as an upper-left mask, so that
such a model builds and decodes wrongly. A model that ONNX itself calls invalid gets that finding alone. Types are those
of ONNX shape inference. It reads no external data: only constants kept inside the file can be judged by value (small
ones, as zero points and scales of one value are), and others are left to the checks after parsing (`build.py`).
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.tensorrt.model import graphs, inferred, skeleton
from runtime.capabilities import FIRST_SM

NEWEST_OPSET, OLDEST_OPSET = 24, 9
INT32 = np.iinfo(np.int32)
ONNX_NAMES = {"bf16": "BFLOAT16", "int4": "INT4", "fp8": "FLOAT8E4M3FN", "fp4": "FLOAT4E2M1"}     # of FIRST_SM's types
REFUSED_DTYPES = ("UINT4", "UINT16", "UINT32", "UINT64", "INT16", "STRING", "COMPLEX64", "COMPLEX128",
                  "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "FLOAT6E2M3FN", "FLOAT6E3M2FN", "UINT2",
                  "INT2")
DTYPE_MENDS = {"STRING": "turn text into numbers before the model", "DOUBLE": "export the model with float32 there"}
REFUSED_OPERATORS = {
    "DynamicQuantizeLinear": "quantize weights only, or export with static activation scales",
    "MatMulInteger": "store the weights as DequantizeLinear + MatMul",
    "ConvInteger": "store the weights as DequantizeLinear + Conv",
    "QLinearMatMul": "use QuantizeLinear and DequantizeLinear around MatMul",
    "QLinearConv": "use QuantizeLinear and DequantizeLinear around Conv",
}
MATRIX_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "LSTM", "GRU", "RNN")


class Finding(NamedTuple):
    """One fault. `node` is "name (Operator)" or the name of a tensor."""

    node: str
    problem: str
    mend: str

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}; {self.mend}"


def lint(model: onnx.ModelProto, targets: tuple[int, ...], supports=lambda operator: True) -> list[Finding]:
    """Faults of `model` for compute capabilities such as (75, 86); `supports(operator)` is the parser's own answer."""
    return list(invalid(model)) or list(_Linter(model, targets, supports).findings())


def invalid(model: onnx.ModelProto, shapes: bool = False) -> Iterator[Finding]:
    """What ONNX's own checker says: names that are not unique or not made, wrong numbers and types of inputs, unknown
    attributes. TensorRT ignores some of these, and others end its process. `shapes`: shapes that do not fit too, where
    ONNX errs at times."""
    copy = skeleton(model)
    for info, declared in zip(copy.graph.output, model.graph.output):
        info.type.CopyFrom(declared.type)
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()            # the checker demands a shape, and we know of models without
    for name, times in Counter(output.name for output in model.graph.output).items():
        if times > 1:
            yield Finding(name, f"not valid ONNX (an output listed {times} times)", "export it again")
    try:
        onnx.checker.check_model(copy)
        onnx.shape_inference.infer_shapes(skeleton(model), check_type=True, strict_mode=shapes)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        named = re.search(r"of node: name: (\S*) OpType: (\w+)|spec for node\. Name: (.*?) OpType: (\w+)|"
                          r"op_type:(\w+), node name: (.*?)\)", text)
        name, operator = (None, None) if not named else (named[1] or named[3] or named[6], named[2] or named[4] or named[5])
        text = re.sub(r" ==> Context.*|^(\[\w+\] |\(op_type:.*?\): |Node\(.*?\) |Inference error\(s\): )+", "", text).strip(" .")
        yield Finding(f"{name} ({operator})" if name else "the model", f"not valid ONNX ({text})",
                      "export it again, and try onnx.checker.check_model on the result")


class _Linter:
    def __init__(self, model, targets, supports):
        self.model, self.targets, self.supports = model, targets, supports
        self.types = types(model)
        self.nodes = [node for graph in graphs(model.graph) for node in graph.node]
        self.constants = {t.name: t for graph in graphs(model.graph) for t in graph.initializer}
        self.constants |= {node.output[0]: node.attribute[0].t for node in self.nodes if node.op_type == "Constant"
                           and node.attribute and node.attribute[0].type == onnx.AttributeProto.TENSOR}

    def findings(self) -> Iterator[Finding]:
        opset = max((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), default=None)
        if opset is not None and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
            yield Finding("the model", f"opset {opset} is not supported",
                          f"export it with an opset from {OLDEST_OPSET} to {NEWEST_OPSET}")
        functions = {(f.domain, f.name) for f in self.model.functions}
        for node in self.nodes:
            if (node.domain, node.op_type) not in functions:
                for problem, mend in self._node(node):
                    yield Finding(f"{node.name or node.output[0]} ({node.op_type})", problem, mend)
        yield from self._dtypes()

    # The checks of a node give (problem, mend).

    def _node(self, node) -> Iterator[tuple[str, str]]:
        if node.domain not in ("", "ai.onnx"):
            yield (f"operator of the domain {node.domain}",
                   "export with standard ONNX operators only, or run the model with ONNX Runtime")
        elif node.op_type in REFUSED_OPERATORS or not self.supports(node.op_type):
            mend = REFUSED_OPERATORS.get(node.op_type, "replace it by operators that TensorRT has")
            yield f"{node.op_type} is not supported", mend
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._quantized(node)
        elif node.op_type == "Attention":
            yield from self._attention(node)
        elif node.op_type == "TensorScatter":
            if _attribute(node, "mode", b"linear") != b"linear":
                yield "a circular cache is not supported", "use mode=linear"
            if self.types.get(node.input[0]) in ("INT8", "UINT8"):
                yield "an int8 cache is not supported", "keep the cache in fp16 or bf16"
        elif _attribute(node, "layout", 0):
            yield f"{node.op_type} with layout=1 is read by TensorRT as layout=0", "export it with layout=0"
        if node.op_type in MATRIX_PRODUCTS and 75 in self.targets and self.types.get(node.input[0]) == "FLOAT":
            yield "SM75 has no float32 matrix products in TensorRT-RTX", "export with --dtype fp16, or leave 75 out of --sm"
        if node.op_type != "Slice":             # whose ends may lie beyond: they are clamped, as ONNX says
            yield from self._integers(node)

    def _quantized(self, node):
        source = self.types.get(node.input[0])
        if node.op_type == "DequantizeLinear" and source in ("UINT8", "UINT4"):
            yield f"{source} weights are not supported", "quantize symmetric: signed codes, no zero point"
        zero = node.input[2] if len(node.input) > 2 else ""
        values, scale = self._value(zero), self._value(node.input[1])
        if zero and values is None:
            yield f"the zero point {zero} is not known to be zero", "quantize symmetric"
        elif zero and np.any(values.astype(np.int32)):
            yield "a non-zero zero point is not supported", "quantize symmetric"
        if scale is not None and not np.all(scale.astype(np.float32) > 0):
            yield f"the scale {node.input[1]} is not positive everywhere", "store 1 as the scale of a group whose codes are all zero"

    def _attention(self, node):
        present = [bool(name) for name in node.input] + [False] * 7
        if len([o for o in node.output if o]) > 1 or present[4] or present[5]:
            yield ("Attention with past or present keys and values is not supported",
                   "write the cache with TensorScatter and give the whole of it as K and V")
        if present[6]:
            yield ("the input nonpad_kv_seqlen is ignored by TensorRT, so padding would be attended to", "give an explicit attn_mask")
        if _attribute(node, "softcap", 0.0):
            yield "Attention with a softcap is not supported", "run the model with ONNX Runtime or the native core"
        if _attribute(node, "is_causal", 0):
            yield ("is_causal is read by TensorRT as an upper-left mask, which is wrong beside a cache", "give an explicit attn_mask")

    def _integers(self, node):
        for name in node.input:
            values = self._value(name) if self.types.get(name) == "INT64" else None
            if values is not None and values.size and (values.max() > INT32.max or values.min() < INT32.min):
                worst = max(values.ravel().tolist(), key=abs)
                yield f"the int64 constant {name} holds {worst}, beyond 32 bits", "clip it to the range of int32"

    def _dtypes(self) -> Iterator[Finding]:
        for info in (*self.model.graph.input, *self.model.graph.output):
            kind = info.type.WhichOneof("value")
            if kind != "tensor_type":
                yield Finding(info.name, f"a {(kind or 'value without').removesuffix('_type')} type is not supported",
                              "export the model with tensors for inputs and outputs")
            elif self.types.get(info.name) == "DOUBLE":
                yield Finding(info.name, "DOUBLE inputs and outputs are not supported", DTYPE_MENDS["DOUBLE"])
        for name, dtype in sorted(self.types.items()):
            if dtype in REFUSED_DTYPES:
                yield Finding(name, f"{dtype} tensors are not supported", DTYPE_MENDS.get(dtype, "export with another dtype"))
        seen = {dtype: name for name, dtype in sorted(self.types.items(), reverse=True)}
        for dtype, first in ((ONNX_NAMES[name], sm) for name, sm in FIRST_SM.items()):
            lacking = [str(t) for t in self.targets if t < first]
            if dtype in seen and lacking:
                yield Finding(seen[dtype], f"{dtype} needs compute capability {first} or later",
                              f"leave {','.join(lacking)} out of --sm, or export with another dtype")

    def _value(self, name: str) -> np.ndarray | None:
        """A constant that is kept inside the file."""
        tensor = self.constants.get(name)
        return None if tensor is None or tensor.data_location == TensorProto.EXTERNAL else numpy_helper.to_array(tensor)


def types(model: onnx.ModelProto) -> dict[str, str]:
    """Dtype name of every tensor that ONNX can tell: inputs, initializers, inferred values and declared outputs."""
    types = {}
    for graph in (*graphs(inferred(model).graph), *graphs(model.graph)):
        for tensor in graph.initializer:
            types[tensor.name] = TensorProto.DataType.Name(tensor.data_type)
        for info in (*graph.input, *graph.value_info, *graph.output):
            if info.type.HasField("tensor_type"):
                types[info.name] = TensorProto.DataType.Name(info.type.tensor_type.elem_type)
    return types


def _attribute(node, name, default):
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def dtypes_of(target: int) -> list[str]:
    """Names of the dtypes that can be computed with, or stored as weights, on a compute capability."""
    floats = [] if target == 75 else ["fp32"]
    return [*floats, "fp16", "int8", *(name for name, first in FIRST_SM.items() if target >= first)]
