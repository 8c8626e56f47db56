"""cuda.onnx, which no test here can run on a GPU: its arithmetic on ONNX Runtime's CPU, and what of it has CUDA kernels."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from anatomies import MODELS, any_shape, coded, journey    # noqa: F401
from checkpoints import course, everywhere, small_config, write_random
from scipy.special import log_softmax, rel_entr
from tiny import EVERY_FAMILY, FAMILIES

from export import onnx as export_onnx
from export import ort
from export.cuda_on_cpu import CudaOnCpu
from models.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat
from models.network.torch_backend import TorchBackend
from runtime.bundle import open_bundle
from runtime.errors import Unavailable, UserError
from runtime.nbits import made
from runtime.ort_backend import OrtBackend

# What CUDA kernels ONNX Runtime lists (docs/OperatorKernels.md, com.microsoft and ai.onnx): the definitions of an operator they serve,
# from one opset to another. A kernel that is listed as "13+" serves the definition of opset 13 and no later one.
KERNELS = {"Add": (14, 14), "Cast": (21, 23), "Concat": (13, 13), "Div": (14, 14), "Expand": (13, 13), "Floor": (13, 13),
           "Gather": (13, 13), "GatherElements": (13, 13), "Gelu": (20, 20), "LayerNormalization": (17, 17), "MatMul": (13, 13), "Mul": (14, 14),
           "RMSNormalization": (23, 23), "Reshape": (21, 23), "RotaryEmbedding": (23, 23), "Sigmoid": (13, 13), "Slice": (13, 13),
           "Split": (18, 18), "Sub": (14, 14), "Tanh": (13, 13), "TopK": (11, 11), "Unsqueeze": (21, 23)}
MICROSOFT = {"FusedMatMul", "GroupQueryAttention", "MatMulNBits", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
WITHOUT = {"lfm2": "recurrent layers", "qwen3_5": "recurrent layers", "granite4_h": "recurrent layers", "granite4_tiny": "recurrent layers",
           "lfm2_moe": "recurrent layers", "qwen3_moe": "mixtures of experts", "olmoe": "mixtures of experts",
           "gemma4": "layers that read another's keys and values"}


class Checked(CudaOnCpu):
    """Holds the choices of every call against numpy's."""

    def forward(self, *arguments, **more):
        logits = super().forward(*arguments, **more)
        order = np.argsort(-logits, axis=-1, kind="stable")[..., :64]
        assert np.array_equal(self.outputs["next_token"], logits.argmax(-1)) and np.array_equal(self.outputs["top_ids"], order)
        assert np.array_equal(self.outputs["top_logits"], np.take_along_axis(logits, order, -1)) and order.shape[-1] == 64
        return logits


def bundle_of(checkpoint, out, dtype="fp16"):
    assert export_onnx.main([str(checkpoint), "-o", str(out), "--dtype", dtype]) == 0 and ort.main([str(out)]) == 0
    return open_bundle(out, verify=True)


def kl(reference, backend, way=course, *more) -> np.ndarray:
    """KL(reference || backend) at every token of a way through the cache, by scipy."""
    p, q = (log_softmax(way(one, *more).astype(np.float64), axis=1) for one in (reference, backend))
    return rel_entr(np.exp(p), np.exp(q)).sum(axis=1)


def check_nodes(bundle) -> None:
    """Every node has a CUDA kernel, the lengths come in, and the file holds no weights."""
    model = onnx.load(bundle.path("cuda.onnx"), load_external_data=False)
    opset = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        if node.domain:
            assert (node.domain, node.op_type in MICROSOFT) == ("com.microsoft", True), node.op_type
        else:
            first, last = KERNELS[node.op_type]
            assert first <= onnx.defs.get_schema(node.op_type, opset[""]).since_version <= last, node.op_type
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    read = {name for node in model.graph.node for name in node.input}
    assert set(inputs) <= read and "write_index" not in inputs
    assert [(inputs[name].elem_type, len(inputs[name].shape.dim)) for name in ("seqlens_k", "total_sequence_length")] == [
        (onnx.TensorProto.INT32, 1), (onnx.TensorProto.INT32, 0)]
    assert all(tensor.external_data or len(tensor.raw_data) <= 1024 for tensor in model.graph.initializer)
    entry = bundle.graph("cuda")
    assert entry["dtype"] == "fp16" and entry["opset"] == opset[""] == 23 and entry["bytes"] < 200_000


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family(family, tiny_checkpoint, tmp_path, capsys):
    """As near to PyTorch as the portable graph in float16, on prompts, steps and a chunk."""
    checkpoint = tiny_checkpoint(family)
    bundle = bundle_of(checkpoint, tmp_path / "b")
    if family in WITHOUT:
        assert bundle.graph("cuda") is None and bundle.graph("fast")
        assert f"no cuda.onnx, because it does not express {WITHOUT[family]};" in capsys.readouterr().out
        return
    check_nodes(bundle)
    decoder = load_decoder(checkpoint)
    vocabulary = decoder.config.vocab_size
    assert kl(TorchBackend(decoder), Checked(bundle), course, vocabulary).mean() < 1e-4
    assert kl(OrtBackend(bundle, role="portable", exact=True), CudaOnCpu(bundle), course, vocabulary).mean() < 1e-4


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if not config.recurrent and "experts" not in name
                                  and all(layer.cache_source is None for layer in config.layers)])
@pytest.mark.parametrize("formats", [lambda module: None, coded], ids=["dense", "int4"])
@pytest.mark.usefixtures("any_shape")
def test_every_way_to_attend(name, formats, tmp_path):
    """Windows, caps, gates, norms on all sides, query factors: from the very codes, through a cache that forks, goes back and grows."""
    checkpoint = write_random(tmp_path / "c", MODELS[name], formats)
    bundle = bundle_of(checkpoint, tmp_path / "b")
    check_nodes(bundle)
    assert np.median(kl(TorchBackend(load_decoder(checkpoint)), Checked(bundle), journey)) < 1e-5


FORMATS = {
    "int4": everywhere(4, 32), "int4 asymmetric": everywhere(4, 32, symmetric=False), "int4/64": everywhere(4, 64),
    "int4 rows": everywhere(4, 0), "int4 rows asymmetric": everywhere(4, 0, symmetric=False), "int8 rows": everywhere(8, 0),
    "int8 rows asymmetric": everywhere(8, 0, symmetric=False), "int8/32": everywhere(8, 32), "int8/32 asymmetric": everywhere(8, 32, False),
    "table int8/32": everywhere(4, 32, table=TensorFormat(8, 32)), "table int4/32": everywhere(4, 32, table=TensorFormat(4, 32)),
    "table int4 rows": everywhere(4, 0, table=TensorFormat(4, 0)),
    "table int8 asymmetric": everywhere(4, 32, table=TensorFormat(8, 0, False)), "table dense": everywhere(4, 32, table=None)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_weight_formats(name, tied, tmp_path):
    """From the very codes; numbers of outputs are no powers of two, and the blocks of a row not always even in number."""
    size = 2 if name == "int4/64" else 1
    config = small_config(layers=((4, 2, 96 * size), (8, 1, 160 * size)), tied_embeddings=tied)
    checkpoint = write_random(tmp_path / "c", config, FORMATS[name])
    bundle = bundle_of(checkpoint, tmp_path / "b")
    check_nodes(bundle)
    assert kl(TorchBackend(load_decoder(checkpoint)), Checked(bundle), course, config.vocab_size).mean() < 1e-5


@pytest.mark.parametrize("formats", [everywhere(4, 32), everywhere(8, 0, False, table=TensorFormat(8, 0, False))],
                         ids=["int4", "zero points"])
@pytest.mark.parametrize("tied", [True, False])
def test_outputs_that_8_does_not_divide(formats, tied, tmp_path):
    """As GPT-2's vocabulary: blocks are filled up with zeros, and what comes of them is left out."""
    config = small_config(vocab_size=390, tied_embeddings=tied)
    checkpoint = write_random(tmp_path / "c", config, formats)
    bundle = bundle_of(checkpoint, tmp_path / "b")
    check_nodes(bundle)
    given = dict(made(bundle))
    assert {array.shape[0] % 8 for array in given.values()} == {0} and len(given["embed.blocks"]) == 392
    assert kl(TorchBackend(load_decoder(checkpoint)), Checked(bundle), course, 390).mean() < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_the_blocks_have_the_values_of_the_codes(name, tmp_path):
    """By the definition of MatMulNBits, block by block in numpy, to the bit."""
    checkpoint = write_random(tmp_path / "c", small_config(layers=((4, 2, 192 if name == "int4/64" else 96),)), FORMATS[name])
    bundle, opened, found = bundle_of(checkpoint, tmp_path / "b"), open_checkpoint(checkpoint), {}
    given = dict(made(bundle))
    for matrix in sorted({key.rpartition(".")[0] for key in given}):
        blocks, scales = given[f"{matrix}.blocks"], given[f"{matrix}.block_scales"]
        bits = 4 if f"{matrix}.codes" in names(bundle, "int4") else 8
        codes = blocks if bits == 8 else np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:2], -1)
        zeros = given.get(f"{matrix}.block_zeros", np.full(scales.shape if bits == 8 else (len(scales), -(-scales.shape[1] // 2)),
                                                           128 if bits == 8 else 0x88, np.uint8))
        if bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, :scales.shape[1]]
        values = (codes.astype(np.int32) - zeros[:, :, None]) * scales[:, :, None].astype(np.float32)
        found[matrix] = values.reshape(len(values), -1).astype(np.float32)
    parts = {"layers.0.qkv": [f"self_attn.{part}_proj" for part in "qkv"], "layers.0.o": ["self_attn.o_proj"],
             "layers.0.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "layers.0.down": ["mlp.down_proj"]}
    wanted = {matrix: [f"model.layers.0.{module}" for module in modules] for matrix, modules in parts.items()}
    wanted |= {"embed": ["model.embed_tokens"]} if name != "table dense" else {}
    assert set(found) == set(wanted)
    for matrix, modules in wanted.items():
        theirs = torch.cat([opened.quantized(module).dequantize() for module in modules]).numpy()
        assert np.array_equal(found[matrix], theirs), matrix


def names(bundle, dtype: str) -> set[str]:
    return {tensor["name"] for tensor in bundle.manifest["weights"]["tensors"] if tensor["dtype"] == dtype}


def test_a_session_without_its_weights_does_not_open(tmp_path):
    bundle = bundle_of(write_random(tmp_path / "c", small_config(), everywhere(4, 32)), tmp_path / "b")
    with pytest.raises(Exception, match="block"):
        onnxruntime.InferenceSession(str(bundle.path("cuda.onnx")), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("config, formats, activations, lack", [
    (small_config(hidden_size=72), everywhere(4, 0), None, "the codes of embed, which MatMulNBits cannot have in blocks"),
    (small_config(), everywhere(4, 32, table=TensorFormat(4, 0, False)), None, "the codes of embed, which MatMulNBits"),
    (small_config(), lambda module: TensorFormat(8, 0, kind="e4m3") if "mlp" in module else None, None,
     "the codes of layers.0.gate_up, which"),
    (small_config(), everywhere(8, 0), {"bits": 8, "per": "row"}, "linears that round their inputs to int8"),
], ids=["72 inputs", "zero points of 4 bits in the table", "8-bit floats", "int8 activations"])
def test_what_it_does_not_express_is_told_in_one_line(config, formats, activations, lack, tmp_path, capsys):
    bundle = bundle_of(write_random(tmp_path / "c", config, formats, activations=activations), tmp_path / "b")
    assert bundle.graph("cuda") is None and f"no cuda.onnx, because it does not express {lack}" in capsys.readouterr().out
    with pytest.raises(Unavailable, match="no cuda graph in this bundle"):
        CudaOnCpu(bundle)
    if "codes" in lack:
        with pytest.raises(UserError, match=lack.partition(", ")[0] + " cannot be had in blocks, .*; run `python -m export.ort` again"):
            list(made(bundle))


def test_only_bundles_in_fp16_have_it_and_once(tmp_path, capsys):
    checkpoint = write_random(tmp_path / "c", small_config(), everywhere(4, 32))
    bundle = bundle_of(checkpoint, tmp_path / "b", "fp32")
    assert [graph["role"] for graph in bundle.manifest["graphs"]] == ["portable", "fast"] and "cuda" not in capsys.readouterr().out
    bundle_of(checkpoint, tmp_path / "h")
    before = (tmp_path / "h" / "cuda.onnx").read_bytes()
    assert ort.main([str(tmp_path / "h")]) == 0
    manifest = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert [graph["role"] for graph in manifest["graphs"]] == ["portable", "fast", "cuda"]
    assert (tmp_path / "h" / "cuda.onnx").read_bytes() == before and b"blocks" in before


@pytest.mark.real
def test_the_real_model(smollm2_int4, tmp_path):
    """SmolLM2 in int4: as near to the portable graph as float16 allows, and its choices are numpy's."""
    bundle = bundle_of(smollm2_int4, tmp_path / "b")
    check_nodes(bundle)
    vocabulary = bundle.model["config"]["vocab_size"]
    assert kl(OrtBackend(bundle, role="portable", exact=True), Checked(bundle), course, vocabulary).mean() < 2e-4
