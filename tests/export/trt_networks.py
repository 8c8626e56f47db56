"""Small ONNX networks for the TensorRT tests."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16),
          "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
WEIGHTS = ("dense", "int8", "int8/32", "int4/32", "int4/64", "fp8", "fp8 tensor")


def node(kind, inputs, outputs=("y",), domain="", **attributes):
    return helper.make_node(kind, list(inputs), list(outputs), name=kind.lower(), domain=domain, **attributes)


def value(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs, outputs, constants=(), opset=24, domains=()):
    """constants: name -> array."""
    constants = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in dict(constants).items()]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(helper.make_graph(list(nodes), "g", list(inputs), list(outputs), constants),
                             opset_imports=opsets, ir_version=11)


def product(dtype: str, weights: str) -> onnx.ModelProto:
    """y [4, 64] = x [4, 128] @ w, with activations of one type and weights of another."""
    element, kind = FLOATS[dtype]
    rng, (k, n) = np.random.default_rng(0), (128, 64)
    constants, nodes = {}, []
    if weights == "dense":
        constants["w"] = rng.standard_normal((k, n)).astype(kind)
    else:
        width, _, group = weights.replace(" tensor", "").partition("/")
        whole = weights.endswith(" tensor")
        codes = {"int8": lambda: rng.integers(-127, 128, (k, n)).astype(np.int8),
                 "int4": lambda: rng.integers(-8, 8, (k, n)).astype(ml_dtypes.int4),
                 "fp8": lambda: rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn)}[width]()
        shape = (k // int(group), n) if group else () if whole else (n,)
        options = dict(axis=0, block_size=int(group)) if group else {} if whole else dict(axis=1)
        constants |= {"codes": codes, "scales": np.full(shape, 0.01).astype(kind)}
        nodes.append(node("DequantizeLinear", ["codes", "scales"], ["w"], **options))
    nodes.append(node("MatMul", ["x", "w"]))
    return model(nodes, [value("x", element, [4, k])], [value("y", element, [4, n])], constants)


def convolution(dynamic=False) -> onnx.ModelProto:
    """Two convolutions, pooling and a classifier over [batch, 3, 16, 16]."""
    rng, batch = np.random.default_rng(0), "batch" if dynamic else 1
    constants = {"w1": rng.standard_normal((8, 3, 3, 3)), "w2": rng.standard_normal((16, 8, 3, 3)),
                 "w3": rng.standard_normal((16, 10))}
    nodes = [helper.make_node("Conv", ["image", "w1"], ["a"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Conv", ["b", "w2"], ["c"], strides=[2, 2]), helper.make_node("Relu", ["c"], ["d"]),
             helper.make_node("GlobalAveragePool", ["d"], ["e"]), helper.make_node("Flatten", ["e"], ["f"]),
             helper.make_node("MatMul", ["f", "w3"], ["scores"])]
    return model(nodes, [value("image", TensorProto.FLOAT, [batch, 3, 16, 16])],
                 [value("scores", TensorProto.FLOAT, [batch, 10])],
                 {n: a.astype(np.float32) for n, a in constants.items()}, opset=17)
