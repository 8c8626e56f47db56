"""Read a GGUF file (llama.cpp's format, versions 2 and 3): configuration and tensors, as this project names them.

Architectures: llama (SmolLM, SmolLM2 and Mistral too, which GGUF does not tell apart), qwen2, qwen3, gpt2. `PLAIN` tensors
keep their type; of the others, those that the `gguf` package dequantizes become float32, one in memory at a time. A
model in several files (NAME-00001-of-00003.gguf, as llama-gguf-split writes them) is opened by any of them.

Two things are undone that the conversion to GGUF did. In llama files the rows of q and k are interleaved, because
ggml rotates neighbouring pairs of a head where Hugging Face rotates its two halves. And Llama 3's RoPE scaling is
stored as its result, one factor a frequency; the parameters it came from are found again and checked against it.

Not read: mixtures of experts, other RoPE scalings, big-endian files. All are refused.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch

from models.families import FAMILIES
from models.network.config import LayerConfig, ModelConfig
from models.network.decoder import tensor_shapes
from models.network.rope import frequencies
from models.formats.gguf_tokenizer import token_id
from runtime.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
PLAIN = ("F32", "F16", "BF16")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")                       # llama.cpp's name of part 1, 2, ... of so many
# What every published Llama 3 model has; `factor` (8 or 32) is read off the file.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


@functools.cache
def quantized_types() -> tuple[str, ...]:
    """The block types that the installed `gguf` turns into float32: those with which it does so for one empty block."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return tuple(name for name in found if name not in PLAIN)


_NAME = re.compile(r"(?:blk\.(?P<layer>[^.]+)\.)?(?P<module>.+)\.(?P<kind>weight|bias)")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTSIDE = {"token_embd": ("model.embed_tokens",), "position_embd": ("model.embed_positions",), "output_norm": ("model.norm",),
           "output": ("lm_head",)}
LAYER = {"attn_norm": ("input_layernorm",), "ffn_norm": ("post_attention_layernorm",), "attn_qkv": _QKV, "attn_q": _QKV[:1],
         "attn_k": _QKV[1:2], "attn_v": _QKV[2:], "attn_output": ("self_attn.o_proj",), "attn_q_norm": ("self_attn.q_norm",),
         "attn_k_norm": ("self_attn.k_norm",), "ffn_gate": ("mlp.gate_proj",), "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",)}


class _Reader(gguf.GGUFReader):
    """A reader that notices the end of the file: the package's own takes a corrupt count at its word, for ever."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if self.byte_order != "I":
            raise ValueError("its byte order is not this machine's (gguf's convert_endian turns it round)")
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)      # slicing a memmap itself is several times slower
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"it ends at byte {self.data.size}, but its contents should reach byte {end}")
        return self.data[int(offset):end].view(dtype)


def read_header(path: Path) -> tuple[dict, dict]:
    """Metadata (key -> value) and tensors (name -> gguf's ReaderTensor, its data mapped). Raises UserError."""
    try:
        reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is not a whole GGUF file: {error}; get it again") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def read_parts(path: Path) -> tuple[dict, dict, list[Path]]:
    """`read_header` of a model in one file or several, of which `path` is any, and its files in order. The metadata is
    the first part's. Raises UserError where a part is missing beside `path`, or does not belong to it."""
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return metadata, tensors, [path]
    name = _PART.fullmatch(path.name)
    if not (name and int(name[2]) == count):
        raise UserError(f"{path} is one of {count} parts, which are found by their names (NAME-00001-of-00003.gguf), "
                        "and it has no such name: give the parts theirs back")
    parts = [path.with_name(f"{name[1]}-{number:05d}-of-{name[2]}.gguf") for number in range(1, count + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"{missing[0]} is missing: the model is in {count} parts, which belong in one folder")
    headers, total, tensors = [read_header(part) for part in parts], metadata.get("split.tensors.count"), {}
    for number, (part, (says, more)) in enumerate(zip(parts, headers)):
        found, wanted = [says.get(f"split.{key}") for key in ("no", "count", "tensors.count")], [number, count, total]
        if found != wanted or tensors.keys() & more.keys():
            numbers = f"its split numbers are {found}, not {wanted}"
            differs = numbers if found != wanted else "it repeats tensors of another part"
            raise UserError(f"{part} is no part of the same model as {path.name} ({differs}); get it again")
        tensors |= more
    if len(tensors) != total:
        raise UserError(f"{path} and its other parts hold {len(tensors)} tensors of the model's {total}; get them "
                        "again")
    return headers[0][0], tensors, parts


class GGUFFile:
    """An opened GGUF file: `.path`, `.parts` (it and the other files of its model), `.metadata` (key -> value) and
    `.config`.

    Opening checks the whole header: types, and the name and shape of every tensor. Raises UserError, naming the file,
    for anything that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self._tensors, self.parts = read_parts(path)
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported in GGUF; supported are "
                            f"{', '.join(ARCHITECTURES)} (SmolLM and Mistral are 'llama' there)")
        self.config = self._config()
        self._check_tensors()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the model by its name in `Decoder`, one in memory at a time."""
        for name, tensor in self._tensors.items():
            if not (ours := self._decoder_names(name)):
                continue
            values = self._values(tensor)
            if self.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
                # rows (x0 y0 x1 y1 ...) of each head in the order (x0 x1 ... y0 y1 ...)
                pairs = values.view(-1, self.config.head_dim // 2, 2, *values.shape[1:])
                values = pairs.transpose(1, 2).reshape(values.shape)
            yield from zip(ours, values.chunk(len(ours)))

    def precision(self) -> tuple[float, dict[str, float]]:
        """Bits a weight that the file's tensors take, and each type's share of the weights, largest first."""
        weights = Counter()
        for tensor in self._tensors.values():
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        total, size_bytes = weights.total(), sum(int(tensor.n_bytes) for tensor in self._tensors.values())
        return 8 * size_bytes / total, {kind: count / total for kind, count in weights.most_common()}

    def _config(self) -> ModelConfig:
        gpt2 = self.architecture == "gpt2"
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._size("attention.key_length", hidden // heads)
        if (rotated := self._size("rope.dimension_count", head_dim)) != head_dim:
            raise UserError(f"{self.path}: {rotated} of a head's {head_dim} dimensions rotate; only all are supported")
        layer = LayerConfig(heads, self._size("attention.head_count_kv", heads), self._size("feed_forward_length"))
        count = self._size("block_count")
        self._tensor(f"blk.{count - 1}.attn_norm.weight")      # a corrupt count is found before layers are made of it
        bos, eos, pad = (token_id(self.metadata, name, self.path) for name in ("bos", "eos", "padding"))
        attention_bias, mlp_bias = (f"blk.0.{name}.bias" in self._tensors for name in ("attn_q", "ffn_up"))
        fields = dict(
            family=self.architecture, vocab_size=int(self._tensor("token_embd.weight").shape[-1]), hidden_size=hidden,
            layers=(layer,) * count, head_dim=head_dim, context_length=self._size("context_length"),
            norm_eps=self._number("attention.layer_norm_epsilon" if gpt2 else "attention.layer_norm_rms_epsilon"),
            rope_theta=self._number("rope.freq_base", 10000.0), activation="gelu_tanh" if gpt2 else "silu",
            tied_embeddings=self._tied(), bos_token_id=bos, eos_token_ids=() if eos is None else (eos,), pad_token_id=pad,
            **{"attention_bias": attention_bias, "output_bias": attention_bias and self.architecture != "qwen2",
               "mlp_bias": mlp_bias and self.architecture == "llama"} | FAMILIES[self.architecture].fixed)
        try:
            config = ModelConfig(**fields)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        return replace(config, rope_scaling=self._rope_scaling(config))

    def _check_tensors(self) -> None:
        expected, found = tensor_shapes(self.config), {}
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in PLAIN + quantized_types():
                raise UserError(f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, which is not "
                                f"read; get the model in one of {', '.join(PLAIN + quantized_types())}")
            ours = self._decoder_names(name)
            rows, *columns = (int(size) for size in reversed(tensor.shape))
            for part in ours:
                found[part] = (rows // len(ours), *columns)
                if found[part] != expected.get(part):
                    wanted = f"be {list(expected[part])}" if part in expected else "not be there"
                    raise UserError(f"{self.path}: {part} (from {name}) has shape {list(found[part])}, but should "
                                    f"{wanted} by the file's own metadata")
        if missing := [name for name in expected if name not in found]:
            raise UserError(f"{self.path} lacks {missing[0]} and {len(missing) - 1} more tensors; get it again")

    def _decoder_names(self, name: str) -> list[str]:
        """"blk.3.attn_q.weight" -> ["model.layers.3.self_attn.q_proj.weight"]; none for what is no parameter."""
        if name == "rope_freqs.weight" or name == "output.weight" and self.config.tied_embeddings:
            return []
        match = _NAME.fullmatch(name)
        if match and (ours := (OUTSIDE if match["layer"] is None else LAYER).get(match["module"])):
            place = "" if match["layer"] is None else f"model.layers.{match['layer']}."
            return [f"{place}{module}.{match['kind']}" for module in ours]
        raise UserError(f"{self.path}: tensor {name} belongs to no supported model of architecture "
                        f"{self.architecture!r} (mixtures of experts are not supported)")

    def _values(self, tensor) -> torch.Tensor:
        kind, data = tensor.tensor_type.name, tensor.data             # mapped from the file, read-only
        if kind == "BF16":
            return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(data.copy() if kind in PLAIN else gguf.dequantize(data, tensor.tensor_type))

    def _tied(self) -> bool:
        """Files without an output matrix use the embedding; some GPT-2 files hold the same matrix twice."""
        if "output.weight" not in self._tensors:
            return True
        head, table = self._tensors["output.weight"], self._tensors["token_embd.weight"]
        return head.tensor_type == table.tensor_type and np.array_equal(head.data, table.data)

    def _tensor(self, name: str):
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing; the file is not a whole model")
        return self._tensors[name]

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._take(key, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}, which should be one positive number")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        """A float32 in the file; read as the shortest decimal that rounds to it, as config.json would write it."""
        value = self._take(key, default)
        if type(value) is not float:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}, which should be a number")
        return float(str(np.float32(value)))

    def _take(self, key: str, default):
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(f"{self.path}: {self.architecture}.{key} is missing; the file is not a whole model")
        return value

    def _rope_scaling(self, unscaled: ModelConfig) -> dict | None:
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind != "none":
            raise UserError(f"{self.path}: RoPE scaling {kind!r} is not supported: supported are none and Llama 3's")
        if "rope_freqs.weight" not in self._tensors:
            return None
        factors = self._tensors["rope_freqs.weight"].data
        scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 3), **LLAMA3_SCALING}
        ropes = (config.rope(config.layers[0]) for config in (unscaled, replace(unscaled, rope_scaling=scaling)))
        plain, scaled = (frequencies(rope, unscaled.head_dim, unscaled.context_length) for rope in ropes)
        expected = (plain / scaled).numpy()
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise UserError(f"{self.path}: its RoPE factors are not Llama 3's; get the model as a Hugging Face folder")
        return scaling
