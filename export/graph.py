"""A small ONNX graph builder whose weights stay in another file.

`GraphBuilder` collects nodes, inputs and outputs, and initializers of two kinds: small constants, kept inside the ONNX
file, and weights, which only point at an offset of a bundle's weights file. So building a graph costs no memory for
weights, and several graphs can read one file. It knows nothing of language models; the decoder's graphs are in
`portable.py`, `fast_graph.py` and `cuda_graph.py`.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 24
IR_VERSION = 11
MICROSOFT = "com.microsoft"       # the domain of ONNX Runtime's fused operators

ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int4": TensorProto.INT4, "uint4": TensorProto.UINT4,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}


class GraphBuilder:
    """Nodes, inputs, outputs and initializers of one graph, in the order they are added. weights: the manifest's."""

    opset = OPSET

    def __init__(self, weights: dict):
        self.stored, self._weights_file = {tensor["name"]: tensor for tensor in weights["tensors"]}, weights["file"]
        self._weights_bytes = weights["bytes"]
        self._nodes, self._inputs, self._outputs = [], [], []
        self._initializers: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: str, shape) -> str:
        """A graph input; a dimension is a number or a symbol."""
        self._inputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape) -> str:
        """Declare the value `name` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape))
        return name

    def weight(self, name: str) -> str:
        """The stored tensor `name` as an initializer that points into the weights file."""
        if name not in self._initializers:
            stored = self.stored[name]
            self._external(name, stored["dtype"], stored["shape"], stored["offset"], stored["bytes"])
        return name

    def handed_over(self, name: str, dtype: str, shape) -> str:
        """An initializer that whoever opens the graph has to give: it begins where the weights file ends."""
        if name not in self._initializers:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._external(name, dtype, shape, self._weights_bytes, size)
        return name

    def _external(self, name: str, dtype: str, shape, offset: int, size: int) -> None:
        tensor = TensorProto(name=name, data_type=ELEMENT_TYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self._weights_file, "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor

    def constant(self, values, dtype=np.int64) -> str:
        """A small constant kept in the ONNX file; equal constants are stored once."""
        array = np.asarray(values, dtype)
        values = array.ravel().tolist()
        shown = values if len(values) < 9 or len(set(values)) > 1 else values[:1]
        name = f"const.{array.dtype.name}." + ("x".join(map(str, array.shape)) or "scalar") + "." + "_".join(map(str, shown))
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, inputs, output, domain: str = "", **attributes):
        """Add a node. `output` is a name, or a list of names ("" for one left out); it is returned."""
        outputs = [output] if isinstance(output, str) else list(output)
        name = next(o for o in outputs if o) + "/" + kind
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **attributes))
        return output

    def serialize(self, name: str) -> bytes:
        """The contents of the ONNX file, a few hundred kB: no weights."""
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", self.opset)] + ([helper.make_opsetid(MICROSOFT, 1)] if MICROSOFT in domains else [])
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgewright")
        return model.SerializeToString(deterministic=True)
