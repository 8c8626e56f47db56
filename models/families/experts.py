"""Qwen3-MoE and OLMoE: mixtures of experts in place of the MLPs."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family, numbers, take, whole
from models.formats.weight_names import Naming
from models.network.config import ModelConfig

_NAMES = {"moe.router": "mlp.gate"} | {f"moe.experts.{{e}}.{part}": f"mlp.experts.{{e}}.{part}"
                                       for part in ("gate_proj", "up_proj", "down_proj")}


def _qwen(hf: dict, shape: dict) -> dict:
    step, plain = whole(hf, "decoder_sparse_step", 1), numbers(hf, "mlp_only_layers", len(shape["layers"]), [])
    experts = whole(hf, "num_experts", take(hf, "num_local_experts", int, 128), 0)
    sparse = {"experts": experts, "experts_per_token": take(hf, "num_experts_per_tok", int, 8),
              "mlp_size": take(hf, "moe_intermediate_size", int, 768)}
    layers = tuple(replace(layer, **(sparse if number not in plain and experts > 0 and (number + 1) % step == 0 else {}))
                   for number, layer in enumerate(shape["layers"]))
    return {"layers": layers, "router_normalized": take(hf, "norm_topk_prob", bool, False)}


def _qwen_keys(config: ModelConfig) -> dict:
    sparse = next((layer for layer in config.layers if layer.experts), None)
    return _keys(config) | {"mlp_only_layers": [number for number, layer in enumerate(config.layers) if not layer.experts],
                            "decoder_sparse_step": 1, "moe_intermediate_size": sparse.mlp_size if sparse else 1,
                            "intermediate_size": next((layer.mlp_size for layer in config.layers if not layer.experts), 1)}


def _olmoe(hf: dict, shape: dict) -> dict:
    chosen = {"experts": take(hf, "num_experts", int, 64), "experts_per_token": take(hf, "num_experts_per_tok", int, 8)}
    return {"layers": tuple(replace(layer, **chosen) for layer in shape["layers"]),
            "router_normalized": take(hf, "norm_topk_prob", bool, False)}


def _keys(config: ModelConfig) -> dict:
    sparse = next((layer for layer in config.layers if layer.experts), None)
    return {"num_experts": sparse.experts if sparse else 1, "num_experts_per_tok": sparse.experts_per_token if sparse else 1,
            "norm_topk_prob": config.router_normalized}


_READS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"})
FAMILIES = {
    "qwen3_moe": Family("Qwen3MoeForCausalLM", LLAMA_KEYS, Naming(_NAMES), fixed={"qk_norm": True}, biases=("attention_bias",), kv_heads=4,
                        window="asked", pattern=lambda hf, count: ["sliding_attention"] * count, more=_qwen,
                        reads=_READS | {"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"}, back=_qwen_keys),
    "olmoe": Family("OlmoeForCausalLM", LLAMA_KEYS | {"norm_eps": ("rms_norm_eps", float, 1e-5)}, Naming(_NAMES),
                    fixed={"qk_norm": True, "qk_norm_over": "all"}, biases=("attention_bias",), kv_heads=16,
                    reads=_READS, more=_olmoe, back=_keys)}
