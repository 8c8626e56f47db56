"""The shape of a decoder-only language model, and its reading and writing as a Hugging Face `config.json`.

`ModelConfig` says everything that `decoder.py` and the export need to know; layers may differ in heads and MLP
width, so that a structurally pruned model is an ordinary model. `from_hf` / `to_hf` speak the published keys of a table of
families (SmolLM and SmolLM2 are llama). A model whose shape those keys cannot say adds one key of ours,
`edgewright_layers: [[heads, kv_heads, mlp_size], ...]`. `to_dict` / `from_dict` are the plain JSON of a bundle's manifest.

RoPE scaling: none, or Llama 3's ("llama3"). Sliding windows: one width for every layer. Other kinds are refused, and so
is any other key that by its name changes what a model computes, unless its value switches it off.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields

from runtime.errors import UserError
from runtime.token_ids import pad_id, token_id, token_ids

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Names of keys that change arithmetic, in any family of transformers. Those a family reads are in its table; of what is left
# only values that switch something off are taken.
_ARITHMETIC = re.compile("""soft_?cap|multiplier|scal(e|ing)|clip|alibi|parallel_(attn|residual)|qk_?(layer_?)?norm|norm_type
    |norm_strategy|normali[sz]e|(pre|post)_norm|rope|rotary|nope|expert|moe|window|chunk|sink|logn|ntk|temperature_tuning|mup
    |hidden_act|activation|layer_types?$|causal|bidirectional|residual|attention_type|pre_attn_scalar|embedding_type
    |dim_model_base|sparsity|^scale$|cross_attention""", re.VERBOSE)
# Keys that nobody computes with when a model runs, whatever their names say.
INERT_KEYS = re.compile("dropout|pdrop|^summary_|_in_fp32$|initializer|init_|max_window_layers|^use_sliding_window$")
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LARGEST = 2**31 - 1        # no published size comes near; a corrupt number is refused before anything is allocated
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class Family:
    """How a family's config.json says a model's shape, and what is alike in all its models.

    keys: what they say in our words -> (its key, type, what a missing key means to transformers; none: it must be there).
    """

    architecture: str
    keys: dict[str, tuple]
    fixed: dict = field(default_factory=dict)           # fields of ModelConfig that no key changes
    biases: tuple[str, ...] = ()                        # keys that switch biases on; the attention's is the output's too
    kv_heads: int | None = None                         # where that key is missing; None: as many as heads
    head_dim: int | None = None                         # where that key is missing; None: hidden size / heads
    window: str = ""                                    # a sliding window "always", or where use_sliding_window says so
    tied: bool = False                                  # where tie_word_embeddings is missing
    only: dict[str, bool] = field(default_factory=dict)             # keys with one value that is supported
    aliases: dict[str, str] = field(default_factory=dict)           # another name of a key -> the key

    @property
    def read(self) -> set[str]:
        """Its keys that change arithmetic."""
        rope = set() if self.fixed.get("positions") == "learned" else _ROPE_KEYS
        return rope | {self.keys["activation"][0], *self.only} | ({"sliding_window"} if self.window else set())


_LLAMA = {"hidden_size": ("hidden_size", int), "mlp_size": ("intermediate_size", int), "layers": ("num_hidden_layers", int),
          "heads": ("num_attention_heads", int), "kv_heads": ("num_key_value_heads", int, None), "head_dim": ("head_dim", int, None),
          "activation": ("hidden_act", str, "silu"), "context_length": ("max_position_embeddings", int),
          "norm_eps": ("rms_norm_eps", float, 1e-6)}
_GPT2 = {"hidden_size": ("n_embd", int, 768), "layers": ("n_layer", int, 12), "heads": ("n_head", int, 12),
         "mlp_size": ("n_inner", int, None), "head_dim": ("head_dim", int, None), "context_length": ("n_positions", int, 1024),
         "norm_eps": ("layer_norm_epsilon", float, 1e-5), "activation": ("activation_function", str, "gelu_new")}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA, biases=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", _LLAMA, kv_heads=8, window="always"),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA, {"attention_bias": True}, kv_heads=32, window="asked"),
    "qwen3": Family("Qwen3ForCausalLM", _LLAMA, {"qk_norm": True}, ("attention_bias",), kv_heads=32, head_dim=128, window="asked"),
    "gpt2": Family("GPT2LMHeadModel", _GPT2,
                   {"norm": "layer", "positions": "learned", "gated_mlp": False, "attention_bias": True, "output_bias": True,
                    "mlp_bias": True}, tied=True,
                   only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
                   aliases={"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                            "max_position_embeddings": "n_positions"})}


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
        name = hf.get("model_type")
        if name not in list(FAMILIES):                   # it may be anything, a list too
            raise UserError(f"model_type {name!r} is not supported: supported are {', '.join(FAMILIES)} (SmolLM2 is llama)")
        family, hf = FAMILIES[name], dict(hf)
        for key, value in hf.items():
            if _ARITHMETIC.search(key) and key not in family.read and not INERT_KEYS.search(key) and not _off(key, value):
                raise UserError(f"{key} {value!r} is not supported for {name}: it changes what the model computes, and "
                                f"would be ignored; remove it only if the model was trained without it")
        for key, only in family.only.items():
            if _take(hf, key, bool, only) != only:
                raise UserError(f"{key} {hf[key]} is not supported: only {only} is")
        for alias, key in family.aliases.items():
            if alias in hf and hf.setdefault(key, hf[alias]) != hf[alias]:
                raise UserError(f"{key} is {hf[key]} and {alias}, which means the same, {hf[alias]}")
        told = {what: _take(hf, *entry) for what, entry in family.keys.items()}
        hidden, heads, activation = (told[what] for what in ("hidden_size", "heads", "activation"))
        if heads < 1:
            raise UserError(f"{family.keys['heads'][0]} is {heads}, which should be at least 1")
        if name == "gpt2" and hidden % heads:
            raise UserError(f"n_embd is {hidden}, which its n_head {heads} does not divide")
        if activation not in _ACTIVATIONS:
            raise UserError(f"{family.keys['activation'][0]} {activation!r} is not supported: supported are "
                            f"{', '.join(_ACTIVATIONS)}")
        silent = heads if "num_key_value_heads" in hf else family.kv_heads or heads
        every = LayerConfig(heads, _given(told.get("kv_heads"), silent), _given(told["mlp_size"], 4 * hidden))
        shape = {"hidden_size": hidden, "layers": _layers(hf, told["layers"], every),
                 "head_dim": _given(told["head_dim"], family.head_dim or hidden // heads),
                 "context_length": told["context_length"], "norm_eps": told["norm_eps"], "activation": _ACTIVATIONS[activation],
                 "tied_embeddings": _take(hf, "tie_word_embeddings", bool, family.tied)} | family.fixed
        shape |= {key: _take(hf, key, bool, False) for key in family.biases}
        if "attention_bias" in family.biases:
            shape["output_bias"] = shape["attention_bias"]
        if name != "gpt2":
            shape["rope_theta"], shape["rope_scaling"] = _rope(hf)
            shape["sliding_window"] = _sliding_window(hf, family, told["layers"])
        vocab = _take(hf, "vocab_size", int)
        return cls(family=name, vocab_size=vocab, bos_token_id=hf.get("bos_token_id"),
                   pad_token_id=pad_id(hf.get("pad_token_id"), vocab, "pad_token_id"),
                   eos_token_ids=token_ids(hf.get("eos_token_id"), vocab, "eos_token_id"), **shape)

    def to_hf(self) -> dict:
        """The contents of a config.json that `transformers` reads (with `edgewright_layers` where it cannot).

        Raises ValueError for a combination that the family's keys do not express, such as gpt2 with RoPE.
        """
        if not self.layers or self.family not in list(FAMILIES):
            raise ValueError(f"{self.family!r} is none of {', '.join(FAMILIES)}")
        family, gpt2 = FAMILIES[self.family], self.family == "gpt2"
        said = vars(self) | {"layers": len(self.layers),
                             "activation": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == self.activation)}
        said |= {name: max(getattr(layer, name) for layer in self.layers) for name in ("heads", "kv_heads", "mlp_size")}
        if gpt2:
            del said["head_dim"]
            said["heads"] = said["heads"] if self.publishable else 1           # edgewright_layers says the rest
        hf = {"architectures": [family.architecture], "model_type": self.family, "vocab_size": self.vocab_size}
        hf |= {key: said[what] for what, (key, *_) in family.keys.items() if what in said}
        if not gpt2:
            # both spellings: transformers 5 reads rope_parameters, 4 the other two (and would fall back to theta 10000)
            hf |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling and dict(self.rope_scaling),
                   "rope_parameters": {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}}
        hf |= {key: getattr(self, key) for key in family.biases}
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        window = {"use_sliding_window": self.sliding_window is not None, "sliding_window": self.sliding_window,
                  "max_window_layers": 0, "layer_types": [kind] * len(self.layers)}
        hf |= {"asked": window, "always": {"sliding_window": self.sliding_window}}.get(family.window, {})
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        hf |= {"tie_word_embeddings": self.tied_embeddings, "bos_token_id": self.bos_token_id, "eos_token_id": eos,
               "pad_token_id": self.pad_token_id}
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


def _given(value, default):
    return default if value is None else value


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


def _rope(hf: dict) -> tuple[float, dict | None]:
    """theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    rope, outer = {}, _take(hf, "rope_theta", float, None)
    for key in ("rope_parameters", "rope_scaling"):
        part = dict(_take(hf, key, dict, None) or {})
        if part:
            old = part.pop("type", None)
            part["rope_type"] = old if part.get("rope_type") is None else part["rope_type"]
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
    positive = all(0 < value < math.inf for value in scaling.values())
    if not positive or scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"the RoPE scaling {scaling} should be positive, low_freq_factor below high_freq_factor")
    scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return theta, {"rope_type": "llama3"} | scaling


def _sliding_window(hf: dict, family: Family, count: int) -> int | None:
    window, kinds = None, _take(hf, "layer_types", list, None)
    told = _take(hf, "sliding_window", int, None) if family.window else None
    if family.window == "always" or family.window and _take(hf, "use_sliding_window", bool, False):
        window = told if "sliding_window" in hf else 4096       # null means none; a missing key the families' default
    if kinds is None:
        first = count if window is None else 0
        if first == 0 and family.window == "asked":
            first = max(0, min(_take(hf, "max_window_layers", int, 28), count))
        kinds = ["full_attention"] * first + ["sliding_attention"] * (count - first)
    found = sorted(set(map(str, kinds)))
    if len(kinds) != count or len(found) != 1 or found[0] not in ("full_attention", "sliding_attention"):
        raise UserError(f"layer_types has {found} for {len(kinds)} of {count} layers: only one kind for all layers is "
                        f"supported, full_attention or sliding_attention")
    slides = found[0] == "sliding_attention"
    if slides and window is None or not slides and window and family.window == "always":
        raise UserError(f"layer_types says {found[0]}, and the sliding window is {window}: one of them is wrong")
    return window if slides else None
