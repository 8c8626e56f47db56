"""Llama (SmolLM and SmolLM2 too), Mistral, Ministral 3, Qwen2, Qwen3, SmolLM3, HunYuan and Ernie 4.5: one anatomy with small differences."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family, take, whole
from models.formats.weight_names import Naming
from runtime.errors import UserError

ERNIE_KEYS = {name: entry for name, entry in LLAMA_KEYS.items() if name != "norm_eps"} | {"norm_eps": ("rms_norm_eps", float, 1e-5)}


def _without_positions(hf: dict, shape: dict) -> dict:
    """SmolLM3: no_rope_layers has 1 where a layer rotates and 0 where it does not; by default every fourth does not."""
    count, every = len(shape["layers"]), whole(hf, "no_rope_layer_interval", 4)
    told = take(hf, "no_rope_layers", list, None)
    told = [int((number + 1) % every != 0) for number in range(count)] if told is None else told
    if len(told) != count or any(type(one) not in (int, bool) or one not in (0, 1) for one in told):
        raise UserError(f"no_rope_layers is {told!r:.60}, which should be a 0 or 1 for each of {count} layers")
    return {"layers": tuple(replace(layer, rope=0 if one else -1) for layer, one in zip(shape["layers"], told))}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA_KEYS, biases=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", LLAMA_KEYS, kv_heads=8, window="always"),
    "ministral3": Family("Ministral3ForCausalLM", LLAMA_KEYS, kv_heads=8, head_dim=128, window="always", window_size=None),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_KEYS, fixed={"attention_bias": True}, kv_heads=32, window="asked"),
    "qwen3": Family("Qwen3ForCausalLM", LLAMA_KEYS, fixed={"qk_norm": True}, biases=("attention_bias",), kv_heads=32, head_dim=128,
                    window="asked"),
    "smollm3": Family("SmolLM3ForCausalLM", LLAMA_KEYS, biases=("attention_bias", "mlp_bias"), kv_heads=4, window="asked", tied=True,
                      theta=2e6, reads=frozenset({"no_rope_layers", "no_rope_layer_interval"}), more=_without_positions,
                      back=lambda config: {"no_rope_layers": [int(layer.rope >= 0) for layer in config.layers]}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM", LLAMA_KEYS | {"norm_eps": ("rms_norm_eps", float, 1e-5)},
                               Naming({"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}),
                               fixed={"qk_norm": True, "qk_norm_last": True}, biases=("attention_bias",)),
    "ernie4_5": Family("Ernie4_5ForCausalLM", ERNIE_KEYS, Naming(interleaved=True), kv_heads=2, head_dim=128, tied=True, theta=5e5,
                       reads=frozenset({"use_bias"}),
                       more=lambda hf, shape: dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), take(hf, "use_bias", bool, False)),
                       back=lambda config: {"use_bias": config.mlp_bias}),
}
