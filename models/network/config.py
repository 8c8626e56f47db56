"""The shape of a decoder-only language model: blocks in layers, as data.

`ModelConfig` says everything that `decoder.py`, the export and the native core need to know. A layer is a mixer (attention, short
convolution, gated delta rule, Mamba-2, GRU or LSTM) and an MLP or a mixture of experts, each with its norms and its residual; what a layer
does not say of itself is what the model says, so that a uniform model is said once and a structurally pruned one is an ordinary
model. Which family's config.json says it how is `models/families`; constant multipliers, `1 + weight` norms and unusual orders of
rotation are folded into the weights while reading, so that nothing here knows of them.

`to_dict` / `from_dict` are the plain JSON of a bundle's manifest: fields that came with version 2 of the format are left out where
they have their default.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from runtime.errors import UserError
from runtime.token_ids import token_id, token_ids

MIXERS = ("attention", "conv", "delta", "mamba", "gru", "lstm")
GATED = {"gru": (3, 1), "lstm": (4, 2)}    # gates of the mixers that are gated recurrent units, and the vectors they keep
MOST_EXPERTS = 4096
LARGEST = 2**31 - 1        # no published size comes near; a corrupt number is refused before anything is allocated


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021): dimension i of a head turns with dimension i + head_dim / 2, for the first dims / 2.

    scaling: None, or {"rope_type", ...} with the parameters of one of rope.SCALINGS. share: of a head's dimensions that rotate.
    """

    theta: float = 10000.0
    scaling: dict | None = None
    share: float = 1.0

    def __post_init__(self):
        least = 1.0 if self.scaling and self.scaling.get("rope_type") == "yarn" else 0.0         # YaRN divides by its logarithm
        if not least < self.theta < math.inf:
            raise UserError(f"rope_theta is {self.theta}, which should be {'above 1' if least else 'positive'} and finite")

    def dims(self, head_dim: int) -> int:
        return 2 * int(self.share * head_dim // 2)


@dataclass(frozen=True)
class LayerConfig:
    """What differs by layer. heads, kv_heads, head_dim and state_dim by mixer:

    attention: query heads, key/value heads, their size.        conv: 0, 0 (it has as many channels as the stream).
    delta: value heads, key heads, the size of a key (head_dim) and of a value (state_dim).
    mamba: heads, groups (of B and C), the size of a head, and of its state (state_dim).
    gru, lstm: 1, 0, the vectors it keeps (1: h; 2: h and c), and their size (state_dim), which is the stream's; no MLP.
    """

    heads: int
    kv_heads: int
    mlp_size: int                           # of an expert where there are experts; 0 of a gru or lstm: no MLP
    mixer: str = "attention"
    head_dim: int | None = None             # None: the model's
    sliding_window: int | None = None       # None: the model's; 0: the layer sees everything
    rope: int = 0                           # 0: the model's; n: its ropes[n - 1]; -1: no positions
    cache_source: int | None = None         # attention: the earlier layer whose keys and values it reads
    kernel: int = 0                         # conv, delta, mamba: taps of the causal depthwise convolution
    state_dim: int = 0
    experts: int = 0                        # 0: a plain MLP
    experts_per_token: int = 0
    shared_size: int = 0                    # of an MLP beside the experts that every token passes


def gated_layer(mixer: str, hidden_size: int) -> LayerConfig:
    return LayerConfig(1, 0, 0, mixer, head_dim=GATED[mixer][1], rope=-1, state_dim=hidden_size)


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
    positions: str = "rope"                 # "rope", "learned" or "none"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None       # a token sees the last `sliding_window` positions, itself included
    activation: str = "silu"                # "silu", "gelu" or "gelu_tanh"
    gated_mlp: bool = True                  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    attention_bias: bool = False            # on q, k, v
    output_bias: bool = False               # on o
    mlp_bias: bool = False
    qk_norm: bool = False                   # RMSNorm on q and k
    tied_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # since version 2
    rope_share: float = 1.0                 # of the model's rope: see Rope
    ropes: tuple[Rope, ...] = ()            # more of them
    norm_order: str = "pre"                 # of a block: "pre" x + f(norm(x)), "post" x + norm(f(x)), "both"
    qk_norm_over: str = "head"              # "head": over head_dim, or "all": over all heads together
    qk_norm_last: bool = False              # after RoPE, not before
    v_norm: bool = False                    # RMSNorm over head_dim on v, without a gain
    attention_scale: float | None = None    # of q k^T; None: head_dim ** -0.5
    attention_gate: bool = False            # what heads give is multiplied by sigmoid(g(x))
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logits_softcap: float | None = None
    conv_bias: bool = False                 # conv: on its three linears too
    router: str = "softmax"                 # over all experts, "chosen": over those chosen, "sigmoid": of each
    router_normalized: bool = False         # the chosen experts' weights sum to 1
    router_bias: bool = False               # added to the scores for the choice alone
    per_layer_size: int = 0                 # of a token's own input to every layer (Gemma 4)
    layer_scalar: bool = False              # the stream is multiplied by a stored number after every layer

    def __post_init__(self):
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "head_dim": self.head_dim,
                 "context_length": self.context_length, "number of layers": len(self.layers)}
        if self.sliding_window is not None:
            sizes["sliding_window"] = self.sliding_window
        if self.per_layer_size:
            sizes["per_layer_size"] = self.per_layer_size
        for number, layer in enumerate(self.layers):
            sizes |= {f"{name} of layer {number}": value for name, value in _sizes(layer).items()}
            self._check_layer(number, layer)
        for name, value in sizes.items():
            if not 1 <= value <= LARGEST:
                raise UserError(f"{name} is {value}, which should be from 1 to {LARGEST}")
        for name in ("norm_eps", "rope_theta", "attention_scale", "attention_softcap", "logits_softcap"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, which should be positive and finite")
        for name in ("bos_token_id", "pad_token_id"):
            token_id(getattr(self, name), self.vocab_size, name)
        token_ids(list(self.eos_token_ids), self.vocab_size, "eos_token_id")

    def _check_layer(self, number: int, layer: LayerConfig) -> None:
        if layer.mixer not in MIXERS:
            raise UserError(f"layer {number} is of the kind {layer.mixer!r}, which is none of {', '.join(MIXERS)}")
        if layer.mixer in GATED and (layer.heads, layer.kv_heads, layer.head_dim, layer.state_dim, layer.mlp_size, layer.experts) != (
                1, 0, GATED[layer.mixer][1], self.hidden_size, 0, 0):
            raise UserError(f"layer {number} is a {layer.mixer.upper()} of another shape than one head of {GATED[layer.mixer][1]} by "
                            f"the hidden size of {self.hidden_size}, without an MLP")
        if layer.kv_heads > 0 and layer.heads % layer.kv_heads:
            raise UserError(f"layer {number} has {layer.heads} heads, which its {layer.kv_heads} key/value heads do not divide")
        if not -1 <= layer.rope <= len(self.ropes):
            raise UserError(f"layer {number} has RoPE {layer.rope} of {len(self.ropes) + 1}")
        if not 0 <= layer.experts <= MOST_EXPERTS:
            raise UserError(f"layer {number} has {layer.experts} experts, which should be from 0 (none) to {MOST_EXPERTS}")
        if layer.experts and not 1 <= layer.experts_per_token <= layer.experts:
            raise UserError(f"layer {number} chooses {layer.experts_per_token} experts of {layer.experts} for a token")
        size, rope = self.head_size(layer), self.rope(layer)
        if layer.mixer == "attention" and rope and size % 2:
            raise UserError(f"head_dim is {size}, which RoPE needs even")
        if rope and not 2 <= rope.dims(size) <= size:
            raise UserError(f"a share of {rope.share} of a head's {size} dimensions rotates, which should be 2 of them to all")
        if layer.cache_source is not None:
            source = self.layers[layer.cache_source] if 0 <= layer.cache_source < number else None
            if source is None or (source.mixer, source.kv_heads, self.head_size(source), source.cache_source) != (
                    "attention", layer.kv_heads, size, None):
                raise UserError(f"layer {number} reads the keys and values of layer {layer.cache_source}, which has none that fit")

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same shape."""
        return len(set(self.layers)) == 1

    @property
    def gated(self) -> str | None:
        """What its gated recurrent units are called, where it has some."""
        return next((layer.mixer.upper() for layer in self.layers if layer.mixer in GATED), None)

    @property
    def recurrent(self) -> bool:
        """Whether some layer keeps a state of its own beside or in place of keys and values."""
        return any(layer.mixer != "attention" for layer in self.layers)

    def head_size(self, layer: LayerConfig) -> int:
        return self.head_dim if layer.head_dim is None else layer.head_dim

    def window(self, layer: LayerConfig) -> int | None:
        """Positions an attention layer looks back on, itself included; None for all."""
        return (self.sliding_window if layer.sliding_window is None else layer.sliding_window) or None

    def rope(self, layer: LayerConfig) -> Rope | None:
        if self.positions != "rope" or layer.rope < 0:
            return None
        return self.ropes[layer.rope - 1] if layer.rope else Rope(self.rope_theta, self.rope_scaling, self.rope_share)

    @property
    def short_context(self) -> int:
        """Positions up to which every RoPE is the one that short texts were trained with: LongRoPE has another beyond."""
        scalings = [rope.scaling for rope in map(self.rope, self.layers) if rope and rope.scaling]
        return min([self.context_length, *(scaling["original_max_position_embeddings"] for scaling in scalings
                                           if scaling["rope_type"] == "longrope")])

    def scale(self, layer: LayerConfig) -> float:
        """Of attention's scores."""
        return self.head_size(layer) ** -0.5 if self.attention_scale is None else self.attention_scale

    def cache_heads(self, layer: LayerConfig) -> int:
        """Heads of keys and values that a layer keeps: 0 where it has none of its own."""
        return layer.kv_heads if layer.mixer == "attention" and layer.cache_source is None else 0

    def state_shapes(self, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
        """What a recurrent layer keeps of a row, in float32: "conv" [channels, kernel - 1], the inputs that the convolution still
        looks back on, and "state" [heads, head_dim, state_dim]."""
        size = self.head_size(layer)
        channels = {"attention": 0, "gru": 0, "lstm": 0, "conv": self.hidden_size,
                    "mamba": layer.heads * size + 2 * layer.kv_heads * layer.state_dim,
                    "delta": 2 * layer.kv_heads * size + layer.heads * layer.state_dim}[layer.mixer]
        shapes = {"conv": (channels, layer.kernel - 1), "state": (layer.heads, size, layer.state_dim)}
        return {name: shape for name, shape in shapes.items() if all(shape)}

    @classmethod
    def from_hf(cls, hf: dict) -> ModelConfig:
        """Read the contents of a config.json. Raises UserError naming the key and value that cannot be used."""
        from models.families import read_config
        return read_config(hf)

    def to_hf(self) -> dict:
        """The contents of a config.json that `transformers` reads (with `edgewright_layers` where it cannot).

        Raises ValueError for a combination that the family's keys do not express, such as gpt2 with RoPE.
        """
        from models.families import write_config
        return write_config(self)

    @property
    def publishable(self) -> bool:
        """Whether the family's own keys can say this shape, so that `transformers` opens the checkpoint."""
        return "edgewright_layers" not in self.to_hf()

    def to_dict(self) -> dict:
        """Plain JSON values, keyed by field name; layers as [{"heads", "kv_heads", "mlp_size"}, ...]."""
        data = {field.name: value for field in fields(self) if not _left_out(field, value := getattr(self, field.name))}
        data |= {"layers": [{field.name: value for field in fields(layer) if (value := getattr(layer, field.name)) != field.default}
                            for layer in self.layers], "eos_token_ids": list(self.eos_token_ids)}
        return data | ({"ropes": [asdict(rope) for rope in self.ropes]} if self.ropes else {})

    @classmethod
    def from_dict(cls, data: dict) -> ModelConfig:
        """Undo `to_dict`. Raises UserError where fields are missing or unknown."""
        known = {field.name for field in fields(cls)}
        try:
            if unknown := set(data) - known:
                raise UserError(f"the model configuration has unknown fields {sorted(unknown)}")
            return cls(**data | {"layers": tuple(LayerConfig(**layer) for layer in data["layers"]),
                                 "ropes": tuple(Rope(**rope) for rope in data.get("ropes", ())),
                                 "eos_token_ids": tuple(data.get("eos_token_ids", ()))})
        except (KeyError, TypeError) as error:
            raise UserError(f"the model configuration cannot be read: {error}") from None


_FIRST_VERSION = {field.name for field in fields(ModelConfig)[:[field.name for field in fields(ModelConfig)].index("rope_share")]}


def _left_out(field, value) -> bool:
    return field.name not in _FIRST_VERSION and value == field.default


def _sizes(layer: LayerConfig) -> dict[str, int]:
    """The sizes that a layer of its kind must have."""
    if layer.mixer in GATED:
        return {}
    names = {"conv": ["kernel"], "delta": ["heads", "kv_heads", "kernel", "state_dim"],
             "mamba": ["heads", "kv_heads", "kernel", "state_dim"]}.get(layer.mixer, ["heads", "kv_heads"])
    more = ["head_dim"] * (layer.head_dim is not None) + ["shared_size"] * (layer.shared_size != 0)
    return {name: getattr(layer, name) for name in [*names, *more, "mlp_size"]}
