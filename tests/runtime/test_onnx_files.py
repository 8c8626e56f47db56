"""Files that a graph reads: only those the manifest lists, wherever in the graph a tensor hides."""

import hashlib
import json
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.onnx_files import check_external_data
from runtime.ort_backend import OrtBackend


def secret(location: str = "secret.bin") -> TensorProto:
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def subgraph() -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], initializer=[secret()])


HIDING = {
    "initializer": lambda m: m.graph.initializer.append(secret()),
    "the second of two locations": lambda m: m.graph.initializer[0].external_data.add(key="location", value="secret.bin"),
    "constant": lambda m: m.graph.node.append(helper.make_node("Constant", [], ["c"], value=secret())),
    "list of tensors": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("t", [secret()])),
    "subgraph": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("g", subgraph())),
    "list of subgraphs": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("g", [subgraph()])),
    "sparse initializer": lambda m: m.graph.sparse_initializer.append(onnx.SparseTensorProto(values=secret())),
    "sparse indices": lambda m: m.graph.sparse_initializer.append(onnx.SparseTensorProto(indices=secret())),
    "function": lambda m: m.functions.append(onnx.FunctionProto(name="f", domain="d", node=[
        helper.make_node("Constant", [], ["c"], value=secret())])),
    "training": lambda m: m.training_info.append(onnx.TrainingInfoProto(algorithm=subgraph())),
    "another spelling": lambda m: m.graph.initializer.append(secret("./../bundle/secret.bin"))}


@pytest.mark.parametrize("place", HIDING)
def test_a_graph_reads_no_unlisted_file(tiny_bundle, tmp_path, place):
    folder = shutil.copytree(tiny_bundle("smollm2", 4)[1], tmp_path / "bundle")
    (folder / "secret.bin").write_bytes(bytes(4))
    model = onnx.load(folder / "portable.onnx", load_external_data=False)
    check_external_data(open_bundle(folder), "portable.onnx")
    check_external_data(open_bundle(folder), "fast.onnx")
    HIDING[place](model)
    content = model.SerializeToString()
    (folder / "portable.onnx").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["portable.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="reads the file '.*secret.bin', which the manifest does not list"):
        OrtBackend(open_bundle(folder), role="portable")


@pytest.mark.parametrize("content", [b"\x3a\xff location", b"\x3a\x7flocation", b"\x3blocation", b"\xff" * 20 + b"location"])
def test_what_is_no_model_ends_in_a_sentence(tiny_bundle, tmp_path, content):
    folder = shutil.copytree(tiny_bundle("smollm2", 4)[1], tmp_path / "bundle")
    bundle = open_bundle(folder)
    (folder / "portable.onnx").write_bytes(content)
    with pytest.raises(UserError, match="portable.onnx: ONNX Runtime cannot load it: it is no ONNX model"):
        check_external_data(bundle, "portable.onnx")
