"""Int8 activations and caches, 8-bit floats and negative scales: graphs against PyTorch's own rounding, and refusals."""

import numpy as np
import onnx
import pytest
import torch
from checkpoints import course
from scipy.special import log_softmax, rel_entr

from compress.quantize import main as quantize
from export import onnx as export_onnx
from export import ort
from export.cuda_on_cpu import CudaOnCpu
from models.checkpoint import load_decoder, open_checkpoint
from models.network.torch_backend import TorchBackend
from runtime.bundle import open_bundle
from runtime.ort_backend import OrtBackend

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。 def add(a, b): return a + b\n" * 60


CACHED = {per: ("--method", "clip", "--bits", "8", "--kv-cache", per, "--embedding-bits", "0",
                "--skip", "*.self_attn.*", "*.gate_proj", "*.down_proj", "*.1.mlp.*") for per in ("tensor", "channel")}


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    """(checkpoint, bundle with both graphs) of the small model, quantized with some options."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")

    def make(name: str, *options, fast: bool = True):
        out = folder / name
        assert quantize([str(tiny_checkpoint("smollm2")), "-o", str(out), "--backend", "onnx", "--data", str(folder / "text.txt"),
                         "--cache", str(folder / "cache"), "--windows", "8", "--length", "64", *options]) == 0
        assert export_onnx.main([str(out), "-o", str(folder / f"{name}-bundle")]) == 0
        assert not fast or ort.main([str(folder / f"{name}-bundle")]) == 0
        return out, open_bundle(folder / f"{name}-bundle")
    return make


def kl(decoder, backend) -> np.ndarray:
    """KL(PyTorch || graph) of each token in nats [n], over a ragged course through the cache."""
    p, q = (log_softmax(course(one, decoder.config.vocab_size).astype(np.float64), axis=1)
            for one in (TorchBackend(decoder), backend))
    return rel_entr(np.exp(p), np.exp(q)).sum(axis=1)


def mean_kl(decoder, backend) -> float:
    return float(kl(decoder, backend).mean())


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_int8_caches_of_the_cuda_graph(quantized, per, tmp_path):
    """In float16 a key falls to the next step now and then, in both graphs alike: the fast one's numbers, and PyTorch's within that."""
    checkpoint, _ = quantized(f"cache-{per}", *CACHED[per])
    assert export_onnx.main([str(checkpoint), "-o", str(tmp_path / "b"), "--dtype", "fp16"]) == 0 and ort.main([str(tmp_path / "b")]) == 0
    bundle, decoder, plain = open_bundle(tmp_path / "b"), load_decoder(checkpoint), load_decoder(checkpoint)
    plain.cache_scales = None
    backend = CudaOnCpu(bundle)
    assert backend.cache_bytes(1, 8) == 8 * 2 * 2 * 2 * 16
    rounding, vocabulary = mean_kl(decoder, TorchBackend(plain)), decoder.config.vocab_size
    fast, found = (log_softmax(course(one, vocabulary).astype(np.float64), axis=1)
                   for one in (OrtBackend(bundle, role="fast", exact=True), backend))
    assert rel_entr(np.exp(fast), np.exp(found)).sum(axis=1).mean() < 0.05 * rounding
    assert mean_kl(decoder, backend) < 0.5 * rounding


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_int8_caches(quantized, per):
    """Keys and values in int8: the fast graph's own int8 cache and the portable graph's rounding are PyTorch's."""
    checkpoint, bundle = quantized(f"cache-{per}", *CACHED[per])
    decoder, plain = load_decoder(checkpoint), load_decoder(checkpoint)
    plain.cache_scales = None
    fast = OrtBackend(bundle, role="fast", exact=True)
    assert fast.cache_bytes(1, 8) == 8 * 2 * 2 * 2 * 16                        # slots, k and v, layers, heads, one byte each
    rounding = mean_kl(decoder, TorchBackend(plain))                           # what rounding the cache changes at all
    assert mean_kl(decoder, fast) < 0.05 * rounding
    assert mean_kl(decoder, OrtBackend(bundle, exact=True)) < 0.05 * rounding
    scales = open_checkpoint(checkpoint).read("model.layers.0.self_attn.k_scale")
    assert len(scales) == (1 if per == "tensor" else 2 * 16) and (scales > 0).all()


def test_static_activations(quantized):
    """One scale a linear from the text: the portable graph's QuantizeLinear rounds as PyTorch does."""
    checkpoint, bundle = quantized("static", "--method", "clip", "--bits", "8", "--group", "0", "--activations", "8",
                                   "--activation-scales", "static", fast=False)
    decoder = load_decoder(checkpoint)
    weights_only = load_decoder(checkpoint)
    for module in weights_only.modules():
        module._forward_pre_hooks.clear()
    assert mean_kl(decoder, OrtBackend(bundle, exact=True)) < 0.05 * mean_kl(decoder, TorchBackend(weights_only))


def test_rows_stand_alone_on_the_grid_of_static_scales(quantized):
    checkpoint, _ = quantized("static", "--method", "clip", "--bits", "8", "--group", "0", "--activations", "8",
                              "--activation-scales", "static", fast=False)
    decoder, scales, seen = load_decoder(checkpoint), open_checkpoint(checkpoint).input_scales(), {}
    assert len(scales) == 12 and not any("down_proj" in name for name in scales)      # whose outliers no scale holds
    assert torch.equal(scales["model.layers.0.mlp.up_proj"], scales["model.layers.0.mlp.gate_proj"])
    for name in scales:
        decoder.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
    ids = torch.randint(0, 384, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = decoder(ids), torch.cat([decoder(row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-3)
    for name, scale in scales.items():
        steps = seen[name] / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() <= 128.001, name


def test_8_bit_floats(quantized):
    """e4m3 weights are PyTorch's own, nearer than e4m3's spacing of 1/8, and run in the portable graph."""
    checkpoint, bundle = quantized("e4m3", "--bits", "8", "--group", "0", "--kind", "e4m3", fast=False)
    opened = open_checkpoint(checkpoint)
    tensor = opened.quantized("model.layers.0.mlp.up_proj")
    assert tensor.codes.dtype == torch.float8_e4m3fn and opened.dtype("model.layers.0.mlp.up_proj.codes") == "F8_E4M3"
    assert mean_kl(load_decoder(checkpoint), OrtBackend(bundle, exact=True)) < 1e-9


def test_negative_scales(quantized):
    """A symmetric grid may be mirrored by a negative scale: both graphs take it."""
    checkpoint, bundle = quantized("mirrored", "--method", "clip", "--bits", "4", "--group", "32")
    negative = sum(int((open_checkpoint(checkpoint).quantized(module).scales < 0).sum())
                   for module in open_checkpoint(checkpoint).quantization.tensors)
    assert negative > 100
    decoder = load_decoder(checkpoint)
    assert mean_kl(decoder, OrtBackend(bundle, exact=True)) < 1e-9
    assert mean_kl(decoder, OrtBackend(bundle, role="fast")) < 0.02


@pytest.fixture(scope="module")
def rows(quantized):
    return quantized("rows", "--method", "clip", "--bits", "8", "--group", "0", "--activations", "8")


def test_a_scale_for_each_row(rows):
    """Both graphs round each token's row as PyTorch does, the fast one in products of integers.

    A value halfway between two codes may fall to either, by the order of a sum: it moves the tokens after it in one of the
    three sequences, so half of all tokens agree to the last bits whatever falls.
    """
    checkpoint, bundle = rows
    decoder, weights_only = load_decoder(checkpoint), load_decoder(checkpoint)
    for module in weights_only.modules():
        module._forward_pre_hooks.clear()
    rounding = mean_kl(decoder, TorchBackend(weights_only))
    nodes = [node.op_type for node in onnx.load(bundle.path("fast.onnx"), load_external_data=False).graph.node]
    assert nodes.count("MatMulIntegerToFloat") == 2 * 4 and nodes.count("QuantizeLinear") == 2 * 4
    portable = kl(decoder, OrtBackend(bundle, exact=True))
    assert np.median(portable) < 1e-9 and portable.mean() < 0.1 * rounding
    assert mean_kl(decoder, OrtBackend(bundle, role="fast")) < 0.005


def test_a_row_is_the_same_alone_and_beside_others(rows):
    """To the bit, through the whole network: a prompt, then a step on its cache."""
    _, bundle = rows
    fast = OrtBackend(bundle, role="fast")
    ids = np.random.default_rng(0).integers(3, 384, (4, 20))
    positions, last = np.tile(np.arange(20), (4, 1)), np.full((4, 1), 19)

    def logits(chosen):
        cache, n = fast.new_cache(len(chosen), 32), len(chosen)
        first = fast.forward(ids[chosen], positions[:n], np.zeros(n, np.int64), last[:n], cache).copy()
        return np.stack([first, fast.forward(ids[chosen, :1], last[:n] + 1, np.full(n, 20), np.zeros((n, 1), np.int64), cache)])
    together = logits(range(4))
    for row in range(4):
        assert np.array_equal(together[:, row], logits([row])[:, 0])
