"""One dial, the number of parameters, derives the shape and habits of a model trained from scratch.

`--preset 5m` (or 15m, 60m, 135m, or any such number) gives a Llama-family model with SmolLM2's proportions: heads of
64, the MLP 8/3 of the hidden size, grouped-query attention with the smallest group that divides the heads, tied
embeddings, and a depth near (hidden size)^1.5 / 460, which is SmolLM2-135M's own shape at 135m. The peak learning rate
is Kaplan et al. 2020's rule of thumb (eq. D.1), and a step learns from 4,096 tokens up to 15m, then in proportion to
the square root of the parameters.
"""

import math
import re
from dataclasses import dataclass, replace

from models.network.config import GATED, LayerConfig, ModelConfig, gated_layer
from runtime.errors import UserError

HEAD_DIM = 64
GATED_LAYERS = 2
HEADS = [n for n in range(1, 129) if n == 1 or n % 2 == 0 or n % 3 == 0]       # those with a small group
SUFFIXES = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


@dataclass(frozen=True)
class Preset:
    config: ModelConfig
    learning_rate: float
    batch_tokens: int


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a Llama-family model without biases (what presets make); tied embeddings count once."""
    layers = sum(config.hidden_size * (config.head_dim * 2 * (layer.heads + layer.kv_heads) + 3 * layer.mlp_size + 2)
                 for layer in config.layers)
    return layers + config.hidden_size * (config.vocab_size * (1 if config.tied_embeddings else 2) + 1)


def gated_config(mixer: str, size: str, base: ModelConfig) -> ModelConfig:
    """A GRU or LSTM of about `size` parameters, with the vocabulary, context and tokens of `base`: two layers, 2 gates h^2 each."""
    vocab, quadratic = base.vocab_size, 2 * GATED[mixer][0] * GATED_LAYERS
    hidden = (math.sqrt(vocab**2 + 4 * quadratic * parameter_target(size)) - vocab) / (2 * quadratic)
    hidden = max(16, 16 * round(hidden / 16))
    return replace(base, family=f"edgewright_{mixer}", hidden_size=hidden, head_dim=hidden, positions="none",
                   layers=(gated_layer(mixer, hidden),) * GATED_LAYERS)


def parameter_target(size: str) -> float:
    """The number of parameters that "5m" stands for. Raises UserError where it stands for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", size.lower())
    if not match:
        raise UserError(f"--preset {size}: give a number of parameters such as 5m, 15m, 60m or 135m")
    return float(match[1]) * SUFFIXES[match[2]]


def preset(size: str, vocab_size: int, context: int, eos: int) -> Preset:
    """The preset of about `size` parameters ("5m"), embeddings included. Raises UserError for a size of no use."""
    target = parameter_target(size)
    shapes = [_shape(heads, target, vocab_size) for heads in HEADS]
    shapes = [shape for shape in shapes if shape[1] >= 1]
    if not shapes:
        raise UserError(f"--preset {size}: too small for a vocabulary of {vocab_size}; the smallest model has about "
                        f"{(HEAD_DIM * vocab_size + 50_000) / 1e6:.1f}m parameters")
    hidden, layers, layer = min(shapes, key=lambda shape: abs(math.log(shape[1] / (shape[0] ** 1.5 / 460))))
    config = ModelConfig(family="llama", vocab_size=vocab_size, hidden_size=hidden, layers=(layer,) * layers,
                         head_dim=HEAD_DIM, context_length=context, norm_eps=1e-5, rope_theta=10000.0,
                         bos_token_id=eos, eos_token_ids=(eos,), pad_token_id=eos)
    count = parameter_count(config)
    tokens = 4096 * max(1.0, math.sqrt(count / 15e6))
    return Preset(config, learning_rate=round(0.003239 - 0.0001395 * math.log(count), 6), batch_tokens=int(tokens))


def _shape(heads: int, target: float, vocab_size: int) -> tuple[int, int, LayerConfig]:
    """(hidden size, layers, layer) of the model with `heads` heads that comes nearest to `target` parameters."""
    hidden = heads * HEAD_DIM
    group = next((g for g in range(2, heads + 1) if heads % g == 0), 1)
    layer = LayerConfig(heads=heads, kv_heads=heads // group, mlp_size=64 * math.ceil(hidden * 8 / 3 / 64))
    one = hidden * (HEAD_DIM * 2 * (layer.heads + layer.kv_heads) + 3 * layer.mlp_size + 2)
    return hidden, round((target - vocab_size * hidden) / one), layer
