"""How a family's config.json says a model's shape: a table of keys, and readers for what many families say alike.

A key that by its name changes what a model computes, and that the family's table does not read, is refused unless its value
switches it off: nothing is ignored that would make an answer wrong.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from models.formats.weight_names import Naming
from models.network.config import LayerConfig, ModelConfig, Rope
from models.network.rope import SCALINGS
from runtime.errors import UserError

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Names of keys that change arithmetic, in any family of transformers. Those a family reads are in its table; of what is left
# only values that switch something off are taken.
ARITHMETIC = re.compile("""soft_?cap|multiplier|scal(e|ing)|clip|alibi|parallel_(attn|residual)|qk_?(layer_?)?norm|norm_type
    |norm_strategy|normali[sz]e|(pre|post)_norm|rope|rotary|nope|expert|moe|window|chunk|sink|logn|ntk|temperature_tuning|mup
    |hidden_act|activation|layer_types?$|causal|bidirectional|residual|attention_type|pre_attn_scalar|embedding_type
    |dim_model_base|sparsity|^scale$|cross_attention|mamba|linear_|conv|full_attn|norm_topk|double_wide|k_eq_v|kv_shared|per_layer
    |output_gate|router|mlp_only|decoder_sparse|adjust_ff|ffn_dim|block_multiple|interval|time_step""", re.VERBOSE)
# Keys that nobody computes with when a model runs, whatever their names say.
INERT_KEYS = re.compile("dropout|pdrop|^summary_|_in_fp32$|initializer|init_|max_window_layers|^use_sliding_window$|aux_loss"
                        "|^output_router_logits$|^mamba_chunk_size$|^mamba_ssm_dtype$|^mtp_|^mamba_expand$|^use_mamba_kernels$|^router_jitter")
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"}
KINDS = ("full_attention", "sliding_attention")
LEGACY_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}
_MOST_LAYERS, _MOST_ALPHA = 1000, 10**9


@dataclass(frozen=True)
class Family:
    """keys: what they say in our words -> (its key, type, what a missing key means to transformers; none: it must be there).

    more(hf, shape) gives fields of ModelConfig that a table cannot say, from the keys named in `reads`; shape: what the table gave,
    among it "layers", all alike. back(config) gives the config.json keys that `more` reads.
    """

    architecture: str
    keys: dict[str, tuple]
    naming: Naming = Naming()
    fixed: dict = field(default_factory=dict)           # fields of ModelConfig that no key changes
    biases: tuple[str, ...] = ()                        # keys that switch biases on; the attention's is the output's too
    kv_heads: int | None = None                         # where that key is missing; None: as many as heads
    head_dim: int | None = None                         # where that key is missing; None: hidden size / heads
    window: str = ""                                    # "always", "asked" (use_sliding_window) or "" (the family has none)
    window_size: int | None = 4096                      # of "always", where sliding_window is missing
    pattern: Callable[[dict, int], list[str]] | None = None     # kinds of layers where layer_types is missing
    tied: bool = False                                  # where tie_word_embeddings is missing
    theta: float = 10000.0                              # where rope_theta is missing
    partial: float | None = None                        # where partial_rotary_factor is missing; None: all of a head rotates
    hybrid: bool = False                                # whether `more` reads layer_types, with kinds of its own
    # where rope_parameters are told by kind of layer: what each is where nothing is said
    nested: dict[str, Rope] = field(default_factory=dict)
    local: str = ""                                     # its older key for the theta of layers with a window; their scaling is none
    unseen: tuple[str, ...] = ()                        # RoPE parameters that text alone does not see
    missing: dict[str, object] = field(default_factory=dict)        # keys that published files leave out -> what is meant
    only: dict[str, object] = field(default_factory=dict)           # keys with one value that is supported
    aliases: dict[str, str] = field(default_factory=dict)           # another name of a key -> the key
    reads: frozenset[str] = frozenset()
    more: Callable[[dict, dict], dict] | None = None
    back: Callable[[ModelConfig], dict] | None = None

    @property
    def read(self) -> set[str]:
        """Its keys that change arithmetic."""
        rope = ROPE_KEYS if self.fixed.get("positions", "rope") == "rope" else set()
        return rope | {key for key, *_ in self.keys.values()} | {*self.only} | self.reads | (
            {"sliding_window"} if self.window else set())


LLAMA_KEYS = {
    "hidden_size": ("hidden_size", int), "mlp_size": ("intermediate_size", int), "layers": ("num_hidden_layers", int),
    "heads": ("num_attention_heads", int), "kv_heads": ("num_key_value_heads", int, None), "head_dim": ("head_dim", int, None),
    "activation": ("hidden_act", str, "silu"), "context_length": ("max_position_embeddings", int),
    "norm_eps": ("rms_norm_eps", float, 1e-6)}


def off(key: str, value) -> bool:
    """Whether a value leaves arithmetic alone: null, false, 0, 1, empty; for is_causal, true."""
    if type(value) is bool:
        return value == (key == "is_causal")
    return value in (None, 0, 1, "", [], {})


_REQUIRED = object()


def take(hf: dict, key: str, kind: type, default=_REQUIRED):
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


def positive(hf: dict, key: str, default=_REQUIRED) -> float:
    """A number above 0 and finite."""
    value = take(hf, key, float, default)
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{key} is {value}, which should be positive and finite")
    return value


def whole(hf: dict, key: str, default, least: int = 1) -> int:
    """A number of something, `least` or more."""
    value = take(hf, key, int, default)
    if value is not None and value < least:
        raise UserError(f"{key} is {value}, which should be at least {least}")
    return value


def numbers(hf: dict, key: str, count: int, default=None) -> list[int] | None:
    """Some of `count` layers, by number."""
    listed = take(hf, key, list, default)
    if listed is not None and not all(type(one) is int and 0 <= one < count for one in listed):
        raise UserError(f"{key} is {listed!r:.60}, which should be numbers of layers, from 0 to {count - 1}")
    return listed


def alike(hf: dict, count: int, every: LayerConfig) -> tuple[LayerConfig, ...]:
    """`count` layers of one shape."""
    if not 1 <= count <= _MOST_LAYERS:
        raise UserError(f"the number of layers is {count}, which should be from 1 to {_MOST_LAYERS}")
    return (every,) * count


def reshaped(hf: dict, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers with the heads and widths of `edgewright_layers`, where the model has it."""
    listed = take(hf, "edgewright_layers", list, None)
    if listed is None:
        return layers
    if len(listed) != len(layers):
        raise UserError(f"edgewright_layers describes {len(listed)} layers of {len(layers)}")
    for item in listed:
        if not (isinstance(item, list) and len(item) == 3 and all(type(value) is int for value in item)):
            raise UserError(f"edgewright_layers holds {item!r}, which should be [heads, kv_heads, mlp_size]")
    return tuple(replace(layer, heads=item[0], kv_heads=item[1], mlp_size=item[2]) for layer, item in zip(layers, listed))


def kinds_of(hf: dict, count: int, known: tuple[str, ...], pattern: Callable[[dict, int], list[str]]) -> list[str]:
    """layer_types, or where it is missing what `pattern` says: one of `known` for each layer."""
    kinds = take(hf, "layer_types", list, None)
    kinds = pattern(hf, count) if kinds is None else [LEGACY_KINDS.get(str(kind), kind) for kind in kinds]
    if len(kinds) != count:
        raise UserError(f"layer_types names {len(kinds)} of {count} layers")
    for kind in kinds:
        if kind not in known:
            raise UserError(f"layer_types has {kind!r}, which is not supported here: supported are {', '.join(known)}")
    return kinds


def windows(hf: dict, family: Family, layers: tuple[LayerConfig, ...]) -> dict:
    """sliding_window and layers, with what layer_types and the family's keys say of them."""
    window, count = None, len(layers)
    told = take(hf, "sliding_window", int, None) if family.window else None
    if family.window == "always" or family.window and take(hf, "use_sliding_window", bool, False):
        window = told if "sliding_window" in hf else family.window_size     # null means none

    def usual(hf: dict, count: int) -> list[str]:
        first = count if window is None else 0
        if first == 0 and family.window == "asked":
            first = max(0, min(take(hf, "max_window_layers", int, 28), count))
        return ["full_attention"] * first + ["sliding_attention"] * (count - first)
    kinds = kinds_of(hf, count, KINDS, family.pattern if family.pattern and window is not None else usual)
    slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) and window is None:
        raise UserError("layer_types has sliding_attention, and the sliding window is None: one of them is wrong")
    if not any(slides) and window and family.window == "always" and not family.pattern:
        raise UserError(f"layer_types says full_attention, and the sliding window is {window}: one of them is wrong")
    mixed = any(slides) and not all(slides)
    return {"sliding_window": window if any(slides) else None,
            "layers": tuple(replace(layer, sliding_window=0) if mixed and not slid else layer for layer, slid in zip(layers, slides))}


def rope(hf: dict, theta: float = 10000.0, partial: float | None = None, head_dim: int = 0, context: int = 0) -> Rope:
    """theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    found, outer = {}, take(hf, "rope_theta", float, None)
    for key in ("rope_parameters", "rope_scaling"):
        part = dict(take(hf, key, dict, None) or {})
        if part:
            old = part.pop("type", None)
            part["rope_type"] = old if part.get("rope_type") is None else part["rope_type"]
        for name, value in part.items():
            if found.setdefault(name, value) != value:
                raise UserError(f"rope_parameters and rope_scaling disagree in {name}: {found[name]!r} and {value!r}")
    inner = take(found, "rope_theta", float, theta if outer is None else outer)
    if outer not in (None, inner):
        raise UserError(f"rope_theta is {outer} and within rope_parameters {inner}: readers take one or the other, so remove "
                        f"the wrong one")
    kind = take(found, "rope_type", str, "default")
    kind = "longrope" if kind == "su" else kind
    if kind == "dynamic" and found.get("alpha") and head_dim > 2:       # HunYuan's: a plain one with a larger theta
        if (alpha := positive(found, "alpha")) > _MOST_ALPHA:
            raise UserError(f"alpha is {alpha}, which should be at most {_MOST_ALPHA}")
        inner *= alpha ** (head_dim / (head_dim - 2))
        kind, found = "default", {"rope_type": "default"}
    if kind not in ("default", *SCALINGS):
        raise UserError(f"RoPE scaling {kind!r} is not supported: supported are none, {', '.join(SCALINGS)}")
    share = found.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial is None and (share not in (None, 1) or type(share) is bool):
        raise UserError(f"partial_rotary_factor {share} is not supported here: every dimension of a head must rotate")
    share = (partial or 1.0) if share is None else share
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"partial_rotary_factor is {share!r}, which should be a share of a head, above 0 and up to 1")
    key = "original_max_position_embeddings"
    original = take(hf, key, float, None) if kind != "default" else None
    if original is not None and found.get(key) not in (None, original):
        raise UserError(f"{key} is {original:g} and among the RoPE parameters {found[key]!r:.40}: remove the wrong one")
    scaling = {"rope_type": kind, key: original if original is not None else context or None} | {k: v for k, v in found.items() if v is not None}
    known = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings"} | set(
        SCALINGS.get(kind, {})) | ({"mscale", "mscale_all_dim"} if kind == "yarn" else set()) | (
        {"factor"} if kind == "longrope" else set())
    for name, value in found.items():
        if name not in known | {"rope_type"} and not off(name, value):
            raise UserError(f"{name} {value!r} among the RoPE parameters is not supported with rope_type {kind!r}")
    return Rope(inner, None if kind == "default" else _scaling(kind, scaling, 2 * int(share * head_dim // 2), context), float(share))


def _scaling(kind: str, given: dict, dims: int, context: int) -> dict:
    """The parameters of one way of scaling, checked, with what transformers makes of those that are missing."""
    found = {"rope_type": kind}
    for name, default in SCALINGS[kind].items():
        required = () if default is not None else (_REQUIRED,)
        if name in ("short_factor", "long_factor"):
            values = take(given, name, list)
            if len(values) != dims // 2 or not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
                raise UserError(f"{name} should be {dims // 2} positive numbers, one for each pair of dimensions that rotate")
            found[name] = [float(value) for value in values]
        elif name == "truncate":
            found[name] = take(given, name, bool, default)
        else:
            found[name] = take(given, name, float, *(required or (default,)))
            if name != "llama_4_scaling_beta" and not 0 < found[name] < math.inf:
                raise UserError(f"the RoPE scaling's {name} is {found[name]}, which should be positive and finite")
    if "original_max_position_embeddings" in found:
        original = found["original_max_position_embeddings"]
        if not original.is_integer() or original < 2:
            raise UserError(f"the RoPE scaling's original_max_position_embeddings is {original}, which should be a whole number of 2 or "
                            "more")
        found["original_max_position_embeddings"] = int(original)
    if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        raise UserError(f"the RoPE scaling {found} should be positive, low_freq_factor below high_freq_factor")
    if given.get("attention_factor") is None and kind in ("yarn", "longrope"):
        found["attention_factor"] = _attention_factor(kind, given, found, context)
    return found


def _attention_factor(kind: str, given: dict, found: dict, context: int) -> float:
    def magnitude(factor: float, scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    if kind == "yarn":
        scales = [take(given, name, float, None) for name in ("mscale", "mscale_all_dim")]
        return magnitude(found["factor"], scales[0]) / magnitude(found["factor"], scales[1]) if all(scales) else magnitude(found["factor"])
    original = found["original_max_position_embeddings"]
    factor = take(given, "factor", float, context / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def ropes(hf: dict, family: Family, shape: dict) -> dict:
    """The fields of ModelConfig on rotary positions; where rope_parameters are told by kind of layer, layers are told theirs."""
    size, context, layers = shape["head_dim"], shape["context_length"], shape["layers"]
    told, old = (take(hf, key, dict, {}) for key in ("rope_parameters", "rope_scaling"))
    if not family.nested:
        seen = {key: {name: value for name, value in part.items() if name not in family.unseen}
                for key, part in (("rope_parameters", told), ("rope_scaling", old))}
        one = rope(hf | seen, family.theta, family.partial, size, context)
        return {"rope_theta": one.theta, "rope_scaling": one.scaling, "rope_share": one.share}
    outer = {"rope_theta": hf.get("rope_theta"), "rope_scaling": old}
    if strays := [*(set(told) - set(KINDS)), *(key for key in outer if not family.local and outer[key])]:
        raise UserError(f"RoPE's {strays[0]} is not supported here: this family's rope_parameters are told by {' and '.join(KINDS)}")
    rest = {key: value for key, value in hf.items() if key not in ROPE_KEYS}
    found = []
    for kind, flat in zip(KINDS, (outer, {"rope_theta": hf.get(family.local)})):
        given, usual = take(told, kind, dict, {}), family.nested[kind]
        found.append(rope(rest | flat | {"rope_parameters": given}, usual.theta, family.partial, size, context)
                     if given or any(flat.values()) else usual)
    return two_ropes(*found, layers, [layer.sliding_window != 0 and shape["sliding_window"] is not None for layer in layers])


def two_ropes(full: Rope, sliding: Rope, layers: tuple[LayerConfig, ...], slides: list[bool]) -> dict:
    """The fields of ModelConfig where layers with a window rotate otherwise than those without."""
    first, second = (sliding, full) if slides[0] else (full, sliding)
    shape = {"rope_theta": first.theta, "rope_scaling": first.scaling, "rope_share": first.share}
    if second == first or all(slides) or not any(slides):
        return shape
    return shape | {"ropes": (second,),
                    "layers": tuple(replace(layer, rope=int(slid != slides[0])) for layer, slid in zip(layers, slides))}


def rope_keys(config: ModelConfig, nested: dict) -> dict:
    """The config.json keys that `ropes` reads. Both spellings where one rope serves all: transformers 5 reads rope_parameters, 4 the
    other two (and would fall back to theta 10000)."""
    def told(one: Rope) -> dict:
        share = {} if one.share == 1 else {"partial_rotary_factor": one.share}
        return {"rope_type": "default"} | (one.scaling or {}) | {"rope_theta": one.theta} | share
    one = Rope(config.rope_theta, config.rope_scaling, config.rope_share)
    if nested:
        by_kind = {kind: next((config.rope(layer) for layer in config.layers if kind == kind_of(config, layer)), one) for kind in KINDS}
        return {"rope_parameters": {kind: told(found) for kind, found in by_kind.items()}}
    return {"rope_theta": one.theta, "rope_scaling": one.scaling and dict(one.scaling), "rope_parameters": told(one)} | (
        {} if one.share == 1 else {"partial_rotary_factor": one.share})


def kind_of(config: ModelConfig, layer: LayerConfig) -> str:
    """A layer's entry of layer_types."""
    return KINDS[config.window(layer) is not None]
