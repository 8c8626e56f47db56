"""Predicted peaks: what must be in memory at once is counted, and a 7B model fits where the issue of it says."""

import json
import subprocess
import sys

import pytest

from compress.quantizing.calibrated import calibration_bytes
from compress.quantizing.sensitivity import gradient_bytes
from models.checkpoint import open_checkpoint
from models.network.config import ModelConfig

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
