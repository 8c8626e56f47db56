"""Gemma 4 (text, E2B and E4B): inputs of every layer by token, layers that read another's keys and values, two sizes of heads."""

from dataclasses import replace

from models.families.family import Family, take
from models.families.gemma import KEYS, SANDWICH, embedding_factors, every
from models.formats.weight_names import Naming
from models.network.config import LayerConfig, ModelConfig, Rope
from runtime.errors import UserError

_NAMES = SANDWICH | {"per_layer_gate": "per_layer_input_gate", "per_layer_proj": "per_layer_projection",
                     "post_per_layer_norm": "post_per_layer_input_norm", "per_layer_embed": "embed_tokens_per_layer",
                     "per_layer_projection": "per_layer_model_projection", "per_layer_norm": "per_layer_projection_norm"}


def _factors(hf: dict, config: ModelConfig) -> dict[str, float]:
    """A token's own input is (norm(W e / sqrt(hidden)) + E sqrt(size)) / sqrt(2); the large table E is left as it is, and what all of
    it is multiplied by goes into the linear that reads it."""
    own = config.per_layer_size**0.5 or 1.0
    return embedding_factors(hf, config) | {"per_layer_projection": config.hidden_size**-0.5, "per_layer_norm": 1 / own,
                                            "per_layer_proj": own * 2**-0.5}


def _more(hf: dict, shape: dict) -> dict:
    layers, count = shape["layers"], len(shape["layers"])
    shared, wide = take(hf, "num_kv_shared_layers", int, 0), take(hf, "use_double_wide_mlp", bool, False)
    if (sees := take(hf, "use_bidirectional_attention", str, None)) not in (None, "vision"):        # vision: within an image
        raise UserError(f"use_bidirectional_attention {sees!r:.40} is not supported: a decoder looks back only")
    if not 0 <= shared < count:
        raise UserError(f"num_kv_shared_layers is {shared}, of {count} layers")
    listed = take(hf, "per_layer_config", dict, {})
    told = {number: take(listed, str(number), dict, {}) for number in range(count)} if listed else {}
    if strays := set(listed) - {str(number) for number in told}:
        raise UserError(f"per_layer_config names layer {min(strays)!r:.40} of {count}")
    full = {"head_dim": take(hf, "global_head_dim", int, 512)}
    made: list[LayerConfig] = []
    for number, layer in enumerate(layers):
        sees_all = layer.sliding_window == 0 or shape["sliding_window"] is None
        own = told.get(number, {}) if told else full if sees_all else {}
        if unknown := set(own) - {"head_dim", "num_key_value_heads"}:
            raise UserError(f"per_layer_config has {sorted(unknown)} for layer {number}, which is not supported")
        size = take(own, "head_dim", int, shape["head_dim"])
        layer = replace(layer, head_dim=None if size == shape["head_dim"] else size,
                        kv_heads=take(own, "num_key_value_heads", int, layer.kv_heads))
        if number >= count - shared:
            alike = [n for n, other in enumerate(made[:count - shared]) if (other.sliding_window == 0) == (layer.sliding_window == 0)]
            if not alike:
                raise UserError(f"layer {number} shares the keys of an earlier layer of its kind, and there is none")
            layer = replace(layer, cache_source=alike[-1], mlp_size=layer.mlp_size * (2 if wide else 1))
        made.append(layer)
    size = take(hf, "hidden_size_per_layer_input", int, 256)
    if size and (rows := take(hf, "vocab_size_per_layer_input", int, 262144)) != hf.get("vocab_size"):
        raise UserError(f"vocab_size_per_layer_input is {rows}, which should be the vocab_size {hf.get('vocab_size')}")
    return {"layers": tuple(made), "per_layer_size": size, "attention_scale": 1.0}


def _back(config: ModelConfig) -> dict:
    """The double width is a sharing layer's; where no layer shares, or widths are alike, it is off."""
    shared = [layer for layer in config.layers if layer.cache_source is not None]
    plain = max(layer.mlp_size for layer in config.layers if layer.cache_source is None)
    full = next((layer for layer in config.layers if config.window(layer) is None), None)
    return {"num_kv_shared_layers": len(shared), "use_double_wide_mlp": bool(shared) and shared[0].mlp_size == 2 * plain,
            "intermediate_size": plain, "global_head_dim": config.head_size(full) if full else config.head_dim,
            "hidden_size_per_layer_input": config.per_layer_size, "vocab_size_per_layer_input": config.vocab_size}


FAMILIES = {
    "gemma4_text": Family(
        "Gemma4ForCausalLM", {name: entry for name, entry in KEYS.items() if name != "attention_softcap"},
        Naming(_NAMES, factors=_factors),
        fixed={"norm_order": "both", "qk_norm": True, "v_norm": True, "layer_scalar": True}, biases=("attention_bias",), kv_heads=4,
        head_dim=256, window="always", window_size=512, pattern=every(6), tied=True, partial=1.0,
        nested={"full_attention": Rope(1e6, {"rope_type": "proportional", "factor": 1.0}, 0.25), "sliding_attention": Rope(1e4)},
        only={"attention_k_eq_v": False, "enable_moe_block": False},
        reads=frozenset({"hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp",
                         "per_layer_config", "global_head_dim", "num_global_key_value_heads", "use_bidirectional_attention"}),
        more=_more, back=_back)}
