"""Write a transformers model as a GGUF file the way llama.cpp's convert_hf_to_gguf.py does, for tests that read one.

Tensor names come from the `gguf` package's own table; metadata keys and what is done to values are the converter's, held against
its files. Types the package cannot quantize to (K-quants) get random blocks with sane scales.
"""

import copy
import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {"mistral": "llama", "qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35", "gemma3_text": "gemma3", "gemma4_text": "gemma4",
                 "granitemoehybrid": "granitehybrid", "lfm2_moe": "lfm2moe", "olmo3": "olmo2", "ministral3": "mistral3",
                 "hunyuan_v1_dense": "hunyuan-dense"}                      # model_type: GGUF's name, where it is another
INTERLEAVED = ("llama", "smollm3", "granite", "granitehybrid", "mistral3")         # rows of q and k
# What GGUF cannot say of the models in tiny.py, and what llama.cpp takes in its place: said so, a file and its model are one.
SAID = {"llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},     # llama.cpp's factors are of 8192 positions
        "mistral": {"sliding_window": None}, "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
        "granite": {"attention_bias": False, "mlp_bias": False},
        "gemma2": {"query_pre_attn_scalar": 32}, "gemma3": {"query_pre_attn_scalar": 32, "num_hidden_layers": 6, "layer_types": None},
        "hunyuan": {"max_position_embeddings": 256 * 1024}, "lfm2": {"conv_bias": False}, "lfm2_moe": {"routed_scaling_factor": 1.0},
        "granite4_tiny": {"position_embedding_type": "nope"}, "qwen3_moe": {"mlp_only_layers": []}}
SCALE_BYTES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)} | dict.fromkeys(
    ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0, 2))     # of a block's fp16 scales


def write_gguf(path: Path, model, tokenizer=None, kind: str = "F32", pre: str = "smollm", extra: dict | None = None,
               tensors: dict | None = None, split: int = 0) -> Path:
    """`kind` is the type of every matrix (vectors stay F32). `extra` overrides metadata and `tensors` tensors, as
    name -> (type, float32 array), where None leaves the key or the tensor out. split: so many tensors a part."""
    config = copy.deepcopy(model.config)
    if config.model_type == "gemma4_text":                                   # transformers keeps its two head sizes by layer
        config.allow_global_per_layer_attribute_access = True
        config.global_head_dim = max(len(layer.self_attn.q_norm.weight) for layer in model.model.layers)
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    fields = _metadata(architecture, config) | (_tokenizer_metadata(tokenizer, pre) if tokenizer else {})
    fields |= extra or {}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", architecture), split_max_tensors=split)
    for key, value in fields.items():
        _add(writer, key, value)
    stored = {name: (kind if values.ndim > 1 and ".ssm_conv" not in name else "F32", values)
              for name, values in _tensors(architecture, config, model)}
    for name, change in (stored | (tensors or {})).items():
        if change is not None:
            writer.add_tensor(name, encode(change[1], change[0]), raw_dtype=Type[change[0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [rows, columns] as the bytes of GGUF type `kind`; random blocks of about its spread where gguf only reads it."""
    if values.dtype != np.float32:
        return values
    if kind not in (*SCALE_BYTES, "IQ1_M", "NVFP4"):
        return gguf.quantize(values, Type[kind])
    elements, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
    if kind not in SCALE_BYTES:                              # scales of small exponents, in other places than an fp16's
        byte = 55 if kind == "IQ1_M" else slice(4)
        blocks[:, byte] &= 0x2F
        return blocks.reshape(values.shape[0], -1)
    start, stop = SCALE_BYTES[kind]
    scales = random.uniform(0.2, 1.0, (len(blocks), (stop - start) // 2)) * values.std() / 1000
    blocks[:, start:stop] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def _add(writer, key: str, value) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


# GGUF's keys -> the configuration's, of every architecture; where a configuration has none (or null), nothing is written
_KEYS = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
         "feed_forward_length": "intermediate_size", "vocab_size": "vocab_size", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim", "attention.value_length": "head_dim",
         "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attn_logit_softcapping": "attn_logit_softcapping",
         "final_logit_softcapping": "final_logit_softcapping", "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
         "expert_feed_forward_length": "moe_intermediate_size"}
_GRANITE = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling"}
_LFM2 = {"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"}
_MORE_KEYS = {
    "gpt2": {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, "granite": _GRANITE, "lfm2": _LFM2,
    "granitehybrid": _GRANITE | {
        "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.group_count": "mamba_n_groups",
        "ssm.time_step_rank": "mamba_n_heads", "expert_count": "num_local_experts",
        "expert_shared_feed_forward_length": "shared_intermediate_size"},
    "lfm2moe": _LFM2 | {"leading_dense_block_count": "num_dense_layers"},
    "qwen35": {"ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
               "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads"},
    "gemma4": {"attention.key_length": "global_head_dim", "attention.value_length": "global_head_dim",
               "attention.key_length_swa": "head_dim", "attention.value_length_swa": "head_dim", "rope.dimension_count": "global_head_dim",
               "rope.dimension_count_swa": "head_dim", "embedding_length_per_layer_input": "hidden_size_per_layer_input",
               "attention.shared_kv_layers": "num_kv_shared_layers"},
} | dict.fromkeys(("gemma2", "gemma3", "olmo2", "exaone4"), {"attention.sliding_window": "sliding_window"})


def _metadata(architecture: str, config) -> dict:
    fields = {key: value for key, ours in (_KEYS | _MORE_KEYS.get(architecture, {})).items()
              if (value := getattr(config, ours, None)) is not None}
    if architecture == "gpt2":
        fields["feed_forward_length"] = config.n_inner or 4 * config.n_embd
    else:
        fields |= _rope_metadata(architecture, config)
    return {f"{architecture}.{key}": value for key, value in (fields | _computed(architecture, config)).items()}


def _rope_metadata(architecture: str, config) -> dict:
    rope, size = _rope(config), _head_dim(config)
    fields = {"rope.freq_base": rope["rope_theta"]} | ({"rope.dimension_count": size} if architecture in INTERLEAVED else {})
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    fields |= {f"rope.scaling.yarn_{key}": rope[ours] for key, ours in (
        ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"), ("attn_factor", "attention_factor")) if rope.get(ours) is not None}
    if rope["rope_type"] in ("longrope", "yarn"):
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if "sliding_attention" in config.rope_parameters:
        fields["rope.freq_base_swa"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope and rope["rope_type"] != "proportional":
        fields["rope.dimension_count"] = int(rope["partial_rotary_factor"] * size)
    return fields


def _computed(architecture: str, config) -> dict:
    """What is no configuration's key as it is."""
    kinds, rope = getattr(config, "layer_types", None) or [], {} if architecture == "gpt2" else _rope(config)
    slides, heads = [kind == "sliding_attention" for kind in kinds], getattr(config, "num_key_value_heads", 0)
    attends = [heads * (kind in ("full_attention", "attention")) for kind in kinds]
    match architecture:
        case "olmo2" | "exaone4" if getattr(config, "sliding_window", None):
            return {"attention.sliding_window_pattern": slides}
        case "phi3":
            original = config.original_max_position_embeddings
            return {"rope.scaling.attn_factor": math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))}
        case "mistral3":
            return {"rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"], "attention.temperature_scale": rope["llama_4_scaling_beta"]}
        case "hunyuan-dense":
            size = _head_dim(config)
            return {"rope.scaling.type": "none", "rope.freq_base": rope["rope_theta"] * rope["alpha"] ** (size / (size - 2))}
        case "lfm2":
            step = config.block_multiple_of
            return {"attention.head_count_kv": attends, "feed_forward_length": -(-int(2 * config.intermediate_size / 3) // step) * step}
        case "lfm2moe":
            return {"attention.head_count_kv": attends, "expert_gating_func": 2}
        case "granitehybrid":
            return {"attention.head_count_kv": attends, "ssm.inner_size": config.mamba_expand * config.hidden_size,
                    "rope.scaling.finetuned": False, "context_length": 2**20}
        case "qwen35":
            return {"ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim, "full_attention_interval": 4,
                    "attention.recurrent_layers": [not one for one in attends]}
        case "gemma4":
            first = len(kinds) - config.num_kv_shared_layers
            return {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": slides,
                    "feed_forward_length": [config.intermediate_size * (1 + (number >= first)) for number in range(len(kinds))]}
    return {}


def _rope(config) -> dict:
    """Of the layers that see everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tokenizer_metadata(tokenizer, pre: str) -> dict:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    added = {token["content"]: token["special"] for token in data["added_tokens"]}
    types = [1 if token not in added else 3 if added[token] else 4 for token in tokens]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types,
              "merges": [" ".join(pair) for pair in data["model"]["merges"]]}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            fields[f"{key}_token_id"] = token
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return fields | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _tensors(architecture: str, config, model):
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, values in _taken_apart(config, theirs, tensor.float()):
            if not name.startswith("blk."):
                name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            values = _changed(architecture, config, theirs, values)
            yield name, np.ascontiguousarray(values.numpy())
    rope = {} if architecture == "gpt2" else _rope(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config, rope)
    if rope.get("rope_type") == "proportional":
        pairs = torch.arange(config.global_head_dim // 2) < rope["partial_rotary_factor"] * config.global_head_dim // 2
        yield "rope_freqs.weight", torch.where(pairs, 1.0, 1e30).numpy()
    for name in ("long", "short") if rope.get("rope_type") == "longrope" else ():
        yield f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32)


def _taken_apart(config, name: str, tensor):
    """(name, tensor) of what a transformers tensor becomes: fused experts and gates apart, under names that GGUF knows."""
    number = name.split(".")[2] if ".layers." in name else None
    module, _, last = name.rpartition(".")
    if last == "gate_up_proj":                                                # of all experts
        for part, half in zip(("gate", "up"), tensor.chunk(2, 1)):
            yield f"blk.{number}.ffn_{part}_exps.weight", half
    elif ".experts." in name:
        yield f"blk.{number}.ffn_down_exps.weight", tensor
    elif ".shared_mlp." in name:
        for part, piece in zip(("gate", "up"), tensor.chunk(2)) if ".input_linear" in name else [("down", tensor)]:
            yield f"blk.{number}.ffn_{part}{'_shexp' if config.num_local_experts else ''}.weight", piece
    elif last in ("dt_bias", "expert_bias"):
        yield f"blk.{number}.{'ssm_dt' if last == 'dt_bias' else 'exp_probs_b'}.bias", tensor
    elif last == "layer_scalar":
        yield f"{name}.weight", tensor
    else:
        yield name.replace("moe.router.weight", "moe.router.layer.weight"), tensor


def _changed(architecture: str, config, name: str, values):
    """What the converter does to the values of a transformers tensor."""
    if name.endswith(("conv.conv.weight", "conv1d.weight")):
        values = values.squeeze(1)
    if name.endswith("A_log"):
        values = -values.exp()
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight") or architecture == "qwen35" and name.endswith(
            "norm.weight") and "linear_attn" not in name:
        values = values + 1
    if architecture in INTERLEAVED and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        values = values.T                                                     # Conv1D holds [in, out]
    if architecture == "granitehybrid" and name.endswith(("mamba.A_log", "mamba.D")):
        values = values[:, None]
    if architecture == "granitehybrid" and name.endswith("mamba.norm.weight"):
        values = values.reshape(config.mamba_n_groups, -1)
    return _by_value(config, name, values) if architecture == "qwen35" and ".linear_attn." in name else values


def _by_value(config, name: str, values):
    """Value heads with the first of every key head first, where transformers has those of a key head together."""
    keys, size, module = config.linear_num_key_heads, config.linear_value_head_dim, name.split(".")[4]

    def tiled(part, size, axis=0):
        heads = part.unflatten(axis, (keys, -1, size))
        return heads.transpose(axis, axis + 1).reshape(part.shape)
    if module in ("in_proj_qkv", "conv1d"):
        first = 2 * keys * config.linear_key_head_dim
        return torch.cat((values[:first], tiled(values[first:], size)))
    if module == "out_proj":
        return tiled(values, size, 1)
    return values if module == "norm" else tiled(values, size if module == "in_proj_z" else 1)


def _llama3_factors(config, rope: dict) -> np.ndarray:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, _head_dim(config), 2) / _head_dim(config))
    return (plain / scaled).numpy().astype(np.float32)
