"""Phi-3, Phi-3.5 and Phi-4-mini: a Llama with fused linears, perhaps a part of each head rotated, and LongRoPE."""

from models.families.family import LLAMA_KEYS, Family
from models.formats.weight_names import Naming

_FUSED = (("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
          ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")))


def _back(config) -> dict:
    """LongRoPE's border is a key of its own in this family."""
    original = (config.rope_scaling or {}).get("original_max_position_embeddings")
    return {} if original is None else {"original_max_position_embeddings": original}


FAMILIES = {
    "phi3": Family("Phi3ForCausalLM", LLAMA_KEYS | {"norm_eps": ("rms_norm_eps", float, 1e-5)}, Naming(fused=_FUSED),
                   window="always", window_size=None, partial=1.0, back=_back)}
