"""`export.trt` on models of other makers: each kind of fault is refused by name with a mend, and what can be built is.

`trt_tour.py` beside this file does the same with any folder of models.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed ([rtx])")

from export import trt
from export.tensorrt.sample import Sample, example                                        # noqa: E402
from export.tensorrt.words import sentence                                                # noqa: E402
from trt_networks import convolution, model, node, value                             # noqa: E402
from trt_tour import RAW                                                             # noqa: E402

ROOT = Path(__file__).parents[2]
X, Y = value("x", T.FLOAT, [2, 4]), value("y", T.FLOAT, [2, 4])
SEQUENCE = helper.make_tensor_sequence_value_info("x", T.FLOAT, [2])
OPTIONAL = helper.make_value_info("x", helper.make_optional_type_proto(helper.make_tensor_type_proto(T.FLOAT, [2])))
ONES = np.ones(4, np.float32)


def body(*nodes, output, shape=None):
    return helper.make_graph(list(nodes), "body", [], [value(output, T.FLOAT, shape)])


def branching(then, condition_input="rate") -> onnx.ModelProto:
    """y [2, 4] by one branch where the input is 16000 and by Neg where not."""
    nodes = [node("Equal", [condition_input, "k"], ["c"]),
             helper.make_node("If", ["c"], ["z"], name="choice", then_branch=then,
                              else_branch=body(node("Neg", ["x"], ["e"]), output="e")), node("Relu", ["z"])]
    rng = np.random.default_rng(0)
    return model(nodes, [X, value("rate", T.INT64, [])], [value("y", T.FLOAT, None)],
                 {"k": np.array(16000), "axes": np.array([0]), "w": rng.standard_normal((1, 16, 4)).astype(np.float32),
                  "r": rng.standard_normal((1, 16, 4)).astype(np.float32)}, opset=16)


def recurrent_branch():
    """A branch that TensorRT cannot analyse beside another."""
    return body(node("Unsqueeze", ["x", "axes"], ["u"]), node("LSTM", ["u", "w", "r"], ["s", "h"], hidden_size=4),
                node("Squeeze", ["h", "axes"], ["t"]), output="t")


def endless_loop() -> onnx.ModelProto:
    step = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Relu", ["v"], ["v2"]), helper.make_node("Identity", ["v2"], ["scan"])], "step",
        [value("i", T.INT64, []), value("go", T.BOOL, []), value("v", T.FLOAT, [2, 4])],
        [value("on", T.BOOL, []), value("v2", T.FLOAT, [2, 4]), value("scan", T.FLOAT, [2, 4])])
    return model([helper.make_node("Loop", ["", "start", "x"], ["z", "y"], name="while", body=step)],
                 [X, value("start", T.BOOL, [])], [value("y", T.FLOAT, None)], opset=16)


def twice(proto: onnx.ModelProto, change) -> onnx.ModelProto:
    change(proto.graph)
    return proto


# name: (model, what must be said)
REFUSED = {
    "double": (model([node("Relu", ["x"])], [value("x", T.DOUBLE, [4])], [value("y", T.DOUBLE, [4])]),
               "x: DOUBLE inputs and outputs are not supported; export the model with float32 there"),
    "string": (model([node("Identity", ["x"])], [value("x", T.STRING, [4])], [value("y", T.STRING, [4])]),
               "x: STRING tensors are not supported; turn text into numbers before the model"),
    "uint16": (model([node("Cast", ["x"], to=T.FLOAT)], [value("x", T.UINT16, [4])], [value("y", T.FLOAT, [4])]),
               "x: UINT16 tensors are not supported; export with another dtype"),
    "complex": (model([node("Identity", ["x"])], [value("x", T.COMPLEX64, [4])], [value("y", T.COMPLEX64, [4])]),
                "x: COMPLEX64 tensors are not supported"),
    "sequence": (model([node("ConcatFromSequence", ["x"], axis=0)], [SEQUENCE], [value("y", T.FLOAT, [None])]),
                 "x: a sequence type is not supported; export the model with tensors for inputs and outputs"),
    "optional": (model([node("OptionalGetElement", ["x"])], [OPTIONAL], [value("y", T.FLOAT, [2])]),
                 "x: a optional type is not supported"),
    "own domain": (model([node("Fast", ["x"], domain="acme")], [X], [Y], domains=["acme"]),
                   "fast (Fast): operator of the domain acme; export with standard ONNX operators only"),
    "trees": (model([node("Normalizer", ["x"], domain="ai.onnx.ml", norm="MAX")], [X], [Y], domains=["ai.onnx.ml"]),
              "normalizer (Normalizer): operator of the domain ai.onnx.ml"),
    "QOperator": (model([node("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"])], [value("x", T.UINT8, [1, 1, 4, 4])],
                        [value("y", T.UINT8, [1, 1, 4, 4])],
                        {"s": np.float32(1), "z": np.uint8(0), "w": np.ones((1, 1, 1, 1), np.uint8)}),
                  "qlinearconv (QLinearConv): QLinearConv is not supported; use QuantizeLinear and DequantizeLinear around Conv"),
    "old opset": (model([node("Relu", ["x"])], [X], [Y], opset=6), "the model: opset 6 is not supported; export it with"),
    "name made twice": (model([node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["a"]), node("Abs", ["a"])], [X], [Y]),
                        "the model: not valid ONNX (Graph must be in single static assignment (SSA) form, however 'a'"),
    "constant twice": (twice(model([node("Add", ["x", "c"])], [X], [Y], {"c": ONES}), lambda g: g.initializer.append(g.initializer[0])),
                       "the model: not valid ONNX (c initializer name is not unique)"),
    "output twice": (model([node("Relu", ["x"])], [X], [Y, Y]), "y: not valid ONNX (an output listed 2 times)"),
    "undefined": (model([node("Add", ["x", "gone"])], [X], [Y]), "add (Add): not valid ONNX (Nodes in a graph must be topologically "
                  "sorted, however input 'gone'"),
    "attribute": (model([node("Relu", ["x"], slope=2)], [X], [Y]), "relu (Relu): not valid ONNX (Unrecognized attribute: slope"),
    "types": (model([node("Slice", ["x", "x", "x"])], [X], [Y]), "slice (Slice): not valid ONNX (starts typestr"),
    "too few inputs": (model([node("QuantizeLinear", ["x"])], [X], [value("y", T.UINT8, [2, 4])]), "quantizelinear (QuantizeLinear): not "
                       "valid ONNX (with schema(::QuantizeLinear:24) has input size 1"),
    "layout": (model([node("GRU", ["x", "w", "r"], ["", "y"], hidden_size=2, layout=1)], [value("x", T.FLOAT, [1, 3, 2])],
                     [value("y", T.FLOAT, [1, 1, 2])], {n: np.ones((1, 6, 2), np.float32) for n in "wr"}),
               "gru (GRU): GRU with layout=1 is read by TensorRT as layout=0; export it with layout=0"),
    "suppression": (model([node("NonMaxSuppression", ["b", "s", "n"])], [value("b", T.FLOAT, [1, 6, 4]), value("s", T.FLOAT, [1, 1, 6])],
                          [value("y", T.INT64, [None, 3])], {"n": np.array([3])}),
                    "nonmaxsuppression (NonMaxSuppression): TensorRT has no kernel for it on these targets; leave its step"),
    "uint8 arithmetic": (model([node("Transpose", ["x"])], [value("x", T.UINT8, [2, 4])], [value("y", T.UINT8, [4, 2])]),
                         "transpose (Transpose): transpose: first input has type UInt8 but must have type Float"),
    "axes": (model([node("ReduceSum", ["x", "a"], keepdims=0)], [X, value("a", T.INT64, [1])], [value("y", T.FLOAT, [None])]),
             "reducesum (ReduceSum): Axis input must resolve to a build-time constant (an initializer or a constant-foldable subgraph); "
             "fix the input that decides it: --fix a=VALUE"),
    "sizes": (model([node("Tile", ["x", "n"])], [X, value("n", T.INT64, [2])], [value("y", T.FLOAT, [None, None])]),
              "n: the values of this input decide shapes, and an engine is built for given ones; fix it with --fix n=VALUE"),
    "branches": (branching(recurrent_branch()), "choice (If): TensorRT cannot analyse its branches; fix the input that decides it: "
                 "--fix rate=VALUE"),
    "ranks": (branching(body(node("Unsqueeze", ["x", "axes"], ["t"]), output="t")), "choice (If): IConditionalOutputLayer "
              "choice_OutputLayer: Must have inputs with equal ranks when condition is not a build-time constant. Dimensions are "
              "[1,2,4] and [2,4]; fix the input that decides it: --fix rate=VALUE"),
    "loop": (endless_loop(), "while (Loop): TensorRT cannot infer the shape of scan output scan since no trip limit was set"),
    "no rank": (model([node("Relu", ["x"])], [value("x", T.FLOAT, None)], [value("y", T.FLOAT, None)]),
                "the input x has no known rank, and TensorRT needs one; export the model with shapes"),
}


@pytest.fixture
def run(tmp_path, capfd):
    """run(model, *options) -> (exit code, all that the process printed, TensorRT's own C++ included)."""
    def call(proto, *options):
        path = tmp_path / "m.onnx"
        if isinstance(proto, onnx.ModelProto):
            onnx.save(proto, str(path))
        else:
            path = proto
        capfd.readouterr()
        code = trt.main([str(path), "--sm", "86", "-o", str(tmp_path / "m.engine"), *options])
        return code, "".join(capfd.readouterr())
    call.record = lambda: json.loads((tmp_path / "m.engine.json").read_text())
    return call


@pytest.mark.parametrize("name", REFUSED)
def test_what_tensorrt_does_not_take_is_refused_by_name_with_a_mend(run, tmp_path, name):
    proto, words = REFUSED[name]
    code, said = run(proto)
    assert code == 2 and words in said and not RAW.search(said), said
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_words_of_parser_and_builder_become_a_sentence():
    """Messages seen with other models, whole."""
    proto = model([node("Relu", ["x"])], [X], [Y])
    for message, words in (
            ("Assertion failed: convertDtype(t, &d) && \"Failed to convert ONNX date type to TensorRT data type.\"",
             "the model: Failed to convert ONNX date type to TensorRT data type; cast to float32"),
            ("(t == \"a\" || t == \"b\") && \"TensorRT only supports a and \" \"b transformation modes!\"",
             "the model: TensorRT only supports a and b transformation modes; replace the node"),
            ("Assertion failed: mode == \"none\": ScatterND with reduction is not supported.", "the model: ScatterND with reduction is not"),
            ("[graphShapeAnalyzer.cpp::check::2155] Error Code 2: Internal Error (Assertion !isInFlight(p.second) failed.  In check at "
             "/_src/optimizer/shapeof/graphShapeAnalyzer.cpp:2155)", "the model: TensorRT fails on it inside; replace the node"),
            ("IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm89. In "
             "compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)", "the model: Cannot compile for target(s) sm89; "),
            ("[tacticSupply.cpp::get::48] Error Code 2: Internal Error (Assertion !impls.empty() failed. relu_2 has no runners that "
             "implement it In get at /_src/optimizer/builder/tacticSupply.cpp:48)", "relu (Relu): TensorRT has no kernel for it")):
        assert sentence(message, proto).startswith(words) and not RAW.search(sentence(message, proto)), sentence(message, proto)


@pytest.mark.parametrize("size", [-1, 0, "?", "-1", None, "batch"])
def test_a_dimension_is_dynamic_however_it_is_written_and_the_example_is_usable(run, size):
    proto = convolution(dynamic=True)
    for info in (*proto.graph.input, *proto.graph.output):
        dim = info.type.tensor_type.shape.dim[0]
        dim.Clear()
        if isinstance(size, int):
            dim.dim_value = size
        elif size:
            dim.dim_param = size
    code, said = run(proto)
    assert code == 2 and f"image [{'batch' if size == 'batch' else '?'}, 3, 16, 16]; add for example --shapes " in said
    assert run(proto, *re.search(r"--shapes .*", said)[0].split())[0] == 0
    assert run.record()["profiles"][0]["shapes"] == {"image": [[1, 3, 16, 16], [1, 3, 16, 16], [4, 3, 16, 16]]}
    assert run.record()["inputs"][0]["shape"][0] == ("batch" if size == "batch" else "?")


def test_two_nameless_dimensions_are_not_held_equal(run):
    """"?" for height and width is no symbol that both share: TensorRT would ask for squares."""
    proto = model([node("Relu", ["x"])], [value("x", T.FLOAT, ["?", "?"])], [value("y", T.FLOAT, ["?", "?"])])
    assert run(proto, "--shapes", "x:1x8,2x64,4x99")[0] == 0


def test_the_example_fits_dimensions_that_depend_on_each_other():
    coupled = model([node("MatMul", ["a", "b"])], [value("a", T.FLOAT, [None, None]), value("b", T.FLOAT, [None, 4])],
                    [value("y", T.FLOAT, [None, 4])])
    for low, best, high in [[tuple(sizes[i] for sizes in example(coupled, Path("m.onnx")).values()) for i in range(3)]]:
        assert low[0][1] == low[1][0] and best[0][1] == best[1][0] and high[0][1] == high[1][0]
        assert all(x <= y <= z for l, b, h in zip(low, best, high) for x, y, z in zip(l, b, h)) and high != low


@pytest.mark.parametrize("declared, note", [
    (value("scores", T.FLOAT, [1, "length"]), None), (value("scores", T.FLOAT, [10]), "it is (1, 10), not (10,)"),
    (value("scores", T.FLOAT, [1, 7]), "it is (1, 10), not (1, 7)"), (value("scores", T.INT64, [1, 10]), "it is FLOAT, not INT64")])
def test_a_wrong_declaration_is_a_note_and_the_record_has_the_truth(run, declared, note):
    proto = convolution()
    proto.graph.output[0].CopyFrom(declared)
    code, said = run(proto)
    assert code == 0 and (f"m.onnx declares its output scores wrongly: {note}" in said if note else "note:" not in said)
    assert run.record()["outputs"] == [{"name": "scores", "dtype": "float", "shape": [1, 10] if note else [1, "length"]}]


def test_a_network_that_tensorrt_reads_otherwise_is_not_excused(run):
    """Ceil mode whose last window starts in the padding: ONNX drops it, TensorRT does not."""
    proto = model([node("AveragePool", ["x"], kernel_shape=[3, 3], strides=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1,
                       count_include_pad=1)],
                  [value("x", T.FLOAT, [1, 3, 2, 2])], [value("y", T.FLOAT, [1, 3, 1, 1])], opset=22)
    code, said = run(proto)
    assert code == 1 and "the output y from averagepool (AveragePool) is (1, 3, 2, 2), not (1, 3, 1, 1)" in said


def test_an_input_without_effect_is_no_fault(run):
    proto = model([node("Relu", ["x"])], [X, value("unused", T.INT64, [])], [Y])
    assert run(proto)[0] == 0 and [i["name"] for i in run.record()["inputs"]] == ["x", "unused"]


def test_a_fixed_input_decides_the_branch_and_is_no_input_any_more(run, tmp_path):
    for rate, operator in ((16000, "LSTM"), (8000, "Neg")):
        code, said = run(branching(recurrent_branch()), "--fix", f"rate={rate}")
        assert code == 0, said
        record = run.record()
        assert record["fixed"] == [f"rate={rate}"] and [i["name"] for i in record["inputs"]] == ["x"]
        assert ("UNARY" in record["layers"]) == (operator == "Neg")
    for given, words in (("speed=1", "the model has no input 'speed'; it has x, rate"), ("16000", "write it as name=value"),
                         ("rate=fast", "rate takes int64 of shape []; give one number"), ("rate=1,2", "rate takes int64 of shape []"),
                         ("rate=1e9", "rate takes int64 of shape []")):
        code, said = run(branching(recurrent_branch()), "--fix", given)
        assert code == 2 and words in said
    assert run(REFUSED["axes"][0], "--fix", "a=1")[0] == 0 and run(REFUSED["sizes"][0], "--fix", "n=2,3")[0] == 0


def test_a_simplification_that_changes_the_function_is_not_built(run, monkeypatch):
    right = model([node("Relu", ["x"])], [X, value("n", T.INT64, [])], [Y])
    wrong = model([node("Neg", ["x"])], [X], [Y])
    monkeypatch.setattr(trt, "simplify", lambda proto: wrong)
    assert run(right, "--fix", "n=1")[0] == 0 and "ACTIVATION" in run.record()["layers"]
    path = Path("m.onnx")
    assert Sample(right, path).agrees(Sample(right, path), {}) and not Sample(right, path).agrees(Sample(wrong, path), {})


def test_a_model_that_crashes_tensorrt_ends_in_a_sentence(tmp_path):
    gru = model([node("GRU", ["x", "w", "r"], ["", "y"], hidden_size=5, direction="nonsense")], [value("x", T.FLOAT, [3, 1, 2])],
                [value("y", T.FLOAT, [1, 1, 5])], {"w": np.ones((1, 15, 2), np.float32), "r": np.ones((1, 15, 5), np.float32)}, opset=14)
    onnx.save(gru, str(tmp_path / "m.onnx"))
    done = subprocess.run([sys.executable, "-m", "export.trt", str(tmp_path / "m.onnx")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "error: export.trt was ended by SIGSEGV: the model crashed TensorRT or ONNX Runtime" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_child_and_its_exit_code_comes_back(number, code):
    script = ("import sys, time; from export.tensorrt.child import in_a_child\n"
              "def work():\n try: print('ready', flush=True); time.sleep(60)\n except KeyboardInterrupt: return 130\n"
              "sys.exit(in_a_child(work, 'work'))")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=20) == code


def test_weights_of_a_branch_missing_outside_or_too_large(run, tmp_path):
    inner = numpy_helper.from_array(np.ones((64, 64), np.float32), "inner")
    then = helper.make_graph([node("Identity", ["inner"], ["t"])], "body", [], [value("t", T.FLOAT, None)], [inner])
    for location, words in (("gone.bin", "gone.bin: the weights of m.onnx are missing or too short (the tensor inner ends at byte 16384)"),
                            ("../other.bin", "the tensor inner is kept in ../other.bin, outside the model's folder")):
        stored = then.initializer[0]
        stored.CopyFrom(inner)
        onnx.external_data_helper.set_external_data(stored, location, offset=0, length=16384)
        stored.ClearField("raw_data")
        code, said = run(branching(then))
        assert code == 2 and words in said
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(2**31)
    code, said = run(tmp_path / "large.onnx")
    assert code == 2 and "larger than 2 GB, which no ONNX file can be; save the model with its weights as external data" in said


def test_folders_that_are_no_bundle(run, tmp_path):
    folder = tmp_path / "encoder"
    (folder / "onnx").mkdir(parents=True)
    assert "no manifest.json and no .onnx file in it; give a bundle, an exported encoder's folder" in run(folder)[1]
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert f"a checkpoint, which has no graph yet; export it first with `python -m export.onnx {folder} -o FOLDER`" in run(folder)[1]
    for name in ("onnx/model.onnx", "model_int8.onnx"):
        onnx.save(convolution(), str(folder / name))
        assert run(folder)[0] == 0                       # the only one, then the one named model.onnx
    (folder / "onnx/model.onnx").rename(folder / "onnx/other.onnx")
    assert "2 ONNX models in it and no manifest.json; give one of them" in run(folder)[1]


def test_the_tour_tells_built_refused_and_wrong(tmp_path, monkeypatch):
    import trt_tour
    for name, proto in (("a", convolution(dynamic=True)), ("b", REFUSED["double"][0]), ("c", branching(recurrent_branch()))):
        onnx.save(proto, str(tmp_path / f"{name}.onnx"))
    verdicts = [trt_tour.visit(tmp_path / f"{name}.onnx", ["rate=16000"], "86")[0] for name in "abc"]
    assert verdicts == ["built", "refused", "built"]
    monkeypatch.setattr(trt, "main", lambda argv: print("Traceback: boom") or 2)
    assert trt_tour.visit(tmp_path / "a.onnx", [], "86")[0] == "wrong"
