"""Models that cannot be, one of each kind: a command ends with exit code 2 and one sentence that names what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EVERY_FAMILY, tiny_model
from test_published import copy, edit               # noqa: F401 (a fixture)

from models import get
from models.families import FAMILIES
from models.network.config import ModelConfig
from runtime.errors import UserError

FULL = "full_attention"
HUGE = 2**40
BAD = [     # family, keys of config.json, words
    ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention', which is not supported here"),
    ("lfm2", {"layer_types": ["conv", "rwkv", "conv"]}, "layer_types has 'rwkv'"),
    ("qwen3_5", {"layer_types": [FULL, None, FULL]}, "layer_types has None"),
    ("granite4_h", {"layer_types": ["mamba", "attention"]}, "layer_types names 2 of 3 layers"),
    ("olmo3", {"layer_types": [FULL] * 4}, "layer_types names 4 of 3 layers"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], which should be a 0 or 1 for each of 4 layers"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "layer 1 chooses 9 experts of 4 for a token"),
    ("granite4_tiny", {"num_experts_per_tok": 0}, "layer 0 chooses 0 experts of 4 for a token"),
    ("lfm2_moe", {"num_experts": 10**9}, "layer 1 has 1000000000 experts"), ("olmoe", {"num_experts": -1}, "has -1 experts"),
    ("gemma2", {"sliding_window": 0}, "sliding_window is 0"), ("olmo3", {"sliding_window": 0}, "sliding_window is 0"),
    ("gemma4", {"sliding_window": -4}, "sliding_window is -4"), ("phi3", {"sliding_window": 0}, "sliding_window is 0"),
    ("gemma3", {"rope_parameters": {FULL: {"rope_type": "spiral"}}}, "RoPE scaling 'spiral' is not supported: supported are none, linear"),
    ("ministral3", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "RoPE scaling 'mrope' is not supported"),
    ("gemma4", {"rope_parameters": {FULL: {"rope_type": []}}}, r"rope_type is \[\], which should be of type str"),
    ("gemma3", {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 0.0}}}, "rope_theta is 0.0, which should be positive"),
    ("qwen3_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "rope_theta is 1.0, which should be"),
    ("qwen3_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64.5}}, "is 64.5, which"),
    ("gemma4", {"vocab_size_per_layer_input": 300}, "vocab_size_per_layer_input is 300, which should be the vocab_size 384"),
    ("gemma4", {"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6, of 6 layers"),
    ("gemma4", {"attention_k_eq_v": True}, "attention_k_eq_v True is not supported: only False is"),
    ("gemma4", {"enable_moe_block": True}, "enable_moe_block True is not supported"),
    ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported: a decoder looks back only"),
    ("gemma4", {"per_layer_config": {"1": {"num_attention_heads": 2}}}, r"per_layer_config has \['num_attention_heads'\] for layer 1"),
    ("gemma4", {"per_layer_config": {"9": {"head_dim": 2}}}, "per_layer_config names layer '9' of 6"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention true is not supported"),
    ("granite4_h", {"mamba_proj_bias": True}, "mamba_proj_bias true is not supported"),
    ("granite4_h", {"mamba_n_heads": 0}, "mamba_n_heads 0 times mamba_d_head 32 is not mamba_expand times"),
    ("granite4_h", {"mamba_n_groups": 3}, "4 heads, which its 3 key/value heads do not divide"),
    ("granite4_h", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
    ("granite4_h", {"time_step_limit": [0.1, 0.2]}, r"time_step_limit \[0.1, 0.2\] is not supported"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported for olmo2"), ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate False is not supported"),
    ("qwen3_5", {"linear_allow_neg_eigval": True}, "linear_allow_neg_eigval True is not supported"),
    ("qwen3_5", {"linear_num_key_heads": 3}, "4 heads, which its 3 key/value heads do not divide"),
    ("qwen3_5", {"full_attention_interval": 0, "layer_types": None}, "full_attention_interval is 0, which should be at least 1"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ("qwen3_moe", {"mlp_only_layers": [7]}, r"mlp_only_layers is \[7\], which should be numbers of layers, from 0 to 2"),
    ("lfm2", {"block_multiple_of": 0}, "block_multiple_of is 0"), ("lfm2", {"conv_L_cache": 0}, "kernel of layer 0 is 0"),
    ("exaone4", {"sliding_window_pattern": "LXG", "layer_types": None}, "sliding_window_pattern 'LXG' is not supported"),
    ("hunyuan", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1e308}}, "alpha is 1e.308, which should be at most"),
    ("phi3", {"original_max_position_embeddings": 0, "rope_parameters": EVERY_FAMILY["phi3"][1]["rope_parameters"] | {
        "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
    ("phi3", {"original_max_position_embeddings": 32}, "original_max_position_embeddings is 32 and among the RoPE parameters 64"),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0.0, which should be positive"),
    ("ernie4_5", {"hidden_size": HUGE}, f"hidden_size is {HUGE}"), ("qwen3_5", {"linear_key_head_dim": 0}, "head_dim of layer 0 is 0"),
    ("gemma4", {"hidden_size_per_layer_input": HUGE}, f"per_layer_size is {HUGE}"),
    ("lfm2", {"model_type": "lfm3"}, "model_type 'lfm3' is not supported: its gate of one number for each head is not computed here"),
    ("gemma3", {"model_type": "gemma3n_text"}, r"'gemma3n_text' is not supported: its four streams \(AltUp\) are not computed"),
    ("granite4_h", {"model_type": "falcon_h1"}, "'falcon_h1' is not supported: its two mixers side by side"),
    ("llama", {"model_type": "minicpm3"}, r"'minicpm3' is not supported: its latent attention \(MLA\) is not computed here"),
    ("granite4_h", {"model_type": "nemotron_h"}, "'nemotron_h' is not supported: its layers of a single block each"),
    ("llama", {"model_type": "llama4"}, "model_type 'llama4' is not supported: supported are llama, mistral"),
]
BAD_TENSORS = [     # family, a change of the tensors, words
    ("olmoe", lambda held: drop(held, "experts.3.down_proj"), "lacks model.layers.0.moe.experts.3.down_proj.weight, model.layers.1.moe"),
    ("granite4_tiny", lambda held: cut(held, "input_linear", slice(3)), r"experts.0.gate_proj.weight has shape \[3, 128, 64\], where"),
    ("qwen3_moe", lambda held: cut(held, "mlp.gate.weight", slice(3)),
     r"moe.router.weight has shape \[3, 64\], where config.json asks for \[4, 64\]"),
    ("lfm2_moe", lambda held: drop(held, "expert_bias"), "lacks model.layers.1.moe.router_bias"),
    ("gemma4", lambda held: cut(held, "embed_tokens_per_layer", (slice(None), slice(160))),
     r"per_layer_embed.weight has shape \[384, 160\], where config.json asks for \[384, 192\]"),
    ("gemma4", lambda held: cut(held, "per_layer_model_projection", slice(160)), r"per_layer_projection.weight has shape \[160, 64\]"),
    ("qwen3_5", lambda held: drop(held, "A_log"), "lacks model.layers.0.linear_attn.A_log"),
    ("granite4_h", lambda held: cut(held, "mamba.in_proj", slice(-1)), r"mamba.z_proj.weight has shape \[323, 64\]"),
    ("phi3", lambda held: drop(held, "qkv_proj") | {            # a Llama's names, whose heads rotate in another order
        f"model.layers.{n}.self_attn.{part}_proj.weight": torch.zeros(rows, 64) for n in range(2) for part, rows in (
            ("q", 64), ("k", 32), ("v", 32))}, "lacks model.layers.0.self_attn.q_proj.weight"),
    ("gemma3", lambda held: held | {"vision_of_another.weight": torch.zeros(2)}, "has vision_of_another.weight, for which"),
]


def drop(held, part):
    return {name: tensor for name, tensor in held.items() if part not in name}


def cut(held, part, piece):
    return {name: tensor[piece].contiguous() if part in name else tensor for name, tensor in held.items()}


def refused(capsys, folder) -> str:
    """The sentence of a command that ends with exit code 2 and leaves nothing."""
    out, _ = folder.with_name("out"), capsys.readouterr()
    assert get.main([str(folder), "-o", str(out)]) == 2 and not out.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and str(folder) in message, message
    return message


@pytest.mark.parametrize("family, keys, words", BAD)
def test_a_configuration_that_cannot_be(family, keys, words, copy, capsys):        # noqa: F811
    folder = copy(family, **keys)
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    refused(capsys, folder)


@pytest.mark.parametrize("family, change, words", BAD_TENSORS)
def test_tensors_that_do_not_fit(family, change, words, copy, capsys):             # noqa: F811
    message = refused(capsys, copy(family, change))
    with pytest.raises(UserError, match=words):
        raise UserError(message)


def test_experts_missing_from_a_shard(tmp_path, capsys):
    tiny_model("olmoe").save_pretrained(tmp_path / "in", max_shard_size="100KB")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    index = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "in" / index["weight_map"][name]
    save_file({key: tensor for key, tensor in load_file(shard).items() if key != name} | {"one": torch.zeros(1)}, shard)
    assert f"{shard} lacks {name}, which model.safetensors.index.json puts there" in refused(capsys, tmp_path / "in")


# Any value in any key: a model or a sentence

ODD = [None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.5, 1e308, float("nan"), float("inf"), "x", "", [],
       [1], [None], ["x"] * 3, [0] * 6, [-1] * 3, {}, {"a": 1}, [FULL] * 2, [FULL] * 9]
ROPE = ("rope_theta", "factor", "alpha", "type", "rope_type", "partial_rotary_factor", "attention_factor", "beta_fast", "mscale",
        "truncate", "original_max_position_embeddings", "short_factor", "llama_4_scaling_beta")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_odd_values_in_every_key(family, bare):
    """bare: without the keys that say a layer's kind, so that the patterns behind them are read."""
    whole = json.loads(tiny_model(family).config.to_json_string())
    for key in ("layer_types", "no_rope_layers", "rope_parameters", "per_layer_config") if bare else ():
        whole.pop(key, None)
    table = FAMILIES[whole["model_type"]]
    paths = [(key,) for key in sorted({*whole, *table.read, *table.biases, *table.aliases})]
    for outer in ("rope_parameters", "per_layer_config"):
        held = whole.get(outer) or {}
        paths += [(outer, key) for key in sorted({*held, *ROPE})]
        paths += [(outer, key, inner) for key in held if isinstance(held[key], dict) for inner in sorted({*held[key], *ROPE})]
    for number, path in enumerate(paths):
        for value in ODD[number % 3::3]:
            changed = owner = json.loads(json.dumps(whole))
            for key in path[:-1]:
                owner = owner[key] if isinstance(owner.get(key), dict) else owner.setdefault(key, {})
            owner[path[-1]] = value
            try:
                config = ModelConfig.from_hf(changed)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
            else:
                assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
