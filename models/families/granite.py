"""Granite 3, and Granite 4 with its Mamba-2 layers and mixtures of experts: four constant multipliers, all folded into the weights."""

from dataclasses import replace

from models.families.family import LLAMA_KEYS, Family, kinds_of, positive, take
from models.formats.weight_names import Naming
from models.network.config import ModelConfig
from runtime.errors import UserError

_MULTIPLIERS = frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"})
_WRITERS = ("self_attn.o_proj", "mamba.out_proj", "mlp.down_proj", "moe.experts.{e}.down_proj", "moe.shared.down_proj")
_HYBRID = {"moe.router": "block_sparse_moe.router.layer",
           "moe.experts.{e}.down_proj": "block_sparse_moe.output_linear.weight", "moe.shared.down_proj": "shared_mlp.output_linear",
           "mlp.down_proj": "shared_mlp.output_linear", "mamba.conv": "mamba.conv1d"}
_HYBRID_FUSED = (("mamba.in_proj", ("mamba.z_proj", "mamba.xbc_proj", "mamba.dt_proj")),
                 ("block_sparse_moe.input_linear.weight", ("moe.experts.{e}.gate_proj", "moe.experts.{e}.up_proj")),
                 ("shared_mlp.input_linear", ("mlp.gate_proj", "mlp.up_proj")),
                 ("shared_mlp.input_linear", ("moe.shared.gate_proj", "moe.shared.up_proj")))


def _factors(hf: dict, config: ModelConfig) -> dict[str, float]:
    """Where the multipliers go: the embedding's into the table (and out of a tied head through the final norm), the residual's into
    what writes to the stream, the logits' into the final norm."""
    table, residual, logits = (positive(hf, key, 1.0) for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"))
    return {"embed_tokens": table, "norm": 1 / logits / (table if config.tied_embeddings else 1.0)} | dict.fromkeys(_WRITERS, residual)


def _scale(hf: dict, shape: dict) -> dict:
    for key in _MULTIPLIERS:
        positive(hf, key, 1.0)
    return {"attention_scale": positive(hf, "attention_multiplier", 1.0)}


def _neutral(config: ModelConfig) -> dict:
    return {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
            "attention_multiplier": config.scale(config.layers[0])}


def _hybrid(hf: dict, shape: dict) -> dict:
    """Layers of attention or Mamba-2, each with a plain MLP, or experts beside one that all tokens pass."""
    layers = shape["layers"]
    kinds = kinds_of(hf, len(layers), ("full_attention", "linear_attention"), lambda hf, count: ["linear_attention"] * count)
    positions = take(hf, "position_embedding_type", str, "nope")
    if positions not in ("rope", "nope"):
        raise UserError(f"position_embedding_type {positions!r} is not supported: supported are rope and nope")
    for key in ("mamba_proj_bias",):
        if take(hf, key, bool, False):
            raise UserError(f"{key} true is not supported: only false is")
    experts, shared = take(hf, "num_local_experts", int, 8), take(hf, "shared_intermediate_size", int, 1024)
    size = {"experts": experts, "experts_per_token": take(hf, "num_experts_per_tok", int, 2) if experts else 0,
            "shared_size": shared if experts else 0, "mlp_size": layers[0].mlp_size if experts else shared}
    mamba = {"mixer": "mamba", "heads": take(hf, "mamba_n_heads", int, 128), "kv_heads": take(hf, "mamba_n_groups", int, 1),
             "state_dim": take(hf, "mamba_d_state", int, 256), "kernel": take(hf, "mamba_d_conv", int, 4), "rope": -1}
    inner, head = take(hf, "mamba_expand", int, 2) * shape["hidden_size"], hf.get("mamba_d_head", "auto")
    mamba["head_dim"] = inner // max(mamba["heads"], 1) if head == "auto" else take(hf, "mamba_d_head", int)
    if mamba["heads"] * mamba["head_dim"] != inner and "linear_attention" in kinds:
        raise UserError(f"mamba_n_heads {mamba['heads']} times mamba_d_head {mamba['head_dim']} is not mamba_expand times the hidden "
                        f"size, {inner}")
    limit = hf.get("time_step_limit")
    if limit not in (None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], (0.0, float("inf"))):
        raise UserError(f"time_step_limit {limit} is not supported: only none is")
    bias = take(hf, "mamba_conv_bias", bool, True)
    attention = {"rope": 0 if positions == "rope" else -1}
    made = tuple(replace(layer, **size, **(mamba if kind == "linear_attention" else attention)) for layer, kind in zip(layers, kinds))
    return _scale(hf, shape) | {"layers": made, "router": "chosen", "conv_bias": bias}


def _hybrid_keys(config: ModelConfig) -> dict:
    first = next((layer for layer in config.layers if layer.mixer == "mamba"), None)
    mamba = {} if first is None else {
        "mamba_n_heads": first.heads, "mamba_n_groups": first.kv_heads, "mamba_d_state": first.state_dim, "mamba_d_conv": first.kernel,
        "mamba_d_head": config.head_size(first), "mamba_expand": first.heads * config.head_size(first) // config.hidden_size}
    layer, attention = config.layers[0], [one for one in config.layers if one.mixer == "attention"]
    return _neutral(config) | mamba | {
        "layer_types": ["attention" if one.mixer == "attention" else "mamba" for one in config.layers], "mamba_proj_bias": False,
        "mamba_conv_bias": config.conv_bias, "position_embedding_type": "rope" if any(one.rope >= 0 for one in attention) else "nope",
        "num_local_experts": layer.experts, "num_experts_per_tok": layer.experts_per_token or 1,
        "shared_intermediate_size": layer.shared_size or layer.mlp_size,
        "num_attention_heads": max((one.heads for one in attention), default=1), "attention_multiplier": config.attention_scale,
        "num_key_value_heads": max((one.kv_heads for one in attention), default=1)}


_READS = _MULTIPLIERS | {"position_embedding_type", "num_local_experts", "num_experts_per_tok", "shared_intermediate_size", "mamba_n_heads",
                         "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_d_head", "mamba_expand", "mamba_proj_bias",
                         "mamba_conv_bias", "time_step_limit"}
FAMILIES = {
    "granite": Family("GraniteForCausalLM", LLAMA_KEYS, Naming(factors=_factors), biases=("attention_bias", "mlp_bias"),
                      reads=_MULTIPLIERS, more=_scale, back=_neutral),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM", LLAMA_KEYS,
        Naming(_HYBRID, _HYBRID_FUSED, stacked=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
               factors=_factors), biases=("attention_bias",), hybrid=True, reads=_READS, more=_hybrid, back=_hybrid_keys)}
