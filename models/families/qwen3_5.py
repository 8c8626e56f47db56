"""Qwen3.5, dense, text: three gated delta rules (Gated DeltaNet) for each attention, whose output is gated and a quarter rotates."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family, kinds_of, take, whole
from models.formats.weight_names import Naming
from models.network.config import ModelConfig

_NAMES = {"linear_attn.qkv_proj": "linear_attn.in_proj_qkv", "linear_attn.z_proj": "linear_attn.in_proj_z",
          "linear_attn.b_proj": "linear_attn.in_proj_b", "linear_attn.a_proj": "linear_attn.in_proj_a",
          "linear_attn.conv": "linear_attn.conv1d", "self_attn.g_proj": "self_attn.q_proj"}
_GAINS = ("norm", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_SIZES = {"heads": ("linear_num_value_heads", 32), "kv_heads": ("linear_num_key_heads", 16), "head_dim": ("linear_key_head_dim", 128),
          "state_dim": ("linear_value_head_dim", 128), "kernel": ("linear_conv_kernel_dim", 4)}


def _more(hf: dict, shape: dict) -> dict:
    every = whole(hf, "full_attention_interval", 4)
    kinds = kinds_of(hf, len(shape["layers"]), ("full_attention", "linear_attention"), lambda hf, count: [
        "full_attention" if (number + 1) % every == 0 else "linear_attention" for number in range(count)])
    delta = {name: take(hf, key, int, default) for name, (key, default) in _SIZES.items()} | {"mixer": "delta", "rope": -1}
    return {"layers": tuple(replace(layer, **(delta if kind == "linear_attention" else {})) for layer, kind in zip(shape["layers"], kinds))}


def _back(config: ModelConfig) -> dict:
    attention = [layer for layer in config.layers if layer.mixer == "attention"]
    delta = next((layer for layer in config.layers if layer.mixer == "delta"), None)
    sizes = {} if delta is None else {key: getattr(delta, name) for name, (key, _) in _SIZES.items()} | {
        "linear_key_head_dim": config.head_size(delta)}
    return sizes | {"layer_types": ["full_attention" if layer.mixer == "attention" else "linear_attention" for layer in config.layers],
                    "num_attention_heads": max((layer.heads for layer in attention), default=1),
                    "num_key_value_heads": max((layer.kv_heads for layer in attention), default=1)}


FAMILIES = {
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM", LLAMA_KEYS, Naming(_NAMES, less_one=_GAINS), fixed={"qk_norm": True, "attention_gate": True},
        biases=("attention_bias",), kv_heads=4, head_dim=256, partial=0.25, hybrid=True, unseen=("mrope_section", "mrope_interleaved"),
        only={"attn_output_gate": True}, reads=frozenset({"full_attention_interval"} | {key for key, _ in _SIZES.values()}),
        more=_more, back=_back)}
