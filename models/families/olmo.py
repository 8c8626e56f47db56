"""OLMo 2 and 3, EXAONE 4: norms after the blocks alone, and norms of queries and keys."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family
from models.families.gemma import every
from models.formats.weight_names import Naming
from models.network.config import Rope
from runtime.errors import UserError

_AFTER = Naming({"post_mixer_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"})
_KEYS = LLAMA_KEYS | {"norm_eps": ("rms_norm_eps", float, 1e-5)}
_OLMO = {"norm_order": "post", "qk_norm": True, "qk_norm_over": "all"}


def _global_layers(hf: dict, shape: dict) -> dict:
    """EXAONE 4: with a window, only the layers that have it rotate."""
    if shape["sliding_window"] is None:
        return {}
    return {"layers": tuple(replace(layer, rope=-1 if layer.sliding_window == 0 else 0) for layer in shape["layers"])}


def _pattern(hf: dict, count: int) -> list[str]:
    """sliding_window_pattern is the number of layers after which one sees everything, or letters, L (window) and G."""
    told = hf.get("sliding_window_pattern")
    if not isinstance(told, str):
        return every(4, "sliding_window_pattern")(hf, count)
    if not told or set(told) - set("LG"):
        raise UserError(f"sliding_window_pattern {told!r} is not supported: supported are a number and letters L and G")
    return ["sliding_attention" if told[number % len(told)] == "L" else "full_attention" for number in range(count)]


FAMILIES = {
    "olmo2": Family("Olmo2ForCausalLM", _KEYS, _AFTER, _OLMO, biases=("attention_bias",)),
    "olmo3": Family("Olmo3ForCausalLM", _KEYS, _AFTER, _OLMO, biases=("attention_bias",), window="always", pattern=every(4), theta=5e5,
                    nested={"full_attention": Rope(5e5), "sliding_attention": Rope(5e5)}, local="rope_theta"),
    "exaone4": Family("Exaone4ForCausalLM", _KEYS, _AFTER, {"norm_order": "post", "qk_norm": True}, kv_heads=32, window="always",
                      pattern=_pattern, reads=frozenset({"sliding_window_pattern"}), more=_global_layers)}
