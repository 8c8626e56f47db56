"""Read a GGUF file (llama.cpp's format, versions 2 and 3): configuration and tensors, as this project names them.

Which architectures, and what their conversion to GGUF did that is undone here, is in gguf_families.py. `PLAIN` tensors keep their
type; of the others, those that the `gguf` package dequantizes become float32, one in memory at a time. A model in several files
(NAME-00001-of-00003.gguf, as llama-gguf-split writes them) is opened by any of them.

Llama 3's RoPE scaling is stored as its result, one factor a frequency; the parameters it came from are found again and checked
against it. Big-endian files are refused.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch

from models.families.family import off
from models.formats.gguf_families import ARCHITECTURES, hf_config, llama3_scaling, tensor_parts, undone
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.network.rope import frequencies
from models.formats.gguf_tokenizer import token_id
from runtime.errors import UserError

PLAIN = ("F32", "F16", "BF16")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")                        # llama.cpp's name of part 1, 2, ... of so many


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


# Keys that nobody computes with, or that repeat what others say
_INERT = {"vocab_size", "tensor_data_layout", "rope.dimension_sections", "rope.dimension_count_swa", "rope.scaling.original_context_length",
          "rope.scaling.finetuned", "full_attention_interval", "attention.value_length", "attention.value_length_swa"}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")      # read with the configuration


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
    headers = [(metadata, tensors) if part == path else read_header(part) for part in parts]
    total, tensors = metadata.get("split.tensors.count"), {}
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
        self._asked: set[str] = set()                                     # keys that were read
        # the layers of heads that guess further tokens stand last, and are not read
        self.layers = self.size("block_count") - self.count("nextn_predict_layers")
        self.config = self._config()
        self._check_keys()
        self._check_tensors()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the model by its name in `Decoder`, one of the file's tensors in memory at a time."""
        shapes = tensor_shapes(self.config)
        for name, tensor in self._tensors.items():
            held = self._parts.get(name, ()) if name not in _FACTORS else ()
            values = self._values(tensor) if held else None
            for ours, part in held:
                yield ours, undone(self.config, ours, part.cut(values.reshape(part.whole or shapes[ours])))

    def precision(self) -> tuple[float, dict[str, float]]:
        """Bits a weight that the file's tensors take, and each type's share of the weights, largest first."""
        weights = Counter()
        for tensor in self._tensors.values():
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        total, size_bytes = weights.total(), sum(int(tensor.n_bytes) for tensor in self._tensors.values())
        return 8 * size_bytes / total, {kind: count / total for kind, count in weights.most_common()}

    def _config(self) -> ModelConfig:
        if not any(name.startswith(f"blk.{self.layers - 1}.") for name in self._tensors):     # before anything is made of the number
            self._tensor(f"blk.{self.layers - 1}.attn_norm.weight")
        bos, eos, pad = (token_id(self.metadata, name, self.path) for name in ("bos", "eos", "padding"))
        self._hf = hf_config(self) | {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
                                      "tie_word_embeddings": self._tied()}
        try:
            config = ModelConfig.from_hf(self._hf)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
            self._check_llama3(config)
        return config

    def _check_keys(self) -> None:
        """A key of the architecture that nobody read, and that is not off, would be ignored."""
        said = {key.removeprefix(f"{self.architecture}."): value for key, value in self.metadata.items()
                if key.startswith(f"{self.architecture}.")}
        for key, value in said.items():
            if key.startswith("ssm.") and not self.config.recurrent:        # of a Granite 4 whose layers are all attention
                continue
            if key not in self._asked | _INERT and (not value if key == "attention.causal" else not off(key, value)):
                raise UserError(f"{self.path}: {self.architecture}.{key} {value!r:.60} is not supported: it may change what the model "
                                "computes, and would be ignored; get the model as a Hugging Face folder")
            if key.startswith("attention.value_length") and value != said.get(key.replace("value", "key"), value):
                raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r:.60}, and only heads whose keys are as long are "
                                "supported")

    def _check_tensors(self) -> None:
        shapes, found = tensor_shapes(self.config), set()
        self._parts = tensor_parts(self, self.config, self._hf, shapes)
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in PLAIN + quantized_types():
                raise UserError(f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, which is not "
                                f"read; get the model in one of {', '.join(PLAIN + quantized_types())}")
            if name in _FACTORS or name == "output.weight" and self.config.tied_embeddings or self._unread(name):
                continue
            if name not in self._parts:
                raise UserError(f"{self.path}: tensor {name} belongs to no supported model of architecture {self.architecture!r} "
                                "like the one its metadata describe")
            stored = tuple(int(size) for size in reversed(tensor.shape))
            for ours, part in self._parts[name]:
                whole = part.whole or shapes[ours]
                if stored != whole and not (1 in stored + (len(shapes[ours]),) and math.prod(stored) == math.prod(whole)):
                    raise UserError(f"{self.path}: {ours} (from {name}) has shape {list(stored)}, but should be {list(whole)} by the "
                                    "file's own metadata")
                found.add(ours)
        if missing := [name for name in shapes if name not in found]:
            raise UserError(f"{self.path} lacks {missing[0]} and {len(missing) - 1} more tensors; get it again")

    def _unread(self, name: str) -> bool:
        """Whether a tensor is of a further head, or of keys and values that nobody reads."""
        layer, part = (re.fullmatch(r"blk\.(\d+)\.(\w+)\..+", name) or re.match("()()", name)).groups()
        if not layer or int(layer) >= self.layers:
            return bool(layer) and int(layer) < self.size("block_count")
        return (self.config.layers[int(layer)].cache_source is not None
                and part in ("attn_k", "attn_v", "attn_k_norm"))

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

    def holds(self, name: str) -> bool:
        """Whether some layer has the tensor; {n} stands for its number."""
        pattern = re.compile(re.escape(name).replace(r"\{n\}", r"\d+"))
        return any(pattern.fullmatch(stored) for stored in self._tensors)

    def rows(self, name: str) -> int:
        return int(self._tensor(name).shape[-1])

    def vector(self, name: str) -> list[float] | None:
        """A small tensor's numbers; None where it is not there."""
        return None if name not in self._tensors else [float(str(value)) for value in self._tensors[name].data]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}, which should be one positive number")
        return value

    def count(self, key: str, default: int | None = 0) -> int:
        """A number that may be 0."""
        value = self.take(key, default)
        if type(value) is not int or value < 0:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r:.60}, which should be one number of 0 or more")
        return value

    def flags(self, key: str) -> list[bool]:
        """True or false for every layer; none where the file has no such key."""
        value = self.take(key, [])
        if not isinstance(value, list) or value and len(value) != self.size("block_count") or any(type(one) is not bool for one in value):
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r:.60}, which should be true or false for each layer")
        return value[:self.layers]

    def sizes(self, key: str, default: int | None = None) -> list[int]:
        """A number for every layer, or one for all."""
        value = self.take(key, default)
        if not isinstance(value, list):
            return [self.size(key, default)]
        if len(value) != self.size("block_count") or not all(type(one) is int and one >= 0 for one in value) or not any(value):
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r:.60}, which should be a number for each layer")
        return value

    def same(self, key: str, default: int | None = None) -> int:
        """A number that all layers have, but for those that have none."""
        found = {one for one in self.sizes(key, default) if one}
        if len(found) > 1:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {sorted(found)}: only one number for all layers is supported")
        return found.pop()

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 in the file; read as the shortest decimal that rounds to it, as config.json would write it."""
        value = self.take(key, default)
        if type(value) is not float:
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value!r}, which should be a number")
        return float(str(np.float32(value)))

    def take(self, key: str, default):
        self._asked.add(key)
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(f"{self.path}: {self.architecture}.{key} is missing; the file is not a whole model")
        return value

    def rope_scaling(self) -> dict | None:
        """RoPE's scaling as config.json has it."""
        plain = self.number("rope.scaling.factor", 1.0) in (0.0, 1.0)
        kind = self.take("rope.scaling.type", "none" if plain else None)
        if kind in ("linear", "yarn"):
            found = {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
            if kind == "yarn":
                found["original_max_position_embeddings"] = self.size("rope.scaling.original_context_length")
                found |= {name: self.number(f"rope.scaling.yarn_{name}", default)
                          for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
                factor = self.number("rope.scaling.yarn_attn_factor", -1.0)
                found |= {} if factor == -1 else {"attention_factor": factor}
            return found
        if kind not in ("none", "longrope"):
            raise UserError(f"{self.path}: RoPE scaling {kind!r} is not supported: supported are none, linear, yarn, longrope and Llama 3's")
        llama3 = "rope_freqs.weight" in self._tensors and self.architecture != "gemma4"
        return llama3_scaling(self._tensors["rope_freqs.weight"].data) if llama3 else None

    def _check_llama3(self, config: ModelConfig) -> None:
        factors = self._tensors["rope_freqs.weight"].data
        ropes = (each.rope(each.layers[0]) for each in (replace(config, rope_scaling=None), config))
        plain, scaled = (frequencies(rope, config.head_dim, config.context_length) for rope in ropes)
        expected = (plain / scaled).numpy()
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise UserError(f"{self.path}: its RoPE factors are not Llama 3's; get the model as a Hugging Face folder")
