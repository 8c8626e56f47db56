"""Portable and fast graphs against PyTorch, over every family and weight format, ragged and through the cache."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import course, everywhere, small_config, write_random
from scipy.special import log_softmax, rel_entr
from tiny import FAMILIES

from export import onnx as export_onnx
from export import ort
from models.checkpoint import load_decoder
from models.network.quantized import TensorFormat
from models.network.torch_backend import TorchBackend
from runtime.bundle import open_bundle
from runtime.ort_backend import OrtBackend

INT4, INT8 = TensorFormat(4, 32), TensorFormat(8, 0)
GPT2 = dict(norm="layer", positions="learned", activation="gelu_tanh", gated_mlp=False, attention_bias=True, output_bias=True,
            mlp_bias=True)


def bundle_of(checkpoint, out, *options):
    assert export_onnx.main([str(checkpoint), "-o", str(out), *options]) == 0
    assert ort.main([str(out)]) == 0
    return open_bundle(out, verify=True)


def kl(checkpoint, bundle, **how) -> np.ndarray:
    """KL(PyTorch || graph) at every token of the course, by scipy."""
    decoder = load_decoder(checkpoint)
    vocabulary = decoder.config.vocab_size
    p, q = (log_softmax(course(backend, vocabulary).astype(np.float64), axis=1)
            for backend in (TorchBackend(decoder), OrtBackend(bundle, **how)))
    return rel_entr(np.exp(p), np.exp(q)).sum(axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tiny_checkpoint, tmp_path):
    """Full precision: both graphs equal PyTorch, and float16 stays close."""
    checkpoint = tiny_checkpoint(family)
    bundle = bundle_of(checkpoint, tmp_path / "b")
    for role in ("portable", "fast"):
        assert kl(checkpoint, bundle, role=role).max() < 1e-9
    half = bundle_of(checkpoint, tmp_path / "h", "--dtype", "fp16")
    for role in ("portable", "fast"):
        assert kl(checkpoint, half, role=role).mean() < 1e-4
    assert half.weights_bytes < 0.6 * bundle.weights_bytes


@pytest.mark.parametrize("formats", [
    everywhere(4, 32), everywhere(4, 32, symmetric=False), everywhere(4, 64), everywhere(4, 0),
    everywhere(8, 0), everywhere(8, 0, symmetric=False), everywhere(8, 32),
    everywhere(4, 32, table=TensorFormat(8, 32)), everywhere(4, 32, table=INT4), everywhere(4, 32, table=TensorFormat(4, 0)),
    everywhere(4, 32, table=TensorFormat(8, 0, False)), everywhere(4, 32, table=None),
], ids=["int4", "int4 asymmetric", "int4/64", "int4 rows", "int8 rows", "int8 rows asymmetric", "int8/32", "table int8/32",
        "table int4/32", "table int4 rows", "table asymmetric", "table dense"])
def test_weight_formats(formats, tmp_path):
    """The portable graph computes from the very codes; the fast one with int8 activations stays close."""
    checkpoint = write_random(tmp_path / "c", small_config(layers=((4, 2, 128),) * 2), formats)
    bundle = bundle_of(checkpoint, tmp_path / "b")
    assert kl(checkpoint, bundle, exact=True, role="portable").max() < 1e-9
    assert 1e-9 < kl(checkpoint, bundle, role="fast").mean() < 0.02


def test_layers_of_different_shapes_and_mixed_widths(tmp_path):
    """A structurally pruned model with 4 and 8 bits side by side: q, k, v and gate, up fall apart where they differ."""
    def formats(module):
        if module.endswith(("v_proj", "down_proj")) or module == "model.embed_tokens":
            return INT8
        return None if module == "model.layers.1.mlp.up_proj" else INT4

    config = small_config(layers=((4, 2, 96), (2, 1, 64), (6, 6, 128)))
    bundle = bundle_of(checkpoint := write_random(tmp_path / "c", config, formats), tmp_path / "b")
    names = {tensor["name"] for tensor in bundle.manifest["weights"]["tensors"]}
    assert {"layers.0.q.codes", "layers.0.v.codes", "layers.0.gate_up.codes", "layers.1.up.weight"} <= names
    assert not {"layers.0.qkv.codes", "layers.1.gate_up.codes"} & names
    assert kl(checkpoint, bundle, exact=True, role="portable").max() < 1e-9
    assert kl(checkpoint, bundle, role="fast").mean() < 0.02


@pytest.mark.parametrize("config", [
    small_config("qwen3", qk_norm=True, norm_eps=1e-6, rope_theta=1e6),
    small_config("mistral", sliding_window=16, tied_embeddings=False),
    small_config("llama", attention_bias=True, output_bias=True, mlp_bias=True),
    small_config("gpt2", layers=((4, 4, 96), (4, 4, 96)), **GPT2),
], ids=["qk-norm", "window", "biases", "gpt2"])
def test_quantized_families(config, tmp_path):
    checkpoint = write_random(tmp_path / "c", config, everywhere(4, 32))
    bundle = bundle_of(checkpoint, tmp_path / "b")
    assert kl(checkpoint, bundle, exact=True, role="portable").max() < 1e-9
    assert kl(checkpoint, bundle, role="fast").mean() < 0.02


@pytest.mark.parametrize("family, head_dim, fits", [
    ("llama", 48, True), ("llama", 272, True), ("llama", 8, False), ("llama", 100, False), ("llama", 120, False),
    ("gpt2", 24, True), ("gpt2", 264, True), ("gpt2", 7, False), ("gpt2", 100, False)])
def test_heads_that_groupqueryattention_lacks_are_refused_and_run_the_portable_graph(family, head_dim, fits, tmp_path, capsys):
    config = small_config(family, layers=((2, 2, 64),) * 2, head_dim=head_dim, **(GPT2 if family == "gpt2" else {}))
    checkpoint = write_random(tmp_path / "c", config)
    assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "b")]) == 0
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    assert ort.main([str(tmp_path / "b")]) == (0 if fits else 2)
    if not fits:
        assert f"this model's is {head_dim}" in capsys.readouterr().err
        assert before == (tmp_path / "b" / "manifest.json").read_bytes()
    bundle = open_bundle(tmp_path / "b")
    assert OrtBackend(bundle).graph == ("fast.onnx" if fits else "portable.onnx")
    assert kl(checkpoint, bundle).max() < 1e-9


@pytest.mark.parametrize("formats", [everywhere(4, 32), everywhere(8, 0), everywhere(8, 32),
                                     everywhere(4, 32, table=TensorFormat(4, 32))],
                         ids=["int4", "int8 rows", "int8/32", "table int4"])
def test_every_product_is_fused(formats, tmp_path):
    """ONNX Runtime makes MatMulNBits of every linear and of the tied head, and unfolds no table."""
    bundle = bundle_of(write_random(tmp_path / "c", small_config(), formats), tmp_path / "b")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "o.bin")
    onnxruntime.InferenceSession(str(bundle.path("fast.onnx")), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 2 * 4 + 1
    assert not {"MatMul", "DequantizeLinear", "BitwiseXor", "Expand"} & set(kinds)
    assert kinds.count("GroupQueryAttention") == 2 and kinds.count("SkipSimplifiedLayerNormalization") == 4


def test_the_graphs_share_one_weights_file(tiny_checkpoint, tmp_path):
    """Same names at the same places; the portable graph is standard opset 24 and reads every input."""
    bundle = bundle_of(tiny_checkpoint("qwen3"), tmp_path / "b")
    places = {tensor["name"]: (tensor["offset"], tensor["bytes"]) for tensor in bundle.manifest["weights"]["tensors"]}
    for role in ("portable", "fast"):
        model = onnx.load(bundle.path(f"{role}.onnx"), load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert {tensor.name for tensor in external} == set(places)
        for tensor in external:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "weights.bin"
            assert (int(place["offset"]), int(place["length"])) == places[tensor.name]
        assert bundle.path(f"{role}.onnx").stat().st_size < 60_000
        read = {name for node in model.graph.node for name in node.input}
        assert all(value.name in read for value in model.graph.input)
    portable = onnx.load(bundle.path("portable.onnx"), load_external_data=False)
    assert [(o.domain, o.version) for o in portable.opset_import] == [("", 24)]
    assert {node.domain for node in portable.graph.node} == {""}
    attributes = {attribute.name for node in portable.graph.node if node.op_type == "Attention" for attribute in node.attribute}
    assert attributes == {"scale"} and "capacity" in str(portable.graph.input)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["graphs"][0]["opset"] == 24
