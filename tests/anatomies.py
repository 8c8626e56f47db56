"""Models of every kind of layer and every way to attend, and a course through a cache: what every backend is held to PyTorch on."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import everywhere, small_config

from models.formats.weight_names import OWN_FORM
from models.network.config import LayerConfig, ModelConfig, Rope, gated_layer
from runtime import decode

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "attention_factor": 1.1, "llama_4_scaling_beta": 0.1}
FULL, NEAR = LayerConfig(4, 2, 96, head_dim=32, sliding_window=0), LayerConfig(4, 1, 96, rope=1)
CONV, DELTA = LayerConfig(0, 0, 96, "conv", kernel=3), LayerConfig(4, 2, 96, "delta", head_dim=16, kernel=4, state_dim=24)
MAMBA = LayerConfig(6, 2, 96, "mamba", head_dim=16, kernel=4, state_dim=24)
PLAIN = LayerConfig(4, 2, 96)


def model(*layers, **fields) -> ModelConfig:
    return replace(small_config(context_length=256, norm_eps=1e-6, **fields), layers=layers)


MODELS = {
    "windows, sizes, tables": model(NEAR, FULL, replace(PLAIN, rope=-1), sliding_window=16, ropes=(Rope(500.0),), rope_share=0.5,
                                    attention_scale=0.2),
    "norms on both sides, caps": model(PLAIN, PLAIN, norm_order="both", attention_softcap=5.0, logits_softcap=8.0, tied_embeddings=False,
                                       sliding_window=16),
    "norms after, over all heads": model(PLAIN, PLAIN, norm_order="post", qk_norm=True, qk_norm_over="all"),
    "norms of heads after rotation": model(PLAIN, PLAIN, qk_norm=True, qk_norm_last=True),
    "gate, norm of values, biases": model(PLAIN, PLAIN, attention_gate=True, v_norm=True, qk_norm=True, attention_bias=True, output_bias=True,
                                          mlp_bias=True),
    "query factors": model(PLAIN, PLAIN, rope_scaling=YARN),
    "another layer's cache": model(NEAR, FULL, replace(NEAR, cache_source=0), replace(FULL, cache_source=1), sliding_window=16, qk_norm=True,
                                   v_norm=True, ropes=(Rope(500.0),), attention_scale=1.0),
    "convolution": model(CONV, PLAIN, replace(CONV, kernel=7), qk_norm=True, conv_bias=True),
    "delta": model(DELTA, PLAIN, replace(DELTA, kv_heads=4), attention_gate=True, qk_norm=True),
    "gru": model(*[gated_layer("gru", 64)] * 2, positions="none"),
    "lstm": model(gated_layer("lstm", 64), PLAIN),
    "mamba": model(MAMBA, replace(PLAIN, rope=-1), replace(MAMBA, kv_heads=1), conv_bias=True),
    "experts": model(replace(PLAIN, experts=5, experts_per_token=2), replace(PLAIN, mlp_size=64), replace(PLAIN, experts=3, experts_per_token=1),
                     router_normalized=True),
    "experts, chosen, shared": model(replace(PLAIN, experts=4, experts_per_token=2, shared_size=64), router="chosen", mlp_bias=True),
    "experts, sigmoid": model(replace(PLAIN, experts=4, experts_per_token=3), replace(CONV, experts=4, experts_per_token=2), router="sigmoid",
                              router_bias=True, router_normalized=True),
    "inputs of every layer": model(NEAR, FULL, replace(NEAR, cache_source=0), sliding_window=16, ropes=(Rope(500.0),), per_layer_size=32,
                                   layer_scalar=True, norm_order="both", activation="gelu_tanh"),
}
NATIVE = {name: config for name, config in MODELS.items() if not config.gated}


@pytest.fixture
def any_shape(monkeypatch):
    """Checkpoints of shapes that no family has."""
    monkeypatch.setattr(ModelConfig, "to_hf", lambda self: {"model_type": "llama", "anatomy": self.to_dict()} | OWN_FORM)
    monkeypatch.setattr(ModelConfig, "from_hf", classmethod(lambda cls, hf: cls.from_dict(hf["anatomy"])))


def coded(module: str):
    return None if module.endswith(".conv") else everywhere(4, 32)(module)


def journey(backend, seed: int = 0) -> np.ndarray:
    """Logits [n, vocab] on every way through a cache: ragged prompts that straddle chunks, steps, a chunk on one row's view, a fork, a
    place that is come back to, a step that is taken back, growth."""
    rng, found = np.random.default_rng(seed), []
    cache = backend.new_cache(4, 192)

    def keep(logits):
        found.append(logits.reshape(-1, logits.shape[-1]).copy())

    def tokens(*lengths):
        return [rng.integers(3, 380, length) for length in lengths]
    keep(decode.prefill(backend, cache.view(0, 3), tokens(23, 9, 64)))
    keep(decode.prefill(backend, cache.view(3, 4), tokens(130)))
    for step in tokens(*[4] * 3):
        keep(decode.step(backend, cache, step))
    keep(decode.logits(backend, *tokens(70), 65, cache.view(1, 2)))
    cache.fork(1, 0)
    keep(decode.step(backend, cache, *tokens(4)))
    places = [cache.snapshot(row) for row in range(4)]
    keep(decode.prefill(backend, cache, tokens(5, 3, 1, 8)))
    keep(decode.step(backend, cache, *tokens(4)))
    for row in (0, 2):
        cache.truncate(row, int(cache.lengths[row]) - 1)
    keep(decode.step(backend, cache, *tokens(4)))
    for row in (0, 1, 3):
        cache.restore(row, places[row])
    keep(decode.step(backend, cache.view(1, 4), *tokens(3)))
    cache.grow(256)
    keep(decode.prefill(backend, cache, tokens(2, 9, 1, 3)))
    cache.truncate(2, 0)
    keep(decode.prefill(backend, cache.view(2, 3), tokens(40)))
    return np.concatenate(found)
