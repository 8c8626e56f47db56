"""Predicted peaks: what must be in memory at once is counted, and a 7B model fits where the issue of it says."""

import json
import subprocess
import sys

import pytest
import torch

import far
from compress import activations
from compress.quantizing import calibrated
from compress.quantizing.calibrated import calibration_bytes
from compress.quantizing.fisher import gradient_bytes
from models.checkpoint import open_checkpoint, write_checkpoint
from models.network.config import ModelConfig
from models.network.quantized import Quantization, TensorFormat
from models.random_checkpoint import random_tensors
from runtime.errors import UserError

LLAMA_7B = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}


def test_seven_billion_parameters_fit_24_gigabytes():
    config = ModelConfig.from_hf(LLAMA_7B)
    parts = calibration_bytes(config, 128, 512)
    tokens = 128 * 512
    assert parts["activations"] == tokens * 4 * (4096 + 4096 + 11008)           # stream, normed, inputs of down_proj
    assert parts["layer"] >= 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert sum(parts.values()) < 13e9
    assert 13e9 < gradient_bytes(config, 512, 2)["weights"] < 14e9
    assert sum(gradient_bytes(config, 512, 2).values()) < 24e9
    # Twice the layers take no more; twice the windows take more.
    deeper = ModelConfig.from_hf(LLAMA_7B | {"num_hidden_layers": 64})
    assert calibration_bytes(deeper, 128, 512) == parts
    assert sum(calibration_bytes(config, 256, 512).values()) > sum(parts.values()) + 4e9


@pytest.mark.real
def test_the_prediction_is_near_the_real_peak(smollm2, shared_data, tmp_path):
    """Clipping of the real model on a few windows, in a process of its own: the measured peak is near the predicted one."""
    run = subprocess.run([sys.executable, "-m", "compress.quantize", str(smollm2), "-o", str(tmp_path / "q"), "--method", "clip",
                          "--windows", "16", "--data", str(shared_data / "text" / "sotu-valid.txt"),
                          "--cache", str(tmp_path / "cache")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak = json.loads((tmp_path / "q" / "lineage.json").read_text())["stages"][-1]["metrics"]["after"]["peak_rss_mb"] * 2**20
    assert 0.4 * peak < sum(calibration_bytes(open_checkpoint(smollm2).config, 16, 512).values()) < 2.5 * peak


def test_seven_billion_parameters_on_a_device_of_12_gigabytes(monkeypatch):
    """GPTQ with 128 windows of 2048 tokens: activations in the host's memory, the rest on the device."""
    config, gpu = ModelConfig.from_hf(LLAMA_7B), torch.device("cuda", 0)
    for module in (activations, calibrated):
        monkeypatch.setattr(module, "free_bytes", lambda device: 12_000_000_000)
    monkeypatch.setattr(activations, "available_memory", lambda: 64_000_000_000)
    there, host = calibrated.device_bytes(config, 128, 2048, gpu)
    assert host["activations"] == 128 * 2048 * 4 * (4096 + 4096 + 11008) and "activations" not in there
    assert sum(there.values()) < 12e9
    assert there["Hessian"] >= 28 * 11008**2 and there["layer"] >= 6 * (4 * 4096**2 + 3 * 4096 * 11008)
    monkeypatch.setattr(calibrated, "free_bytes", lambda device: 4_000_000_000)
    with pytest.raises(UserError, match=r"cuda:0 has 4.00 GB free, and one layer of this model at work takes \d.\d\d GB \(\d+ bytes\)"):
        calibrated.device_bytes(config, 128, 2048, gpu)


@pytest.mark.parametrize("home", ("device", "memory"))
def test_the_prediction_holds_on_a_device(home, tmp_path, device, monkeypatch):
    """What tests/far.py's device holds at most while a model of Llama's shape is quantized, against the calculation."""
    config = ModelConfig.from_hf(LLAMA_7B | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8,
                                             "num_key_value_heads": 8, "vocab_size": 1000})
    source = tmp_path / "model"
    write_checkpoint(source, config.to_hf(), random_tensors(config, config.to_hf(), 0), None, {})
    for module in (activations, calibrated):
        monkeypatch.setattr(module, "home_for", lambda *needed: home)
    monkeypatch.setattr("compress.layerwise.home_for", lambda *needed: home)
    checkpoint = open_checkpoint(source).on(device)
    ids = torch.randint(0, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    plan = Quantization({module: TensorFormat(4, 32) for module in checkpoint.modules() if module.startswith("model.layers.")})
    there, _ = calibrated.device_bytes(config, *ids.shape, device)
    far.forget_peak()
    for _ in calibrated.calibrated(checkpoint, ids, plan, calibrated.gptq_descended, tmp_path / "work"):
        pass
    assert 0.4 * sum(there.values()) < far.peak_bytes() <= sum(there.values())
