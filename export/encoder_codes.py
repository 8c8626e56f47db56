"""A quantized encoder's codes in its ONNX graphs, value for value.

PyTorch's exporter knows no codes, so its graph first holds what they stand for; `put_codes` finds each such weight by its numbers
and has them made of the codes by DequantizeLinear (8 bits: an output's scale; 4 bits: a scale for each group of inputs), which
ONNX Runtime runs as MatMulNBits and TensorRT reads.

The fast graph is for ONNX Runtime's CPU: products of 8-bit codes with activations that are rounded to 8 bits row by row
(MatMulIntegerToFloat, int32 sums), and rows of the table of tokens looked up as codes, so that the table is never unfolded. Both
graphs read their weights from one file.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.network.quantized import QuantizedTensor
from runtime.errors import UserError

WEIGHTS, ALIGNED, LARGE = "weights.bin", 64, 1024
CONSTANTS = {"edgewright.127": np.float32(1 / 127), "edgewright.least": np.float32(1e-30), "edgewright.1": np.float32(1),
             "edgewright.128": np.uint8(128), "edgewright.last": np.array([-1], np.int64)}
_TYPES = {8: TensorProto.INT8, 4: TensorProto.INT4}


def put_codes(portable: Path, fast: Path, codes: dict[str, QuantizedTensor]) -> None:
    """Rewrite the graph `portable` with codes and write `fast` and the weights of both beside it.

    Raises UserError for a width that ONNX has no type for, or a module that the graph does not have.
    """
    if bad := next((name for name, one in codes.items() if one.bits not in _TYPES or one.kind != "int" or one.scale_bits != 16), None):
        raise UserError(f"{bad} has codes of {codes[bad].bits} bits: a graph of an encoder has 4 and 8 (--bits 4 or 8, with fp16 scales)")
    model = onnx.load(str(portable))
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    found, used = _found(model, weights, codes), set()
    added = {name: numpy_helper.from_array(np.array(value), name) for name, value in CONSTANTS.items()}
    nodes, quick, rows, unfolded = [], [], {}, {"portable": set(), "fast": set()}
    for node in model.graph.node:
        name = next((put for put in node.input if put in found), None)
        if name is None:
            nodes.append(node)
            quick.append(node)
            continue
        one, turned = found[name]
        if name not in used:
            used.add(name)
            added |= _tensors(name, one, turned)
        values = _dequantized(name, one, turned)
        nodes += [node] if name in unfolded["portable"] else [values, node]
        unfolded["portable"].add(name)
        plain = one.bits == 8 and one.scales.shape[1] == 1 and one.symmetric
        if plain and turned and node.op_type == "MatMul":
            quick += _integer_product(node, name, rows)
        elif plain and not turned and node.op_type == "Gather" and node.input[0] == name:
            quick += _looked_up(node, name)
        else:
            quick += [node] if name in unfolded["fast"] else [values, node]
            unfolded["fast"].add(name)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in used] + list(added.values())
    blob = _external(kept)
    (portable.parent / WEIGHTS).write_bytes(blob)
    for path, its in ((portable, nodes), (fast, quick)):
        graph = onnx.ModelProto()
        graph.CopyFrom(model)
        needed = {put for node in its for put in node.input}
        del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
        graph.graph.node.extend(its)
        graph.graph.initializer.extend(tensor for tensor in kept if tensor.name in needed)
        if path == fast:
            graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        path.write_bytes(graph.SerializeToString())


def _found(model, weights: dict, codes: dict[str, QuantizedTensor]) -> dict[str, tuple[QuantizedTensor, bool]]:
    """Initializer -> (codes, whether it holds them turned: [inputs, outputs]), by its numbers."""
    by_bytes = {}
    for name, one in codes.items():
        values = one.dequantize().numpy()
        by_bytes[values.shape, values.tobytes()] = one, False
        by_bytes.setdefault((values.T.shape, np.ascontiguousarray(values.T).tobytes()), (one, True))
    found = {}
    for name, tensor in weights.items():
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if hit := by_bytes.get((values.shape, values.tobytes())):
                found[name] = hit
    held = {id(one) for one, _ in found.values()}
    alike = {one.dequantize().numpy().tobytes() for one, _ in found.values()}
    if lost := [name for name, one in codes.items() if id(one) not in held and one.dequantize().numpy().tobytes() not in alike]:
        raise UserError(f"PyTorch's exporter has no weight of its own for {lost[0]}: quantize again with --skip '{lost[0]}'")
    return found


def _tensors(name: str, one: QuantizedTensor, turned: bool) -> dict[str, TensorProto]:
    """Codes, scales and zero points as DequantizeLinear takes them for a weight of this name, turned or not."""
    put = np.ascontiguousarray(one.signed().numpy().T if turned else one.signed().numpy())
    scales = one.scales.float().numpy()
    grouped = scales.shape[1] > 1 or one.group
    scales = np.ascontiguousarray(scales.T if turned else scales) if grouped else scales[:, 0].copy()
    tensors = [numpy_helper.from_array(scales, f"{name}.scales"), _packed(f"{name}.codes", put, one.bits)]
    if one.zeros is not None:
        zeros = (one.zeros.numpy().astype(np.int16) - 2 ** (one.bits - 1)).astype(np.int8)
        zeros = np.ascontiguousarray(zeros.T if turned else zeros) if grouped else zeros[:, 0].copy()
        tensors.append(_packed(f"{name}.zeros", zeros, one.bits))
    return {tensor.name: tensor for tensor in tensors}


def _packed(name: str, values: np.ndarray, bits: int) -> TensorProto:
    if bits == 8:
        return numpy_helper.from_array(values.astype(np.int8), name)
    flat = values.astype(np.uint8).ravel() & 15
    flat = np.append(flat, 0) if len(flat) % 2 else flat
    packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=values.shape, raw_data=packed.tobytes())


def _dequantized(name: str, one: QuantizedTensor, turned: bool):
    zeros = [f"{name}.zeros"] if one.zeros is not None else []
    if one.scales.shape[1] > 1 or one.group:
        how = {"axis": 0 if turned else 1, "block_size": one.codes.shape[1] // one.scales.shape[1]}
    else:
        how = {"axis": 1 if turned else 0}
    return helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scales", *zeros], [name], **how)


def _integer_product(node, name: str, rows: dict) -> list:
    """x W as an int8 product: x's rows are rounded to x / scale + 128, their largest at 127; once for all products of the same x."""
    x, y = node.input[0], node.output[0]
    made = []
    if x not in rows:
        rows[x] = f"{x}.codes", f"{x}.row_scales"
        made = [helper.make_node("Abs", [x], [f"{x}.abs"]),
                helper.make_node("ReduceMax", [f"{x}.abs", "edgewright.last"], [f"{x}.max"], keepdims=1),
                helper.make_node("Mul", [f"{x}.max", "edgewright.127"], [f"{x}.step"]),
                helper.make_node("Max", [f"{x}.step", "edgewright.least"], [f"{x}.row_scales"]),
                helper.make_node("Div", [x, f"{x}.row_scales"], [f"{x}.steps"]),
                helper.make_node("QuantizeLinear", [f"{x}.steps", "edgewright.1", "edgewright.128"], [f"{x}.codes"])]
    product = [f"{x}.codes", f"{name}.codes", "edgewright.1", f"{name}.scales", "edgewright.128"]
    return [*made, helper.make_node("MatMulIntegerToFloat", product, [f"{y}.columns"], domain="com.microsoft"),
            helper.make_node("Mul", [f"{y}.columns", f"{x}.row_scales"], [y])]


def _looked_up(node, name: str) -> list:
    """Rows of a table: their codes, times their scales."""
    y, ids = node.output[0], node.input[1]
    return [helper.make_node("Gather", [f"{name}.codes", ids], [f"{y}.codes"], axis=0),
            helper.make_node("Cast", [f"{y}.codes"], [f"{y}.float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scales", ids], [f"{y}.flat"], axis=0),
            helper.make_node("Unsqueeze", [f"{y}.flat", "edgewright.last"], [f"{y}.scale"]),
            helper.make_node("Mul", [f"{y}.float", f"{y}.scale"], [y])]


def _external(tensors: list[TensorProto]) -> bytes:
    """Move what is large out of the tensors into one file's bytes."""
    blob = bytearray()
    for tensor in tensors:
        data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        if len(data) < LARGE:
            continue
        blob += bytes(-len(blob) % ALIGNED)
        place = len(blob)
        blob += data
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS), ("offset", str(place)), ("length", str(len(data)))):
            kept.external_data.add(key=key, value=value)
        tensor.CopyFrom(kept)
    return bytes(blob)
