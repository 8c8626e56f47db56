"""The shape of a decoder-only language model, and its reading and writing as a Hugging Face `config.json`.

`ModelConfig` says everything that `decoder.py` and the export need to know; layers may differ in heads and MLP
width, so that a structurally pruned model is an ordinary model. `from_hf` / `to_hf` speak the published keys of five
families: llama (SmolLM and SmolLM2 too), mistral, qwen2, qwen3 and gpt2. A model whose shape those keys cannot say
adds one key of ours, `edgewright_layers: [[heads, kv_heads, mlp_size], ...]`. `to_dict` / `from_dict` are the plain
JSON that travels in a bundle's manifest.

RoPE scaling: none, or Llama 3's ("llama3"). Sliding windows: one width for every layer. Other kinds are refused, and so
is any other key that by its name changes what a model computes, unless its value switches it off. What a missing key
means is what `transformers` takes it for.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields

from runtime.errors import UserError
from runtime.token_ids import pad_id, token_id, token_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                  "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh"}
# Names of keys that change arithmetic, in any family of transformers. A family's own are in `_READ`; of what is left only
# values that switch something off are taken.
_ARITHMETIC = re.compile("""soft_?cap|multiplier|scal(e|ing)|clip|alibi|parallel_(attn|residual)|qk_?(layer_?)?norm|norm_type
    |norm_strategy|normali[sz]e|(pre|post)_norm|rope|rotary|nope|expert|moe|window|chunk|sink|logn|ntk|temperature_tuning|mup
    |hidden_act|activation|layer_types?$|causal|bidirectional|residual|attention_type|pre_attn_scalar|embedding_type
    |dim_model_base|sparsity|^scale$|cross_attention""", re.VERBOSE)
INERT_KEYS = re.compile("dropout|pdrop|^summary_|_in_fp32$|initializer|init_|max_window_layers|^use_sliding_window$")
_ROPE_READ = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "hidden_act", "layer_types"}
_READ = {"llama": _ROPE_READ, "mistral": _ROPE_READ | {"sliding_window"},
         "qwen2": _ROPE_READ | {"sliding_window"}, "qwen3": _ROPE_READ | {"sliding_window"},
         "gpt2": {"activation_function", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"}}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}      # transformers' number where config.json is silent
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LARGEST = 2**31 - 1        # no published size comes near; a corrupt number is refused before anything is allocated
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class LayerConfig:
    heads: int
    kv_heads: int
    mlp_size: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one model. Raises UserError where the numbers contradict each other."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    head_dim: int
    context_length: int
    norm: str = "rms"                       # "rms" or "layer" (with bias)
    norm_eps: float = 1e-5
    positions: str = "rope"                 # "rope" or "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # {"rope_type": "llama3", factor, low_freq_factor, ...}
    sliding_window: int | None = None       # a token sees the last `sliding_window` positions, itself included
    activation: str = "silu"                # "silu", "gelu" or "gelu_tanh"
    gated_mlp: bool = True                  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    attention_bias: bool = False            # on q, k, v
    output_bias: bool = False               # on o
    mlp_bias: bool = False
    qk_norm: bool = False                   # RMSNorm over head_dim on q and k, before RoPE
    tied_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "head_dim": self.head_dim,
                 "context_length": self.context_length, "number of layers": len(self.layers)}
        if self.sliding_window is not None:
            sizes["sliding_window"] = self.sliding_window
        for number, layer in enumerate(self.layers):
            sizes |= {f"{name} of layer {number}": value for name, value in asdict(layer).items()}
            if layer.kv_heads > 0 and layer.heads % layer.kv_heads:
                raise UserError(f"layer {number} has {layer.heads} heads, which its {layer.kv_heads} key/value heads "
                                f"do not divide")
        for name, value in sizes.items():
            if not 1 <= value <= _LARGEST:
                raise UserError(f"{name} is {value}, which should be from 1 to {_LARGEST}")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, which should be positive and finite")
        for name in ("bos_token_id", "pad_token_id"):
            token_id(getattr(self, name), self.vocab_size, name)
        token_ids(list(self.eos_token_ids), self.vocab_size, "eos_token_id")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, which RoPE needs even")

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same shape."""
        return len(set(self.layers)) == 1

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """Read the contents of a config.json. Raises UserError naming the key and value that cannot be used."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is not supported: supported are {', '.join(FAMILIES)} "
                            f"(SmolLM2 is llama)")
        for key, value in hf.items():
            if _ARITHMETIC.search(key) and key not in _READ[family] and not INERT_KEYS.search(key) and not _off(key, value):
                raise UserError(f"{key} {value!r} is not supported for {family}: it changes what the model computes, and "
                                f"would be ignored; remove it only if the model was trained without it")
        shape = _gpt2_fields(hf) if family == "gpt2" else _llama_fields(hf, family)
        vocab = _take(hf, "vocab_size", int)
        return cls(family=family, vocab_size=vocab, bos_token_id=hf.get("bos_token_id"),
                   pad_token_id=pad_id(hf.get("pad_token_id"), vocab, "pad_token_id"),
                   eos_token_ids=token_ids(hf.get("eos_token_id"), vocab, "eos_token_id"), **shape)

    def to_hf(self) -> dict:
        """The contents of a config.json that `transformers` reads (with `edgewright_layers` where it cannot).

        Raises ValueError for a combination that the family's keys do not express, such as gpt2 with RoPE.
        """
        if not self.layers or self.family not in FAMILIES:
            raise ValueError(f"{self.family!r} is none of {FAMILIES}")
        hf = _to_gpt2(self) if self.family == "gpt2" else _to_llama(self)
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        hf = {"architectures": [_ARCHITECTURES[self.family]], "model_type": self.family, "vocab_size": self.vocab_size,
              **hf, "tie_word_embeddings": self.tied_embeddings, "bos_token_id": self.bos_token_id,
              "eos_token_id": eos, "pad_token_id": self.pad_token_id}
        if not self.publishable:
            hf["edgewright_layers"] = [[layer.heads, layer.kv_heads, layer.mlp_size] for layer in self.layers]
            hf["head_dim"] = self.head_dim
        if ModelConfig.from_hf(hf) != self:
            raise ValueError(f"family {self.family} cannot express {self}")
        return hf

    @property
    def publishable(self) -> bool:
        """Whether the family's own keys can say this shape, so that `transformers` opens the checkpoint."""
        layer = self.layers[0]
        plain = layer.heads * self.head_dim == self.hidden_size and layer.kv_heads == layer.heads
        return self.uniform and (self.family != "gpt2" or plain)

    def to_dict(self) -> dict:
        """Plain JSON values, keyed by field name; layers as [{"heads", "kv_heads", "mlp_size"}, ...]."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers],
                               "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, data: dict) -> ModelConfig:
        """Undo `to_dict`. Raises UserError where fields are missing or unknown."""
        known = {field.name for field in fields(cls)}
        try:
            if unknown := set(data) - known:
                raise UserError(f"the model configuration has unknown fields {sorted(unknown)}")
            layers = tuple(LayerConfig(**layer) for layer in data["layers"])
            return cls(**data | {"layers": layers, "eos_token_ids": tuple(data.get("eos_token_ids", ()))})
        except (KeyError, TypeError) as error:
            raise UserError(f"the model configuration cannot be read: {error}") from None


def _off(key: str, value) -> bool:
    """Whether a value leaves arithmetic alone: null, false, 0, 1, empty; for is_causal, true."""
    if type(value) is bool:
        return value == (key == "is_causal")
    return value in (None, 0, 1, "", [], {})


_REQUIRED = object()


def _take(hf: dict, key: str, kind: type, default=_REQUIRED):
    """hf[key], checked to be of `kind`; a missing or null key gives the default, or is refused where there is none."""
    value = hf.get(key)
    if value is None:
        if default is _REQUIRED:
            raise UserError(f"{key} is missing")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{key} is {value!r}, which should be of type {kind.__name__}")
    return value


def _layers(hf: dict, count: int, every: LayerConfig) -> tuple[LayerConfig, ...]:
    """One LayerConfig a layer: `edgewright_layers` where the model has it, else all alike."""
    if not 1 <= count <= _MOST_LAYERS:
        raise UserError(f"the number of layers is {count}, which should be from 1 to {_MOST_LAYERS}")
    listed = _take(hf, "edgewright_layers", list, None)
    if listed is None:
        return (every,) * count
    if len(listed) != count:
        raise UserError(f"edgewright_layers describes {len(listed)} layers of {count}")
    for item in listed:
        if not (isinstance(item, list) and len(item) == 3 and all(type(value) is int for value in item)):
            raise UserError(f"edgewright_layers holds {item!r}, which should be [heads, kv_heads, mlp_size]")
    return tuple(LayerConfig(*item) for item in listed)


def _activation(hf: dict, key: str, default: str) -> str:
    name = _take(hf, key, str, default)
    if name not in _ACTIVATIONS:
        raise UserError(f"{key} {name!r} is not supported: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _llama_fields(hf: dict, family: str) -> dict:
    hidden, heads = _take(hf, "hidden_size", int), _take(hf, "num_attention_heads", int)
    if heads < 1:
        raise UserError(f"num_attention_heads is {heads}, which should be at least 1")
    silent = heads if "num_key_value_heads" in hf else _KV_HEADS.get(family, heads)
    every = LayerConfig(heads, _take(hf, "num_key_value_heads", int, silent), _take(hf, "intermediate_size", int))
    count = _take(hf, "num_hidden_layers", int)
    bias = _take(hf, "attention_bias", bool, False) if family in ("llama", "qwen3") else False
    theta, scaling = _rope(hf)
    return dict(hidden_size=hidden, layers=_layers(hf, count, every),
                head_dim=_take(hf, "head_dim", int, 128 if family == "qwen3" else hidden // heads),
                context_length=_take(hf, "max_position_embeddings", int),
                norm="rms", norm_eps=_take(hf, "rms_norm_eps", float, 1e-6), positions="rope", rope_theta=theta,
                rope_scaling=scaling, sliding_window=_sliding_window(hf, family, count),
                activation=_activation(hf, "hidden_act", "silu"), gated_mlp=True,
                attention_bias=bias or family == "qwen2", output_bias=bias,
                mlp_bias=_take(hf, "mlp_bias", bool, False) if family == "llama" else False,
                qk_norm=family == "qwen3", tied_embeddings=_take(hf, "tie_word_embeddings", bool, False))


def _rope(hf: dict) -> tuple[float, dict | None]:
    """theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    rope, outer = {}, _take(hf, "rope_theta", float, None)
    for key in ("rope_parameters", "rope_scaling"):
        part = dict(_take(hf, key, dict, None) or {})
        if part:
            part["rope_type"] = part.pop("type", None) if part.get("rope_type") is None else part["rope_type"]
            part.pop("type", None)
        for name, value in part.items():
            if rope.setdefault(name, value) != value:
                raise UserError(f"rope_parameters and rope_scaling disagree in {name}: {rope[name]!r} and {value!r}")
    theta = _take(rope, "rope_theta", float, 10000.0 if outer is None else outer)
    if outer not in (None, theta):
        raise UserError(f"rope_theta is {outer} and within rope_parameters {theta}: readers take one or the other, so remove "
                        f"the wrong one")
    kind = rope.get("rope_type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"RoPE scaling {kind!r} is not supported: supported are none and 'llama3'")
    part = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1) or type(part) is bool:
        raise UserError(f"partial_rotary_factor {part} is not supported: every dimension of a head must rotate")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for name, value in rope.items():
        if name not in known | (set(_LLAMA3_KEYS) if kind == "llama3" else set()) and not _off(name, value):
            raise UserError(f"{name} {value!r} among the RoPE parameters is not supported with rope_type {kind!r}")
    if kind == "default":
        return theta, None
    scaling = {key: _take(rope, key, float) for key in _LLAMA3_KEYS}
    if not all(0 < value < math.inf for value in scaling.values()) \
            or scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"the RoPE scaling {scaling} should be positive, low_freq_factor below high_freq_factor")
    scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return theta, {"rope_type": "llama3"} | scaling


def _sliding_window(hf: dict, family: str, count: int) -> int | None:
    window, kinds = None, _take(hf, "layer_types", list, None)
    told = None if family in ("llama", "gpt2") else _take(hf, "sliding_window", int, None)
    if family == "mistral" or (family != "llama" and _take(hf, "use_sliding_window", bool, False)):
        # null means none; a config without the key means the families' default
        window = told if "sliding_window" in hf else 4096
    if kinds is None:
        first = 0 if family == "mistral" or window is None else min(_take(hf, "max_window_layers", int, 28), count)
        kinds = ["full_attention"] * (count if window is None else first)
        kinds += ["sliding_attention"] * (count - len(kinds))
    found = sorted(set(map(str, kinds)))
    if len(kinds) != count or len(found) != 1 or found[0] not in ("full_attention", "sliding_attention"):
        raise UserError(f"layer_types has {found} for {len(kinds)} of {count} layers: only one kind for all layers is "
                        f"supported, full_attention or sliding_attention")
    if (found[0] == "sliding_attention" and window is None) or (found[0] == "full_attention" and window and family == "mistral"):
        raise UserError(f"layer_types says {found[0]}, and the sliding window is {window}: one of them is wrong")
    return window if found[0] == "sliding_attention" else None


def _to_llama(config: ModelConfig) -> dict:
    widest = LayerConfig(*(max(sizes) for sizes in zip(*(asdict(layer).values() for layer in config.layers))))
    rope = {"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": config.rope_theta}
    hf = {"hidden_size": config.hidden_size, "intermediate_size": widest.mlp_size,
          "num_hidden_layers": len(config.layers), "num_attention_heads": widest.heads,
          "num_key_value_heads": widest.kv_heads, "head_dim": config.head_dim,
          "hidden_act": _published_activation(config), "max_position_embeddings": config.context_length,
          "rms_norm_eps": config.norm_eps,
          # both spellings: transformers 5 reads rope_parameters, 4 the other two (and would fall back to theta 10000)
          "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling and dict(config.rope_scaling),
          "rope_parameters": rope}
    if config.family in ("llama", "qwen3"):
        hf["attention_bias"] = config.attention_bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        hf["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window,
               "max_window_layers": 0, "layer_types": [kind] * len(config.layers)}
    return hf


def _published_activation(config: ModelConfig) -> str:
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation]


def _gpt2_fields(hf: dict) -> dict:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                       ("add_cross_attention", False)):
        if _take(hf, key, bool, usual) != usual:
            raise UserError(f"{key} {hf[key]} is not supported: only {usual} is")
    hf = dict(hf)
    for name, alias in (("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"),
                        ("n_positions", "max_position_embeddings")):
        if alias in hf and hf.setdefault(name, hf[alias]) != hf[alias]:
            raise UserError(f"{name} is {hf[name]} and {alias}, which means the same, {hf[alias]}")
    hidden, heads = _take(hf, "n_embd", int, 768), _take(hf, "n_head", int, 12)
    if heads < 1 or hidden % heads:
        raise UserError(f"n_embd is {hidden}, which its n_head {heads} does not divide")
    every = LayerConfig(heads, heads, _take(hf, "n_inner", int, 4 * hidden))
    return dict(hidden_size=hidden, layers=_layers(hf, _take(hf, "n_layer", int, 12), every),
                head_dim=_take(hf, "head_dim", int, hidden // heads),
                context_length=_take(hf, "n_positions", int, 1024), norm="layer",
                norm_eps=_take(hf, "layer_norm_epsilon", float, 1e-5), positions="learned",
                activation=_activation(hf, "activation_function", "gelu_new"), gated_mlp=False, attention_bias=True,
                output_bias=True, mlp_bias=True, tied_embeddings=_take(hf, "tie_word_embeddings", bool, True))


def _to_gpt2(config: ModelConfig) -> dict:
    widest = max(layer.mlp_size for layer in config.layers)
    heads = config.layers[0].heads if config.publishable else 1      # edgewright_layers says the rest
    return {"n_embd": config.hidden_size, "n_layer": len(config.layers), "n_head": heads, "n_inner": widest,
            "n_positions": config.context_length, "layer_norm_epsilon": config.norm_eps,
            "activation_function": _published_activation(config)}
