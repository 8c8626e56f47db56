"""LFM2 and LFM2.5, dense and with experts: short convolutions, and attention in some layers."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family, kinds_of, numbers, positive, take, whole
from models.formats.weight_names import Naming
from models.network.config import LayerConfig, ModelConfig

_KEYS = {name: entry for name, entry in LLAMA_KEYS.items() if name not in ("activation", "norm_eps")} | {
    "norm_eps": ("norm_eps", float, 1e-5)}
_NAMES = {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm", "norm": "embedding_norm",
          "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
          "self_attn.o_proj": "self_attn.out_proj", "self_attn.q_norm": "self_attn.q_layernorm",
          "self_attn.k_norm": "self_attn.k_layernorm", "conv.conv": "conv.conv", "moe.router": "feed_forward.gate",
          "moe.router_bias": "feed_forward.expert_bias", "moe.experts.{e}.gate_proj": "feed_forward.experts.{e}.w1",
          "moe.experts.{e}.up_proj": "feed_forward.experts.{e}.w3", "moe.experts.{e}.down_proj": "feed_forward.experts.{e}.w2"}
_FUSED = (("conv.in_proj", ("conv.b_proj", "conv.c_proj", "conv.x_proj")),)


def _width(hf: dict) -> int:
    """An MLP's width, which by default is not the one that is written, but two thirds of it, rounded up."""
    size = take(hf, "block_ff_dim", int, None)
    size = take(hf, "intermediate_size", int, 12288) if size is None else size
    if not take(hf, "block_auto_adjust_ff_dim", bool, True):
        return size
    step = whole(hf, "block_multiple_of", 256)
    return -(-int(min(positive(hf, "block_ffn_dim_multiplier", 1.0), 1e6) * int(2 * size / 3)) // step) * step


def _layers(hf: dict, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    def pattern(hf: dict, count: int) -> list[str]:
        full = numbers(hf, "full_attn_idxs", count)
        return ["full_attention" if full is None or number in full else "conv" for number in range(count)]
    kinds = kinds_of(hf, len(layers), ("full_attention", "conv"), pattern)
    conv = {"mixer": "conv", "heads": 0, "kv_heads": 0, "kernel": take(hf, "conv_L_cache", int, 3), "rope": -1}
    return tuple(replace(layer, **(conv if kind == "conv" else {})) for layer, kind in zip(layers, kinds))


def _dense(hf: dict, shape: dict) -> dict:
    layers = tuple(replace(layer, mlp_size=_width(hf)) for layer in shape["layers"])
    return {"layers": _layers(hf, layers), "conv_bias": take(hf, "conv_bias", bool, False)}


def _sparse(hf: dict, shape: dict) -> dict:
    experts = {"experts": take(hf, "num_experts", int, 32), "experts_per_token": take(hf, "num_experts_per_tok", int, 4),
               "mlp_size": take(hf, "moe_intermediate_size", int, 1792)}
    dense = whole(hf, "num_dense_layers", 2, 0)
    layers = tuple(replace(layer, **(experts if number >= dense else {})) for number, layer in enumerate(shape["layers"]))
    return {"layers": _layers(hf, layers), "conv_bias": take(hf, "conv_bias", bool, False), "router": "sigmoid",
            "router_bias": take(hf, "use_expert_bias", bool, True), "router_normalized": take(hf, "norm_topk_prob", bool, True)}


def _factors(hf: dict, config: ModelConfig) -> dict[str, float]:
    return {"moe.experts.{e}.down_proj": positive(hf, "routed_scaling_factor", 1.0)}


def _back(config: ModelConfig) -> dict:
    attention = [layer for layer in config.layers if layer.mixer == "attention"]
    conv = next((layer for layer in config.layers if layer.mixer == "conv"), None)
    found = {"layer_types": ["conv" if layer.mixer == "conv" else "full_attention" for layer in config.layers],
             "conv_bias": config.conv_bias, "conv_L_cache": conv.kernel if conv else 3,
             "num_attention_heads": max((layer.heads for layer in attention), default=1),
             "num_key_value_heads": max((layer.kv_heads for layer in attention), default=1)}
    if config.family == "lfm2":
        return found | {"block_auto_adjust_ff_dim": False, "block_ff_dim": config.layers[0].mlp_size}
    sparse = [layer for layer in config.layers if layer.experts]
    return found | {"num_dense_layers": len(config.layers) - len(sparse), "use_expert_bias": config.router_bias,
                    "norm_topk_prob": config.router_normalized, "routed_scaling_factor": 1.0,
                    "num_experts": sparse[0].experts if sparse else 1, "num_experts_per_tok": sparse[0].experts_per_token if sparse else 1,
                    "moe_intermediate_size": sparse[0].mlp_size if sparse else 1,
                    "intermediate_size": next((layer.mlp_size for layer in config.layers if not layer.experts), 1)}


_READS = frozenset({"conv_L_cache", "conv_bias", "full_attn_idxs", "block_ff_dim", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
                    "block_multiple_of", "tie_embedding"})
_MOE = frozenset({"num_experts", "num_experts_per_tok", "num_dense_layers", "moe_intermediate_size", "use_expert_bias", "norm_topk_prob",
                  "routed_scaling_factor"})
_COMMON = dict(fixed={"qk_norm": True}, kv_heads=8, tied=True, theta=1e6, hybrid=True, back=_back,
               aliases={"tie_embedding": "tie_word_embeddings"})
FAMILIES = {
    "lfm2": Family("Lfm2ForCausalLM", _KEYS, Naming(_NAMES, _FUSED), reads=_READS, more=_dense, **_COMMON),
    "lfm2_moe": Family("Lfm2MoeForCausalLM", _KEYS, Naming(_NAMES, _FUSED, factors=_factors), reads=_READS | _MOE, more=_sparse,
                       **_COMMON)}
