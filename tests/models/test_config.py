"""ModelConfig against transformers' own configurations, and every contradiction it refuses."""

import json

import pytest
from tiny import FAMILIES, tiny_model

from models.config import LayerConfig, ModelConfig
from runtime.errors import UserError

LLAMA = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
GPT2 = dict(model_type="gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes_and_writes_what_it_reads(family):
    published = tiny_model(family).config
    config = ModelConfig.from_hf(json.loads(published.to_json_string()))
    assert config.vocab_size == published.vocab_size and len(config.layers) == published.num_hidden_layers
    assert config.layers[0].heads == published.num_attention_heads
    again = type(published)(**config.to_hf())
    assert ModelConfig.from_hf(again.to_dict()) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rope_theta_in_either_spelling():
    old = ModelConfig.from_hf(LLAMA | {"rope_theta": 500000.0, "rope_scaling": {
        "type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192}})
    new = ModelConfig.from_hf(LLAMA | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}})
    assert old == new and old.rope_theta == 500000.0 and old.rope_scaling["factor"] == 8.0
    written = old.to_hf()                     # either generation of transformers finds it
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500000.0
    assert written["rope_scaling"]["rope_type"] == "llama3"


def test_layers_of_different_shapes_round_trip():
    layers = (LayerConfig(4, 2, 48), LayerConfig(2, 1, 40))
    config = ModelConfig.from_hf(LLAMA | {"edgewright_layers": [[4, 2, 48], [2, 1, 40]]})
    assert config.layers == layers and not config.uniform and config.head_dim == 8
    assert ModelConfig.from_hf(config.to_hf()) == config
    gpt2 = ModelConfig.from_hf(GPT2 | {"edgewright_layers": [[3, 3, 128], [4, 4, 100]]})
    assert ModelConfig.from_hf(gpt2.to_hf()) == gpt2 and gpt2.head_dim == 8 and not gpt2.publishable
    assert "edgewright_layers" not in ModelConfig.from_hf(LLAMA).to_hf()


def test_what_a_family_cannot_express_is_not_written():
    config = ModelConfig.from_hf(LLAMA)
    for family in ("gpt2", "qwen3", "nonesuch"):
        with pytest.raises(ValueError, match=family):
            ModelConfig.from_dict(config.to_dict() | {"family": family}).to_hf()


def test_sliding_windows():
    qwen = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}
    assert ModelConfig.from_hf(qwen | {"max_window_layers": 0}).sliding_window == 16
    assert ModelConfig.from_hf(qwen | {"max_window_layers": 2}).sliding_window is None
    assert ModelConfig.from_hf(qwen | {"use_sliding_window": False}).sliding_window is None
    with pytest.raises(UserError, match="full_attention.*sliding_attention"):
        ModelConfig.from_hf(qwen | {"max_window_layers": 1})
    mistral = LLAMA | {"model_type": "mistral"}
    assert ModelConfig.from_hf(mistral).sliding_window == 4096
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mamba"}, "'mamba'.*supported are llama, mistral, qwen2, qwen3, gpt2"),
    ({"model_type": None}, "None is not supported"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"num_hidden_layers": 0}, "number of layers is 0"),
    ({"num_hidden_layers": 10**9}, "number of layers is 1000000000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "3 key/value heads"),
    ({"num_key_value_heads": -2}, "kv_heads of layer 0 is -2"),
    ({"head_dim": 7}, "head_dim is 7.*even"),
    ({"intermediate_size": True}, "intermediate_size is True"),
    ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"rms_norm_eps": 0}, "norm_eps is 0"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                       "original_max_position_embeddings": 64}}, "low_freq_factor below"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"eos_token_id": "2"}, "eos_token_id is '2'"),
    ({"edgewright_layers": [[4, 2, 48]]}, "describes 1 layers of 2"),
    ({"edgewright_layers": [[4, 2, 48], [4, 2]]}, r"\[4, 2\]"),
    ({"edgewright_layers": [[4, 2, 48], [4, 2, -1]]}, "mlp_size of layer 1 is -1"),
])
def test_contradictions_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize("change, words", [
    ({"n_head": 5}, "n_head 5"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"add_cross_attention": True}, "add_cross_attention"),
])
def test_gpt2_variants_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(GPT2 | change)


@pytest.mark.parametrize("change", [{"surprise": 1}, {"layers": [{"heads": 4}]}, {"layers": None}])
def test_a_manifest_that_does_not_fit_is_refused(change):
    with pytest.raises(UserError, match="model configuration"):
        ModelConfig.from_dict(ModelConfig.from_hf(LLAMA).to_dict() | change)
