"""GRU and LSTM language models of `python -m models.train --architecture`: layers of x + cell(norm(x)), and a tied head.

No family of `transformers`; config.json has keys of its own and those of Llama that such a model has.
"""

from models.families.family import Family
from models.network.config import GATED, gated_layer

_KEYS = {"hidden_size": ("hidden_size", int), "layers": ("num_hidden_layers", int), "context_length": ("max_position_embeddings", int),
         "norm_eps": ("rms_norm_eps", float, 1e-6), "heads": ("num_attention_heads", int, 1), "mlp_size": ("intermediate_size", int, 0),
         "head_dim": ("head_dim", int, None)}
_ONLY = {"num_attention_heads": 1, "intermediate_size": 0, "layer_types": []}


def _family(mixer: str) -> Family:
    def more(hf: dict, shape: dict) -> dict:
        return {"layers": (gated_layer(mixer, shape["hidden_size"]),) * len(shape["layers"])}
    return Family(f"{mixer.title()}ForCausalLM", _KEYS, only=_ONLY, fixed={"positions": "none"}, tied=True, more=more)


FAMILIES = {f"edgewright_{mixer}": _family(mixer) for mixer in GATED}
