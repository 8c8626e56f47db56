"""How the native backend opens a bundle: beside other work, and only where its arithmetic is what the bundle was made for."""

import threading

import numpy as np
import pytest
from checkpoints import small_config, write_bundle
from scipy.special import log_softmax, rel_entr

from compress import quantize
from export import onnx
from export.verify import INT8_BUDGET
from models.checkpoint import load_decoder
from models.network.torch_backend import TorchBackend
from runtime.backends import open_backend
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.native import library
from runtime.native.backend import NativeBackend


class Core:
    """The core, with a count of open models; `ew_open` waits until `beside` is set."""

    def __init__(self):
        self.core, self.beside, self.opened, self.heard = library.load(), threading.Event(), 0, None

    def __getattr__(self, name):
        return getattr(self.core, name)

    def ew_open(self, *arguments):
        self.heard = self.beside.wait(10)
        self.opened += 1
        return self.core.ew_open(*arguments)

    def ew_close(self, model, life):
        self.opened -= 1
        self.core.ew_close(model, life)


@pytest.fixture
def core(monkeypatch):
    core = Core()
    monkeypatch.setattr(library, "load", lambda: core)
    return core


def test_other_work_goes_on_while_the_core_opens_the_weights(tmp_path, core):
    bundle, _ = write_bundle(tmp_path, small_config())
    backend = NativeBackend(bundle, threads=1, meanwhile=core.beside.set)
    assert core.heard and backend.model and core.opened == 1
    backend.close()
    assert core.opened == 0


def test_what_the_other_work_raises_is_handed_back_and_the_model_closed(tmp_path, core):
    bundle, _ = write_bundle(tmp_path, small_config())

    def fail():
        core.beside.set()
        raise UserError("no tokenizer there")

    with pytest.raises(UserError, match="no tokenizer there") as raised:
        NativeBackend(bundle, threads=1, meanwhile=fail)
    assert core.heard
    del raised                                    # its frames hold the backend
    assert core.opened == 0


TEXT = "The capital of France is Paris, and the capital of Italy is Rome. 今天天气很好。 def add(a, b): return a + b\n" * 60


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    """quantized(option, ...) -> (checkpoint, bundle) of the small model in 8 bits, one scale a row, with these options."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")

    def make(*options):
        out = folder / "-".join(option.strip("-") for option in options)
        data = [] if "e4m3" in options else ["--data", str(folder / "text.txt"), "--windows", "4", "--length", "32",
                                                 "--method", "clip", "--cache", str(folder / "cache")]
        assert quantize.main([str(tiny_checkpoint("smollm2")), "-o", str(out), "--backend", "onnx", "--bits", "8", "--group", "0",
                              *options, *data]) == 0
        assert onnx.main([str(out), "-o", f"{out}-bundle"]) == 0
        return out, open_bundle(f"{out}-bundle")
    return make


def mean_kl(one, other) -> float:
    """KL(one || other) of two backends, nats a token, over 60 random tokens, the last 20 one at a time."""
    ids = np.random.default_rng(0).integers(3, 384, (1, 60))

    def log_probabilities(backend):
        cache = backend.new_cache(1, 64)
        parts = [(0, 40), *((at, at + 1) for at in range(40, 60))]
        logits = [backend.forward(ids[:, a:b], np.arange(a, b)[None], np.array([a]), np.arange(b - a)[None], cache)[0].copy()
                  for a, b in parts]
        return log_softmax(np.concatenate(logits).astype(np.float64), axis=1)

    p, q = log_probabilities(one), log_probabilities(other)
    return float(rel_entr(np.exp(p), np.exp(q)).sum(axis=1).mean())


def test_activations_rounded_by_rows_run_and_lose_less(quantized):
    """The oracle rounds nothing but the weights: PyTorch with one scale a row is farther from it than the core is."""
    checkpoint, bundle = quantized("--activations", "8")
    unrounded = load_decoder(checkpoint)
    for module in unrounded.modules():
        module._forward_pre_hooks.clear()
    oracle, rows, native = TorchBackend(unrounded), TorchBackend(load_decoder(checkpoint)), NativeBackend(bundle, threads=1)
    assert 0 < mean_kl(oracle, native) < mean_kl(oracle, rows)
    assert mean_kl(rows, native) < INT8_BUDGET                        # so that the golden outputs hold


def test_a_cache_quantized_with_stored_scales_is_int8_in_the_core_and_loses_less(quantized):
    checkpoint, bundle = quantized("--kv-cache", "channel")
    unrounded = load_decoder(checkpoint)
    unrounded.cache_scales = None
    native, wide = NativeBackend(bundle, threads=1), NativeBackend(bundle, threads=1, cache_dtype="float32")
    assert native.cache_bytes(1, 512) < 0.4 * wide.cache_bytes(1, 512)
    stored = mean_kl(TorchBackend(unrounded), TorchBackend(load_decoder(checkpoint)))
    assert 0 < mean_kl(wide, native) < stored


@pytest.mark.parametrize("options, words", [
    (("--activations", "8", "--activation-scales", "static"), "int8 activations with stored scales, which the native core does not run, but by"),
    (("--kind", "e4m3"), "8-bit floats, which the native core does not run")])
def test_what_the_core_would_compute_otherwise_goes_to_onnx_runtime(quantized, caplog, options, words):
    checkpoint, bundle = quantized(*options)
    with pytest.raises(UserError, match=words):
        open_backend(bundle, "native", 1)
    with caplog.at_level("INFO"):
        backend, lines = open_backend(bundle, None, 1, below="cuda")
    assert backend.name == "onnxruntime-cpu" and len(lines) == 2
    assert lines[1].startswith("no native: ") and words in lines[1] and caplog.messages == lines[1:]
    assert mean_kl(TorchBackend(load_decoder(checkpoint)), backend) < INT8_BUDGET
