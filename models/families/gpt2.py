"""GPT-2: LayerNorm, learned positions, a plain MLP; linears stored [in, out], queries, keys and values fused."""

from models.families.family import Family
from models.formats.weight_names import Naming

_KEYS = {"hidden_size": ("n_embd", int, 768), "layers": ("n_layer", int, 12), "heads": ("n_head", int, 12),
         "mlp_size": ("n_inner", int, None), "head_dim": ("head_dim", int, None), "context_length": ("n_positions", int, 1024),
         "norm_eps": ("layer_norm_epsilon", float, 1e-5), "activation": ("activation_function", str, "gelu_new")}
_NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "input_layernorm": "ln_1",
          "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
FUSED = ("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", _KEYS,
        Naming(_NAMES, (FUSED,), "transformer.h.{n}.", "transformer.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        fixed={"norm": "layer", "positions": "learned", "gated_mlp": False, "attention_bias": True, "output_bias": True,
               "mlp_bias": True}, tied=True,
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        aliases={"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                 "max_position_embeddings": "n_positions"})}
