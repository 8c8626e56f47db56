"""Gemma 2 and 3 (text): norms around every block, gains stored less one, embeddings times sqrt(hidden), windows in most layers."""

import torch

from models.families.family import LLAMA_KEYS, Family, positive, take, whole
from models.formats.weight_names import Naming
from models.network.config import ModelConfig, Rope
from runtime.errors import UserError

KEYS = {name: entry for name, entry in LLAMA_KEYS.items() if name != "activation"} | {
    "activation": ("hidden_activation", str, "gelu_pytorch_tanh"), "attention_softcap": ("attn_logit_softcapping", float, None),
    "logits_softcap": ("final_logit_softcapping", float, None)}
SANDWICH = {"post_mixer_norm": "post_attention_layernorm", "post_attention_layernorm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm"}
_GAINS = ("norm", "input_layernorm", "post_attention_layernorm", "post_mixer_norm", "post_mlp_norm", "self_attn.q_norm",
          "self_attn.k_norm")


def embedding_factors(hf: dict, config: ModelConfig) -> dict[str, float]:
    """sqrt(hidden), rounded to the type that the weights were trained in; a tied head takes it back in the final norm."""
    name = hf.get("dtype") or hf.get("torch_dtype")
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    factor = float(torch.tensor(config.hidden_size**0.5).to(kind))
    return {"embed_tokens": factor} | ({"norm": 1 / factor} if config.tied_embeddings else {})


def _more(hf: dict, shape: dict) -> dict:
    if take(hf, "use_bidirectional_attention", bool, False):
        raise UserError("use_bidirectional_attention true is not supported: a decoder looks back only")
    found = {name: None for name, key in (("attention_softcap", "attn_logit_softcapping"), ("logits_softcap", "final_logit_softcapping"))
             if key in hf and hf[key] is None}              # null is none; a missing key is the family's default
    return found | {"attention_scale": positive(hf, "query_pre_attn_scalar", 256.0) ** -0.5}


def _back(config: ModelConfig) -> dict:
    scalar = round(config.attention_scale**-2, 6)
    return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar, "sliding_window": config.sliding_window or 4096}


def every(period: int, key: str = ""):
    """Layers by windows, each period-th of them without; the period is the value of `key` where the configuration has it."""
    def pattern(hf: dict, count: int) -> list[str]:
        step = whole(hf, key, period) if key else period
        return ["full_attention" if (number + 1) % step == 0 else "sliding_attention" for number in range(count)]
    return pattern


_NAMING = Naming(SANDWICH, less_one=_GAINS, factors=embedding_factors)
_READS = frozenset({"query_pre_attn_scalar", "use_bidirectional_attention", "rope_local_base_freq", "sliding_window_pattern",
                    "_sliding_window_pattern"})
FAMILIES = {
    "gemma2": Family("Gemma2ForCausalLM", KEYS | {"attention_softcap": ("attn_logit_softcapping", float, 50.0),
                                                  "logits_softcap": ("final_logit_softcapping", float, 30.0)}, _NAMING,
                     fixed={"norm_order": "both"}, biases=("attention_bias",), kv_heads=4, head_dim=256, window="always",
                     pattern=every(2), tied=True, reads=_READS, more=_more, back=_back),
    # transformers has attn_logit_softcapping among its keys and computes nothing with it, so a value is refused
    "gemma3_text": Family("Gemma3ForCausalLM", {name: entry for name, entry in KEYS.items() if name != "attention_softcap"}, _NAMING,
                          fixed={"norm_order": "both", "qk_norm": True}, biases=("attention_bias",), kv_heads=4, head_dim=256,
                          window="always", pattern=every(6, "sliding_window_pattern"), tied=True, theta=1e6,
                          nested={"full_attention": Rope(1e6), "sliding_attention": Rope(1e4)}, local="rope_local_base_freq",
                          missing={"vocab_size": 262208, "num_attention_heads": 8, "max_position_embeddings": 131072},
                          reads=_READS, more=_more, back=_back)}
