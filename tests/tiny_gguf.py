"""Write a transformers model as a GGUF file the way llama.cpp's convert_hf_to_gguf.py does, for tests that read one.

Tensor names come from the `gguf` package's own table, the interleaving of q and k rows and the Llama 3 RoPE factors
from the converter's definition. Types the package cannot quantize to (K-quants) get random blocks with sane scales.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

PRE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
SCALE_BYTES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)} | dict.fromkeys(
    ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0, 2))     # of a block's fp16 scales


def write_gguf(path: Path, model, tokenizer=None, kind: str = "F32", pre: str = "smollm", extra: dict | None = None,
               tensors: dict | None = None, split: int = 0) -> Path:
    """`kind` is the type of every matrix (vectors stay F32). `extra` overrides metadata and `tensors` tensors, as
    name -> (type, float32 array), where None leaves the key or the tensor out. split: so many tensors a part."""
    config = model.config
    architecture = PRE[config.model_type]
    fields = _metadata(architecture, config) | (_tokenizer_metadata(tokenizer, pre) if tokenizer else {})
    fields |= extra or {}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", architecture), split_max_tensors=split)
    for key, value in fields.items():
        _add(writer, key, value)
    stored = {name: (kind if values.ndim == 2 else "F32", values) for name, values in _tensors(architecture, model)}
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


def _metadata(architecture: str, config) -> dict:
    norm = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    eps = config.layer_norm_epsilon if architecture == "gpt2" else config.rms_norm_eps
    mlp = (config.n_inner or 4 * config.n_embd) if architecture == "gpt2" else config.intermediate_size
    fields = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
              "embedding_length": config.hidden_size, "feed_forward_length": mlp,
              "attention.head_count": config.num_attention_heads, f"attention.{norm}": eps}
    if architecture != "gpt2":
        head_dim = _head_dim(config)
        fields |= {"attention.head_count_kv": config.num_key_value_heads, "vocab_size": config.vocab_size,
                   "rope.freq_base": config.rope_parameters["rope_theta"], "rope.dimension_count": head_dim}
        if head_dim * config.num_attention_heads != config.hidden_size:
            fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return {f"{architecture}.{key}": value for key, value in fields.items()}


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


def _tensors(architecture: str, model):
    config = model.config
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T                                                 # Conv1D holds [in, out]
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config, rope)


def _llama3_factors(config, rope: dict) -> np.ndarray:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, _head_dim(config), 2) / _head_dim(config))
    return (plain / scaled).numpy().astype(np.float32)
