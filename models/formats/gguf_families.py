"""What llama.cpp's converter made of each family's configuration and tensors, undone: a table by GGUF architecture.

A GGUF file's metadata become the keys of a config.json, and its tensors' names the published ones, by the `gguf` package's own map.
Values differ from the published ones in a few ways: gains are stored whole (where the family stores them less one); in architectures
of Llama's kind rows of q and k are interleaved, because ggml rotates neighbouring pairs of a head; experts are stacked; A_log is
stored as its effect, -exp(A_log); the value heads of a gated delta rule stand key head by key head.

Architectures that do not say something have llama.cpp's constant for it, which is named here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from torch import Tensor

from models.families import FAMILIES
from models.formats.weight_names import Part, places
from models.network.config import LayerConfig, ModelConfig
from runtime.errors import UserError

# What every published Llama 3 model has; `factor` (8 or 32) is read off the file.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
_EXPERTS = {f"moe.experts.{{e}}.{part}": f"mlp.experts.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
_SHARED = {f"moe.shared.{part}": f"mlp.shared_experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Architecture:
    """family: its model_type; more(file): the config.json keys beside those of every architecture; interleaved: rows of q and k;
    names: of modules that the converter renames, by the Decoder's names; unfused: whether it takes fused linears apart."""

    family: str
    more: Callable = lambda file: {}
    interleaved: bool = False
    names: dict | None = None
    unfused: bool = False


def _window(file, period: int, default: int | None = 0) -> dict:
    """sliding_window and layer_types; period: where the file has no pattern, each so manieth layer sees everything."""
    window, told = file.count("attention.sliding_window", default), file.take("attention.sliding_window_pattern", period)
    if not window:
        return {"sliding_window": None}
    slides = file.flags("attention.sliding_window_pattern") if isinstance(told, list) else [
        (number + 1) % file.size("attention.sliding_window_pattern", period) != 0 for number in range(file.layers)]
    return {"sliding_window": window, "layer_types": ["sliding_attention" if one else "full_attention" for one in slides]}


def _experts(file, function: int = 1) -> dict:
    """function: llama.cpp's number for how its router weighs: 1 softmax, 2 sigmoid."""
    if (told := file.take("expert_gating_func", function)) != function:
        raise UserError(f"{file.path}: {file.architecture}.expert_gating_func is {told!r}, and only {function} is supported")
    return {"num_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count"),
            "moe_intermediate_size": file.size("expert_feed_forward_length", file.size("feed_forward_length"))}


def _gemma(file, period: int, largest: int) -> dict:
    if file.layers == largest:
        raise UserError(f"{file.path}: a {file.architecture} of {largest} layers scales its attention otherwise than GGUF says; get the "
                        "model as a Hugging Face folder")
    names = [f"{name}_logit_softcapping" for name in ("attn", "final")]
    caps = {name: file.number(name) or None for name in names if f"{file.architecture}.{name}" in file.metadata}
    return _window(file, period, 4096 if period == 2 else 0) | caps | {
        "query_pre_attn_scalar": file.size("attention.key_length"), "hidden_activation": "gelu_pytorch_tanh"}


def _two_ropes(file, local: float) -> dict:
    """RoPE by kind of layer: scaling is that of layers without a window."""
    full = {"rope_type": "default"} | (file.rope_scaling() or {}) | {"rope_theta": file.number("rope.freq_base")}
    sliding = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", local)}
    return {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _olmo(file) -> dict:
    window = _window(file, 4)
    return window | (_two_ropes(file, file.number("rope.freq_base")) if window["sliding_window"] else {})


def _gemma4(file) -> dict:
    widths, heads = file.sizes("feed_forward_length"), file.sizes("attention.head_count_kv")
    window, factors = _window(file, 0, None), file.vector("rope_freqs.weight") or [1.0]
    slides = [kind == "sliding_attention" for kind in window["layer_types"]]
    full, sliding = file.size("attention.key_length"), file.size("attention.key_length_swa")
    each = dict(zip(slides, heads)) if len(heads) > 1 else {True: heads[0], False: heads[0]}
    ropes = _two_ropes(file, 10000.0)["rope_parameters"]
    ropes["full_attention"] |= {"rope_type": "proportional", "partial_rotary_factor": sum(one == 1 for one in factors) / len(factors)}
    return window | {
        "head_dim": sliding, "intermediate_size": min(widths), "use_double_wide_mlp": len(set(widths)) > 1, "rope_theta": None,
        "num_key_value_heads": each[True], "rope_parameters": ropes, "num_kv_shared_layers": file.count("attention.shared_kv_layers"),
        "hidden_size_per_layer_input": file.count("embedding_length_per_layer_input"), "vocab_size_per_layer_input": file.rows(
            "token_embd.weight"), "final_logit_softcapping": file.number("final_logit_softcapping", 0.0) or None,
        "per_layer_config": {str(number): {"head_dim": full, "num_key_value_heads": each[False]}
                             for number, slid in enumerate(slides) if not slid}}


def _granite(file) -> dict:
    return {"embedding_multiplier": file.number("embedding_scale", 1.0), "residual_multiplier": file.number("residual_scale", 1.0),
            "attention_multiplier": file.number("attention.scale"), "logits_scaling": file.number("logit_scale", 1.0),
            "intermediate_size": file.size("expert_shared_feed_forward_length", file.same("feed_forward_length"))}


def _granite_hybrid(file) -> dict:
    heads, count = file.sizes("attention.head_count_kv"), file.count("expert_count")
    inner, ranks = file.size("ssm.inner_size"), file.size("ssm.time_step_rank")
    nope = file.count("rope.dimension_count") == 0 or file.take("rope.scaling.finetuned", True) is False
    return _granite(file) | {
        "intermediate_size": file.same("feed_forward_length"),
        "layer_types": ["attention" if one else "mamba" for one in heads], "num_key_value_heads": max(heads),
        "mamba_n_heads": ranks, "mamba_d_head": inner // ranks, "mamba_d_state": file.size("ssm.state_size"),
        "mamba_n_groups": file.size("ssm.group_count"), "mamba_d_conv": file.size("ssm.conv_kernel"),
        "mamba_expand": inner // file.size("embedding_length"), "mamba_conv_bias": file.holds("blk.{n}.ssm_conv1d.bias"),
        "position_embedding_type": "nope" if nope else "rope", "num_local_experts": count,
        "num_experts_per_tok": file.count("expert_used_count") if count else 1,
        "shared_intermediate_size": file.size("expert_shared_feed_forward_length", file.size("feed_forward_length"))}


def _lfm2(file) -> dict:
    heads = file.sizes("attention.head_count_kv")
    return {"layer_types": ["full_attention" if one else "conv" for one in heads], "num_key_value_heads": max(heads),
            "conv_L_cache": file.size("shortconv.l_cache"), "conv_bias": file.holds("blk.{n}.shortconv.conv.bias"),
            "norm_eps": file.number("attention.layer_norm_rms_epsilon"), "block_auto_adjust_ff_dim": False}


def _lfm2_moe(file) -> dict:
    found = {key: value for key, value in _lfm2(file).items() if key != "block_auto_adjust_ff_dim"}
    return found | _experts(file, 2) | {"num_dense_layers": file.count("leading_dense_block_count"), "norm_topk_prob": True,
                                     "use_expert_bias": file.holds("blk.{n}.exp_probs_b.bias")}


def _qwen35(file) -> dict:
    every, values = file.size("full_attention_interval", 4), file.size("ssm.time_step_rank")
    recurrent = file.flags("attention.recurrent_layers") or [(number + 1) % every != 0 for number in range(file.layers)]
    return {"linear_num_value_heads": values, "linear_num_key_heads": file.size("ssm.group_count"),
            "linear_key_head_dim": file.size("ssm.state_size"), "linear_value_head_dim": file.size("ssm.inner_size") // values,
            "linear_conv_kernel_dim": file.size("ssm.conv_kernel"),
            "layer_types": ["linear_attention" if one else "full_attention" for one in recurrent],
            "partial_rotary_factor": file.size("rope.dimension_count") / file.size("attention.key_length")}


def _phi3(file) -> dict:
    size = file.size("embedding_length") // file.size("attention.head_count")
    found = {"sliding_window": file.count("attention.sliding_window") or None, "rope_scaling": None,
             "partial_rotary_factor": file.size("rope.dimension_count", size) / size}
    factors = [file.vector(f"rope_factors_{name}.weight") for name in ("short", "long")]
    if factors[0] is not None:
        found["rope_scaling"] = {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[1],
                                 "original_max_position_embeddings": file.size("rope.scaling.original_context_length"),
                                 "attention_factor": file.number("rope.scaling.attn_factor")}
    return found


def _mistral3(file) -> dict:
    scaling = file.rope_scaling()
    beta, scale = file.number("attention.temperature_scale", 0.0), file.number("rope.scaling.yarn_log_multiplier", 1.0)
    return {"rope_scaling": scaling and scaling | {"llama_4_scaling_beta": beta, "mscale": scale, "mscale_all_dim": scale}}


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"), "qwen3": Architecture("qwen3"), "gpt2": Architecture("gpt2"),
    "qwen3moe": Architecture("qwen3_moe", lambda file: _experts(file) | {"norm_topk_prob": True}, names=_EXPERTS),
    "olmoe": Architecture("olmoe", lambda file: _experts(file) | {"norm_topk_prob": False}, names=_EXPERTS),
    "qwen35": Architecture("qwen3_5_text", _qwen35),
    "smollm3": Architecture("smollm3", interleaved=True),
    "phi3": Architecture("phi3", _phi3),
    "granite": Architecture("granite", _granite, interleaved=True),
    "granitehybrid": Architecture("granitemoehybrid", _granite_hybrid, interleaved=True, unfused=True, names=_EXPERTS | _SHARED | {
        f"mlp.{part}": f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}),
    "gemma2": Architecture("gemma2", lambda file: _gemma(file, 2, 46)),
    "gemma3": Architecture("gemma3_text", lambda file: _gemma(file, 6, 62) | _two_ropes(file, 10000.0)),
    "gemma4": Architecture("gemma4_text", _gemma4),
    "lfm2": Architecture("lfm2", _lfm2),
    "lfm2moe": Architecture("lfm2_moe", _lfm2_moe, names={
        f"moe.experts.{{e}}.{ours}": f"feed_forward.experts.{theirs}.weight"
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))}),
    "olmo2": Architecture("olmo2", _olmo),
    "exaone4": Architecture("exaone4", lambda file: _window(file, 4)),
    "mistral3": Architecture("ministral3", _mistral3, interleaved=True),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", lambda file: {"rope_scaling": None}),
    "ernie4_5": Architecture("ernie4_5", lambda file: {"use_bias": file.holds("blk.{n}.attn_q.bias")}),
}


def family_of(file) -> str:
    """OLMo 3 is an olmo2 with windows."""
    family = ARCHITECTURES[file.architecture].family
    return "olmo3" if family == "olmo2" and file.count("attention.sliding_window") else family


def hf_config(file) -> dict:
    """The contents of a config.json that say what the metadata of `file` say."""
    gpt2 = file.architecture == "gpt2"
    heads, hidden = file.same("attention.head_count"), file.size("embedding_length")
    own = file.architecture == "gemma4"                          # whose layers' sizes differ, and are read there
    hf = {"model_type": family_of(file), "hidden_size": hidden, "num_hidden_layers": file.layers,
          "num_attention_heads": heads, "num_key_value_heads": own or file.same("attention.head_count_kv", heads),
          "intermediate_size": own or file.same("feed_forward_length"), "max_position_embeddings": file.size("context_length"),
          # llama.cpp's constant, where it is the family's too
          "rope_theta": None if gpt2 else file.number("rope.freq_base", 10000.0 if FAMILIES[family_of(file)].theta == 10000 else None),
          "rope_scaling": file.rope_scaling(),
          "head_dim": file.size("attention.key_length", hidden // heads), "vocab_size": file.rows("token_embd.weight"),
          "attention_bias": file.holds("blk.{n}.attn_q.bias"), "mlp_bias": file.holds("blk.{n}.ffn_up.bias")}
    hf["rms_norm_eps"] = None if gpt2 else file.number("attention.layer_norm_rms_epsilon")
    if gpt2:
        return {key: hf[key] for key in ("model_type", "vocab_size")} | {
            "n_embd": hidden, "n_layer": hf["num_hidden_layers"], "n_head": heads, "n_inner": hf["intermediate_size"],
            "n_positions": hf["max_position_embeddings"], "layer_norm_epsilon": file.number("attention.layer_norm_epsilon")}
    rotated, size = file.count("rope.dimension_count", hf["head_dim"]), hf["head_dim"]
    hf |= ARCHITECTURES[file.architecture].more(file)
    if rotated not in (0, size) and hf.get("partial_rotary_factor") is None and not own:
        raise UserError(f"{file.path}: {rotated} of a head's {size} dimensions rotate; only all are supported")
    known = FAMILIES[hf["model_type"]].read | {"attention_bias", "mlp_bias"}
    return {key: value for key, value in hf.items() if key in known or key in (
        "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "max_position_embeddings")}


def tensor_parts(file, config: ModelConfig, hf: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[tuple[str, Part]]]:
    """GGUF tensor -> the Decoder's tensors that it holds."""
    told, naming = ARCHITECTURES[file.architecture], FAMILIES[config.family].naming
    fused = tuple(entry for entry in naming.fused if not told.unfused or entry[0].startswith("mamba")) if told.unfused else naming.fused
    names = naming.names | (told.names or {})
    naming = replace(naming, names=names, fused=fused, less_one=(), flat=True, transposed=(), interleaved=told.interleaved
                     or naming.interleaved, stacked=tuple(theirs for ours, theirs in names.items() if "{e}" in ours and "{e}" not in theirs))
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table, found = gguf.get_tensor_name_map(arch, len(config.layers)), {}
    for theirs, held in places(naming, config, hf, shapes).items():
        plain = theirs.replace(".dt_bias", ".dt_proj.bias")
        plain = f"{plain}.bias" if plain.endswith("expert_bias") else plain
        tries = [f"{plain}.weight" if plain.endswith("layer_scalar") else plain, plain.removeprefix("model.")]
        name = next((name for one in tries if (name := table.get_name(one, (".weight", ".bias")))), None)
        if name is None:
            raise UserError(f"{file.path}: GGUF has no name for {theirs} in architecture {file.architecture!r}")
        found[name] = held
    return found


def undone(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """A Decoder's tensor of what the file holds."""
    parts = name.split(".")
    if parts[-1] == "A_log":
        tensor = torch.log(-tensor.float())
    layer = config.layers[int(parts[2])] if parts[1] == "layers" else None
    if layer is None or layer.mixer != "delta" or parts[3] != "linear_attn" or layer.heads == layer.kv_heads:
        return tensor
    return _by_key_head(config, layer, parts[4], tensor)


def _by_key_head(config: ModelConfig, layer: LayerConfig, module: str, tensor: Tensor) -> Tensor:
    """Value heads in the order of the key heads that serve them; in the file the first of every key head come first."""
    each, keys = layer.heads // layer.kv_heads, 2 * layer.kv_heads * config.head_size(layer)
    order = torch.arange(layer.heads).view(each, layer.kv_heads).T.flatten()
    rows = (order[:, None] * layer.state_dim + torch.arange(layer.state_dim)).flatten()
    if module in ("b_proj", "a_proj", "A_log", "dt_bias"):
        return tensor[order]
    if module == "z_proj":
        return tensor[rows]
    if module in ("qkv_proj", "conv"):
        return torch.cat((tensor[:keys], tensor[keys:][rows]))
    return tensor[:, rows] if module == "out_proj" else tensor


def llama3_scaling(factors: np.ndarray) -> dict:
    """Llama 3's RoPE scaling is stored as its result, one factor a frequency."""
    return {"rope_type": "llama3", "factor": round(float(factors.max()), 3), **LLAMA3_SCALING}
