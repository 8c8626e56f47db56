"""ModelConfig against transformers' own configurations, and every contradiction it refuses."""

import json

import pytest
import torch
from tiny import EVERY_FAMILY, tiny_model
from transformers import AutoModelForCausalLM

from models.checkpoint import load_decoder
from models.network.config import LayerConfig, ModelConfig
from runtime.errors import UserError

LLAMA = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
GPT2 = dict(model_type="gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_reads_what_transformers_writes_and_writes_what_it_reads(family):
    published = tiny_model(family).config
    config = ModelConfig.from_hf(json.loads(published.to_json_string()))
    assert config.vocab_size == published.vocab_size and len(config.layers) == published.num_hidden_layers
    assert max(layer.heads for layer in config.layers if layer.mixer == "attention") == published.num_attention_heads
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


def test_a_pad_of_minus_one_is_none():
    assert ModelConfig.from_hf(LLAMA | {"pad_token_id": -1}).pad_token_id is None


ABSENT = object()


@pytest.mark.parametrize("family, made_with, changes", [
    ("llama", {}, {"rope_scaling": "the same", "rope_theta": 10000.0}),
    ("llama", {}, {"rope_parameters": ABSENT, "rope_scaling": "the same"}),
    ("smollm2", {}, {"rope_parameters": ABSENT, "rope_theta": 500.0}),
    ("smollm2", {}, {"rope_parameters": {"rope_theta": 500.0}}),
    ("smollm2", {"attention_bias": True, "mlp_bias": True}, {}),
    ("smollm2", {"hidden_act": "gelu_pytorch_tanh"}, {"num_key_value_heads": 2, "rms_norm_eps": ABSENT}),
    ("smollm2", {}, {"pretraining_tp": 2, "rope_interleaved": False, "attention_dropout": 0.5, "is_causal": True,
                     "final_logit_softcapping": None, "layer_types": ["full_attention"] * 2}),
    ("mistral", {"num_attention_heads": 16, "num_key_value_heads": 8}, {"num_key_value_heads": ABSENT}),
    ("mistral", {}, {"sliding_window": None}),
    ("qwen2", {}, {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    ("qwen2", {}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": ABSENT}),
    ("qwen3", {"attention_bias": True}, {"use_sliding_window": False, "sliding_window": 8}),
    ("qwen3", {}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}),
    ("gpt2", {"n_inner": 96, "layer_norm_epsilon": 1e-3}, {"reorder_and_upcast_attn": True}),
    ("gpt2", {}, {"num_attention_heads": 4, "hidden_size": 64, "n_head": ABSENT, "n_embd": ABSENT}),
])
def test_what_the_keys_say_is_computed_as_transformers_computes_it(family, made_with, changes, tmp_path):
    tiny_model(family, **made_with).save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    same = {key: value for key, value in (hf.get("rope_parameters") or {}).items() if key != "rope_theta"}
    hf = {k: same if v == "the same" else v for k, v in (hf | changes).items() if v is not ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(load_decoder(tmp_path)(ids), theirs, rtol=1e-4, atol=1e-4)


def test_a_missing_window_is_the_families_default():
    qwen = LLAMA | {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}
    assert ModelConfig.from_hf(qwen).sliding_window == 4096
    assert ModelConfig.from_hf(qwen | {"sliding_window": None}).sliding_window is None


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
    mixed = ModelConfig.from_hf(qwen | {"max_window_layers": 1})
    assert [mixed.window(layer) for layer in mixed.layers] == [None, 16]
    mistral = LLAMA | {"model_type": "mistral"}
    assert ModelConfig.from_hf(mistral).sliding_window == 4096
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mamba"}, "'mamba'.*supported are llama, mistral, .*qwen3_5_text"),
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
    ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "RoPE scaling 'spiral'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0.0}}, "scaling's factor is 0.0"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}}, "short_factor should be 4"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                       "original_max_position_embeddings": 64}}, "low_freq_factor below"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor 0"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}, "mrope_section"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "factor 4.0"),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta is 10000.0 and within"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "llama3"}}, "disagree in rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has"),
    ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention, and the sliding window is None"),
    ({"layer_types": ["full_attention"]}, "1 of 2 layers"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 2, "sliding_window": 8}, "the sliding window is 8"),
    ({"sliding_window": 8}, "sliding_window 8 is not supported for llama"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"), ({"final_logit_softcapping": 30.0}, "softcapping"),
    ({"logits_soft_cap": 30}, "logits_soft_cap"), ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"logits_scaling": 8.0}, "logits_scaling"), ({"logit_scale": 0.0625}, "logit_scale"), ({"clip_qkv": 8.0}, "clip_qkv"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"), ({"use_qk_norm": True}, "use_qk_norm"),
    ({"use_parallel_residual": True}, "use_parallel_residual"), ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ({"rope_interleaved": True}, "rope_interleaved"), ({"num_local_experts": 8}, "num_local_experts"),
    ({"scale_emb": 12, "dim_model_base": 256}, "scale_emb"), ({"is_causal": False}, "is_causal False"),
    ({"attention_chunk_size": 64}, "attention_chunk_size"), ({"model_type": "qwen2", "use_logn_attn": True}, "use_logn_attn"),
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
    ({"num_attention_heads": 2}, "n_head is 4 and num_attention_heads, which means the same, 2"),
    ({"position_embedding_type": "rotary"}, "position_embedding_type"), ({"logit_scale": 2.0}, "logit_scale"),
])
def test_gpt2_variants_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(GPT2 | change)


@pytest.mark.parametrize("change", [{"surprise": 1}, {"layers": [{"heads": 4}]}, {"layers": None}])
def test_a_manifest_that_does_not_fit_is_refused(change):
    with pytest.raises(UserError, match="model configuration"):
        ModelConfig.from_dict(ModelConfig.from_hf(LLAMA).to_dict() | change)
