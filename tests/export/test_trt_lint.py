"""The lint against TensorRT-RTX itself: it finds what the parser or builder refuses, and nothing it builds."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto as T

tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")

from export.tensorrt.build import Settings, build, targets                                # noqa: E402
from export.tensorrt.lint import lint                                                     # noqa: E402
from runtime.errors import CheckFailed, UserError                                    # noqa: E402
from trt_networks import FLOATS, WEIGHTS, model, node, product, value                # noqa: E402

FP16 = T.FLOAT16


def tensor(name, dtype=FP16, shape=(1, 2, 4, 64)):
    return value(name, dtype, list(shape))


def refusal(network, target=89):
    """What TensorRT itself says to a network; None where it builds."""
    try:
        build(network, Path("model.onnx"), {}, Settings(targets=(target,)))
    except (UserError, CheckFailed) as error:
        return str(error)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_lint_refuses_a_target_exactly_where_the_builder_does(dtype, weights):
    network = product(dtype, weights)
    for target in targets(tensorrt):
        assert bool(lint(network, (target,))) == (refusal(network, target) is not None), target


def attention(inputs, outputs=("y",), **attributes):
    return [node("Attention", inputs, outputs, scale=0.125, **attributes)]


QKV = [tensor("q"), tensor("k"), tensor("v")]
DQ_SCALE = {"s": np.full(8, 0.1, np.float32)}
# name: (network, the lint's sentence, a part of TensorRT's own; None: it builds, and computes something else)
FAULTS = {
    "contrib operator": (
        model([node("FusedMatMul", ["q", "k"], domain="com.microsoft")], QKV[:2], [tensor("y")], domains=["com.microsoft"]),
        "fusedmatmul (FusedMatMul): operator of the domain com.microsoft; export with standard ONNX operators only, or run the model with ONNX Runtime",
        "TensorRT needs a plugin for it that is not here"),
    "zero point": (
        model([node("DequantizeLinear", ["c", "s", "z"], axis=0)], [value("c", T.INT8, [8, 8])], [value("y", T.FLOAT, [8, 8])],
              {**DQ_SCALE, "z": np.full(8, 3, np.int8)}),
        "dequantizelinear (DequantizeLinear): a non-zero zero point is not supported; quantize symmetric",
        "Non-zero zero point is not supported"),
    "uint8 weights": (
        model([node("DequantizeLinear", ["c", "s"], axis=0)], [value("c", T.UINT8, [8, 8])], [value("y", T.FLOAT, [8, 8])], DQ_SCALE),
        "dequantizelinear (DequantizeLinear): UINT8 weights are not supported; quantize symmetric: signed codes, no zero point",
        ""),
    "uint4 weights": (
        model([node("DequantizeLinear", ["c", "s"], axis=0)], [], [value("y", T.FLOAT, [8, 8])],
              {**DQ_SCALE, "c": np.ones((8, 8), ml_dtypes.uint4)}),
        "dequantizelinear (DequantizeLinear): UINT4 weights are not supported; quantize symmetric: signed codes, no zero point",
        ""),
    "scale of zero": (
        model([node("DequantizeLinear", ["c", "s"], axis=0)], [value("c", T.INT8, [8, 8])], [value("y", T.FLOAT, [8, 8])],
              {"s": np.zeros(8, np.float32)}),
        "dequantizelinear (DequantizeLinear): the scale s is not positive everywhere; store 1 as the scale of a group whose codes "
        "are all zero", "Scale coefficients must all be positive"),
    "dynamic quantization": (
        model([node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])], [value("x", T.FLOAT, [8])], [value("y", T.UINT8, [8])]),
        "dynamicquantizelinear (DynamicQuantizeLinear): DynamicQuantizeLinear is not supported; quantize weights only, or export "
        "with static activation scales", ""),
    "attention with a past": (
        model(attention(["q", "k", "v", "", "pk", "pv"], ["y", "pk2", "pv2"]), [*QKV, tensor("pk"), tensor("pv")],
              [tensor("y"), tensor("pk2", shape=(1, 2, 8, 64)), tensor("pv2", shape=(1, 2, 8, 64))]),
        "attention (Attention): Attention with past or present keys and values is not supported; write the cache with TensorScatter "
        "and give the whole of it as K and V", "TensorRT only supports Attention nodes with one output"),
    "nonpad_kv_seqlen": (
        model(attention(["q", "k", "v", "", "", "", "n"]), [*QKV, value("n", T.INT64, [1])], [tensor("y")]),
        "attention (Attention): the input nonpad_kv_seqlen is ignored by TensorRT, so padding would be attended to; give an explicit "
        "attn_mask", "nothing reads the input n"),
    "is_causal": (
        model(attention(["q", "k", "v"], is_causal=1), QKV, [tensor("y")]),
        "attention (Attention): is_causal is read by TensorRT as an upper-left mask, which is wrong beside a cache; give an explicit "
        "attn_mask", None),
    "softcap": (
        model(attention(["q", "k", "v"], softcap=5.0), QKV, [tensor("y")]),
        "attention (Attention): Attention with a softcap is not supported; run the model with ONNX Runtime or the native core",
        "Setting softcap is not supported"),
    "int8 cache": (
        model([node("TensorScatter", ["p", "u", "i"], axis=2)],
              [tensor("p", T.INT8), tensor("u", T.INT8, (1, 2, 1, 64)), value("i", T.INT64, [1])], [tensor("y", T.INT8)]),
        "tensorscatter (TensorScatter): an int8 cache is not supported; keep the cache in fp16 or bf16", ""),
    "int64 out of range": (
        model([node("Add", ["x", "c"])], [value("x", T.INT64, [4])], [value("y", T.INT64, [4])], {"c": np.array([2**40])}),
        "add (Add): the int64 constant c holds 1099511627776, beyond 32 bits; clip it to the range of int32", None),
    "opset too new": (
        model([node("Relu", ["q"])], QKV[:1], [tensor("y")], opset=25),
        "the model: opset 25 is not supported; export it with an opset from 9 to 24", None),
    "operator unknown to the parser": (
        model([node("StringNormalizer", ["x"])], [value("x", T.STRING, [4])], [value("y", T.STRING, [4])]),
        "stringnormalizer (StringNormalizer): StringNormalizer is not supported; replace it by operators that TensorRT has", ""),
}


def supports(operator):
    log = tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR)
    builder = tensorrt.Builder(log)
    return tensorrt.OnnxParser(builder.create_network(0), log).supports_operator(operator)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_with_the_mend_and_are_faults_to_tensorrt(name):
    network, sentence, own_words = FAULTS[name]
    assert sentence in [str(finding) for finding in lint(network, (89,), supports)]
    said = refusal(network)
    assert (said is None) if own_words is None else own_words in said


def test_a_fault_inside_the_body_of_an_if_is_found():
    from onnx import helper
    body = helper.make_graph([node("MatMulInteger", ["a", "a"])], "then", [], [value("y", T.INT32, [4, 4])])
    network = model([helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)],
                    [value("c", T.BOOL, []), value("a", T.INT8, [4, 4])], [value("z", T.INT32, [4, 4])])
    assert [f.node for f in lint(network, (89,))] == ["matmulinteger (MatMulInteger)"] * 2


def test_a_slice_to_the_end_is_no_fault():
    network = model([node("Slice", ["x", "s", "e", "a"])], [value("x", T.FLOAT, [4])], [value("y", T.FLOAT, [3])],
                    {"s": np.array([1]), "e": np.array([2**63 - 1]), "a": np.array([0])})
    assert lint(network, (89,)) == [] and refusal(network) is None


@pytest.mark.parametrize("target, dtype, first", [(75, "bf16", 80), (86, "fp8", 89)])
def test_a_dtype_the_target_lacks_names_target_and_tensor(target, dtype, first):
    network = product("fp16", dtype) if dtype == "fp8" else product(dtype, "dense")
    text = str(lint(network, (target, 120))[0])
    assert f"needs compute capability {first} or later; leave {target} out of --sm" in text
