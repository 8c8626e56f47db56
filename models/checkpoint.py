"""A checkpoint: a Hugging Face folder, read lazily and written as a stream.

Reading checks everything before anything large is allocated: the configuration, every safetensors header, every
tensor's name and shape. Tensors are then mapped from the file one at a time, under the Decoder's names whatever the
file calls them (weight_names.py). Pickles (.bin, .pt) are refused: they run code when opened.

Writing streams tensors into a temporary folder beside the target, reads its headers back, and renames it into place.
Folders of a known family and uniform shape open in `transformers` with equal logits.
"""

import copy
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.formats import lineage
from models.formats.chat import MORE_TEMPLATES
from models.network.activations import round_inputs
from models.network.config import ModelConfig
from models.network.decoder import Decoder, Layer, tensor_shapes
from models.network.quantized import Quantization, QuantizedTensor
from models.network.streamed import bring, streamed
from models.formats.safetensors_file import write_safetensors
from models.families import FAMILIES, text_config
from models.formats.weight_names import OTHER_PARTS, OWN_FORM, Naming, Part, published, stored_as
from runtime.errors import UserError
from runtime.files import new_folder, read_json, restored
from runtime.task import FILE as TASK

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
CPU = torch.device("cpu")
SPARE = 2 << 30                   # bytes left on a device for activations, where the caller knows no better
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TABLE = "model.embed_tokens.weight"
_STORED = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
# What travels with the weights from stage to stage.
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
               "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
               TASK, "LICENSE", "NOTICE")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: `part` of tensor `name` in the open file `file`."""

    file: Path
    name: str
    part: Part
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An open checkpoint folder; made by `open_checkpoint`. Names are the Decoder's."""

    def __init__(self, path: Path, hf_config: dict, config: ModelConfig, quantization: Quantization | None,
                 files: dict[Path, safe_open], places: dict[str, _Place], shapes: dict[str, tuple[int, ...]]):
        self.path, self.hf_config, self.config, self.quantization = path, hf_config, config, quantization
        self._files, self._places, self._shapes = files, places, shapes
        self.device = CPU

    def on(self, device: torch.device) -> "Checkpoint":
        """The same checkpoint, whose tensors are read to a device, in their stored dtype, and made there into what they stand for."""
        there = copy.copy(self)
        there.device = device
        return there

    def names(self) -> list[str]:
        """Every stored tensor: `M.weight`, or `M.codes`, `M.scales` (and what else its format has) where module M is quantized."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """The type a tensor is stored in, as safetensors calls it: F32, F16, BF16, U8 or I8."""
        return self._places[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""
        place = self._places[name]
        return torch.Size(place.shape).numel() * (_FLOATS[place.dtype].itemsize if place.dtype in _FLOATS else 1)

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor in its stored dtype, mapped from the file (on another device a copy): not to be written to.

        Raises UserError where a number is not finite: attention may hide it, and the answer would look whole.
        """
        place = self._places[name]
        tensor = place.part.cut(self._files[place.file].get_tensor(place.name)).to(self.device)
        if tensor.is_floating_point():
            plain = tensor.half() if place.dtype == "F8_E4M3" else tensor
            if not all(map(torch.isfinite, plain.aminmax())):             # keeps a NaN, and needs no copy of the tensor
                raise UserError(f"{self.path}: {name} holds values that are not finite: the file is corrupt")
        return tensor

    def modules(self) -> list[str]:
        """Modules with a matrix that can be quantized: the linears but routers, the token tables, the untied head."""
        return [name.removesuffix(".weight") for name, shape in self._shapes.items()
                if len(shape) == 2 and name.endswith(".weight")
                and not name.endswith(("embed_positions.weight", ".conv.weight", ".router.weight"))]

    def weight(self, module: str) -> torch.Tensor:
        """A module's weight as dense float32 [out, in], dequantized where it is quantized."""
        quantized = self.quantized(module)
        return self.read(f"{module}.weight").float().contiguous() if quantized is None else quantized.dequantize()

    def quantized(self, module: str) -> QuantizedTensor | None:
        """A module's codes, or None where its weight is dense. Raises UserError where they are corrupt; see `read`."""
        form = self.quantization and self.quantization.tensors.get(module)
        if not form:
            return None
        shape = self._shapes[f"{module}.weight"]
        parts = {suffix: self.read(f"{module}.{suffix}") for suffix in form.stored_shapes(*shape)}
        try:
            return QuantizedTensor.stored(form, shape[1], parts)
        except UserError as error:
            raise UserError(f"{self.path}: {module}.{error}: quantize the original checkpoint again") from None

    def stands_for(self, name: str) -> torch.Tensor:
        """A tensor of the Decoder's: in its stored dtype, or float32 where it is quantized."""
        quantized = self.quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return self.read(name) if quantized is None else quantized.dequantize()

    def input_scales(self) -> dict[str, torch.Tensor]:
        """Module -> float32 [1], the scale of its inputs, where activations have static scales."""
        return {name.removesuffix(".input_scale"): self.read(name) for name in self._places if name.endswith(".input_scale")}

    def sha256(self) -> str:
        """Hash of config.json and the weights files, to name this checkpoint in a lineage."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for file in self._files:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face folder and check it whole. Raises UserError for anything that cannot be used."""
    path = restored(Path(path))
    if not path.is_dir():
        hint = ": turn a GGUF file into a checkpoint with python -m models.get" if path.suffix == ".gguf" else ""
        raise UserError(f"{path} is not a checkpoint folder{hint}" if path.exists() else f"{path} does not exist")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}: a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    hf_config = text_config(read_json(path / CONFIG, strict=False))
    try:
        config = ModelConfig.from_hf(hf_config)
        quantization = (Quantization.from_dict(hf_config["quantization_config"])
                        if hf_config.get("quantization_config") is not None else None)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from None
    files, places, shapes, others = {}, {}, tensor_shapes(config), set()
    look = stored_as(FAMILIES[config.family].naming, config, hf_config, shapes)
    for file, stored in stored_tensors(path, files):
        piece, held = files[file].get_slice(stored), look(stored)
        if held is None:
            others.add(OTHER_PARTS.fullmatch(stored)["part"])
            continue
        for name, part in held:
            if name in places:
                raise UserError(f"{path} holds {name} twice: as {places[name].name} and as {stored}")
            dtype, shape = piece.get_dtype(), part.shape(tuple(piece.get_shape()))
            places[name] = _Place(file, stored, part, _dtype(part, dtype), shape)
    if others:
        _note(path, ", ".join(sorted(others)))
    if config.tied_embeddings:
        _tie(path, files, places, look(_TABLE)[0][1])
    _check_tensors(path, config, shapes, quantization, places)
    return Checkpoint(path, hf_config, config, quantization, files, places, shapes)


@functools.cache
def _note(path: Path, others: str) -> None:
    print(f"note: {path} holds more than a decoder ({others}); its text part is taken", file=sys.stderr)


def load_decoder(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, spare: int = SPARE,
                 linears: torch.dtype | None = None) -> Decoder:
    """The model, its weights in `dtype`; quantized weights hold exactly the values their codes stand for.

    linears: another type for the weights of the layers' linears, as mixed precision multiplies them.
    On the CPU, weights stored in their type are mapped from the file, not copied; changing them in memory leaves the file alone.
    On a device, layers that leave no `spare` bytes free there stay in the file, and come for their turn (models/network/streamed.py).
    """
    checkpoint = open_checkpoint(path).on(device)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    types = _types(decoder, dtype, linears)
    coming = streamed(decoder, types, device, spare)
    decoder.load_state_dict({name: checkpoint.stands_for(name).to(kind).contiguous() for name, kind in types.items()
                             if not name.startswith(tuple(f"model.layers.{number}." for number in coming))}, assign=True, strict=not coming)
    for number in coming:
        bring(decoder.model.layers[number], lambda layer: load_layer(checkpoint, layer, dtype, linears))
    if checkpoint.quantization:
        round_inputs(decoder, checkpoint.quantization.rounding_linears(), checkpoint.input_scales())
        if checkpoint.quantization.kv_cache:
            decoder.cache_scales = [
                tuple(checkpoint.read(f"model.layers.{number}.self_attn.{part}_scale") for part in "kv")
                if checkpoint.config.cache_heads(layer) else None for number, layer in enumerate(checkpoint.config.layers)]
    return decoder


def _types(module: torch.nn.Module, dtype: torch.dtype, linears: torch.dtype | None) -> dict[str, torch.dtype]:
    """Name -> type of every parameter of a decoder or a layer."""
    low = {name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear) and (
        isinstance(module, Layer) or name.startswith("model.layers."))} if linears else ()
    return {name: linears if name.rpartition(".")[0] in low else dtype for name in module.state_dict()}


def load_layer(checkpoint: Checkpoint, layer: Layer, dtype: torch.dtype = torch.float32, linears: torch.dtype | None = None) -> Layer:
    """Give one layer the checkpoint's weights, in memory of its own on the checkpoint's device."""
    state = {name: checkpoint.stands_for(f"model.layers.{layer.number}.{name}").to(kind)
             for name, kind in _types(layer, dtype, linears).items()}
    layer.load_state_dict({name: tensor.clone() if tensor.device == CPU else tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return layer


def check_output(out: Path | str, source: Path | str | None = None) -> None:
    """Refuse early a target that `write_checkpoint` would refuse: the source itself, or a folder of other things."""
    out = Path(out)
    if source is not None and out.resolve() == Path(source).resolve():
        raise UserError(f"{out} is the checkpoint being read: choose another folder for the result")
    if out.exists() and not (out / CONFIG).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not a checkpoint: choose another folder, or remove it")


def write_checkpoint(out: Path | str, hf_config: dict, tensors: Iterable[tuple[str, torch.Tensor]],
                     source: Path | str | None, stage: dict, companions: Callable[[Path], None] | None = None) -> None:
    """Write a checkpoint folder, replacing an older one only when the new one is whole. Arguments: see fill_checkpoint.

    Raises UserError where the target cannot be replaced or the disk is full.
    """
    check_output(out, source)
    try:
        with new_folder(out) as folder:
            fill_checkpoint(folder, hf_config, tensors, source, stage, companions)
    finally:
        if hasattr(tensors, "close"):           # a generator's progress bar ends its line before an error is told
            tensors.close()


def fill_checkpoint(folder: Path, hf_config: dict, tensors: Iterable[tuple[str, torch.Tensor]],
                    source: Path | str | None, stage: dict, companions: Callable[[Path], None] | None = None) -> None:
    """Write a checkpoint's files into an empty folder.

    hf_config: the contents of config.json; its dtype is set here to the tensors'. A quantized checkpoint has its
        `quantization_config`.
    tensors: (name, tensor) under the Decoder's names, consumed one at a time and never held.
    source: folder whose tokenizer, chat template, generation settings and lineage travel on; None for none.
    stage: this stage's entry of the lineage (lineage.py).
    companions: changes or writes the tokenizer's files in the folder, after those of `source` are there.
    Raises ValueError where the tensors are not those of hf_config.
    """
    config, hf_config = ModelConfig.from_hf(hf_config), text_config(hf_config)
    room = sum(3 * len(name) + 400 for name in tensor_shapes(config))      # a weight may become three tensors
    naming = FAMILIES[config.family].naming
    if naming != Naming() and "edgewright_tensors" not in hf_config:
        if "quantization_config" in hf_config:
            hf_config = hf_config | OWN_FORM
        else:
            if naming.factors:                          # a factor may be rounded to the type that config.json names
                hf_config, tensors = hf_config | {"dtype": "float32"}, ((name, tensor.float()) for name, tensor in tensors)
            tensors = published(naming, config, hf_config, tensor_shapes(config), tensors)
    trail = []
    if source is not None:
        trail = lineage.read(source)
        for companion in _COMPANIONS:
            if (Path(source) / companion).is_file():
                shutil.copyfile(Path(source) / companion, folder / companion)
        if (Path(source) / MORE_TEMPLATES).is_dir():
            shutil.copytree(Path(source) / MORE_TEMPLATES, folder / MORE_TEMPLATES)
    if companions:
        companions(folder)
    sizes = write_safetensors(folder / WEIGHTS, tensors, room)
    dtype = max((kind for kind in _FLOATS if kind in sizes), key=sizes.get, default="F32")
    name = str(_FLOATS[dtype]).removeprefix("torch.")
    text = json.dumps(hf_config | {"dtype": name, "torch_dtype": name}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    lineage.write(folder, [*trail, stage])
    try:
        open_checkpoint(folder)
    except UserError as error:
        raise ValueError(f"these are not the tensors of the configuration: {error}") from None


def stored_tensors(path: Path, files: dict) -> Iterator[tuple[Path, str]]:
    """(file, tensor) of every tensor that a folder's safetensors hold; `files` takes the opened ones by path.

    Raises UserError for files that are missing or unsafe, and where an index and its files disagree.
    """
    alone = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
    if len(alone) == 1 and not ((path / INDEX).is_file() and alone[0].name != WEIGHTS):     # old GPTQ tools name it otherwise
        files[alone[0]] = _open_safetensors(alone[0])
        yield from ((alone[0], name) for name in sorted(files[alone[0]].keys()))
        return
    if not (path / INDEX).is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise UserError(f"{path} has {pickles[0]} and no {WEIGHTS}: pickles can run code, so save it again as "
                            f"safetensors (in transformers, model.save_pretrained)")
        raise UserError(f"{path} has neither {WEIGHTS} nor {INDEX}")
    shards = read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise UserError(f"{path / INDEX} has no weight_map from tensors to files")
    listed: dict[Path, list[str]] = {}
    for name, file in sorted(shards.items()):
        if Path(file).name != file:
            raise UserError(f"{path / INDEX} puts {name} in {file!r}, which leaves the folder: only plain file names "
                            f"are allowed")
        if not os.path.isfile(path / file):                   # which is false for a name too long for the system, too
            raise UserError(f"{path / file[:60]} is missing, and {INDEX} puts {name} there: fetch it again")
        listed.setdefault(path / file, []).append(name)
    for file, names in listed.items():
        files[file] = _open_safetensors(file)
        held = set(files[file].keys())
        if lacking := set(names) - held:
            raise UserError(f"{file} lacks {_some(sorted(lacking))}, which {INDEX} puts there: fetch it again")
        if unknown := held - set(names):
            raise UserError(f"{file} holds {_some(sorted(unknown))}, which {INDEX} does not know of: fetch it again")
        yield from ((file, name) for name in names)


def _open_safetensors(file: Path):
    if not file.is_file():                               # a FIFO would be waited for
        raise UserError(f"{file} is not a file: fetch it again")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None


def _dtype(part: Part, stored: str) -> str:
    """What a part is read as: what has to be computed becomes float32."""
    return "F32" if (part.factor, part.plus) != (1.0, 0.0) and stored in _FLOATS else stored


def _tie(path: Path, files: dict, places: dict[str, _Place], part: Part) -> None:
    """Let a tied model's table be the one that is stored, whichever of its two names it has, read as the table's `part`; two must be
    equal."""
    head, table = places.pop("lm_head.weight", None), places.get(_TABLE)
    if head is None:
        return
    if table is None:
        places[_TABLE] = replace(head, part=part, dtype=_dtype(part, head.dtype))
        return
    pieces = zip(*(files[place.file].get_tensor(place.name).split(4096) for place in (head, table)))       # not all in memory
    if head.shape != table.shape or not all(torch.equal(one.float(), other.float()) for one, other in pieces):
        raise UserError(f"{path} holds {head.name} beside {table.name} with other values, while {CONFIG} ties the two: set "
                        f"tie_word_embeddings to false there, or remove {head.name}")


def _check_tensors(path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]], quantization: Quantization | None,
                   places: dict[str, _Place]) -> None:
    """Every tensor the configuration asks for is there, in shape and dtype, and no other."""
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        name: (tuple(_FLOATS), shape) for name, shape in shapes.items()}
    for module, form in quantization.tensors.items() if quantization else ():
        shape = expected.pop(f"{module}.weight", (None, ()))[1]
        if len(shape) != 2 or module == "model.embed_positions":
            raise UserError(f"{path / CONFIG}: quantization_config names {module}, which is no matrix of this model")
        try:
            stored = form.stored_shapes(*shape)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: quantization_config of {module}: {error}") from None
        expected |= {f"{module}.{suffix}": ((_STORED[dtype],), wanted) for suffix, (dtype, wanted) in stored.items()}
    if quantization:
        channels = [config.cache_heads(layer) * config.head_size(layer) for layer in config.layers]
        expected |= {name: (("F32",), shape) for name, shape in quantization.extra_shapes(channels).items()}
    if missing := [name for name in expected if name not in places]:
        raise UserError(f"{path} lacks {_some(missing)}, which {CONFIG} asks for")
    if extra := [name for name in places if name not in expected]:
        raise UserError(f"{path} has {_some(extra)}, for which {CONFIG} has no place")
    for name, (dtypes, shape) in expected.items():
        place = places[name]
        if place.shape != shape:
            raise UserError(f"{path}: {name} has shape {list(place.shape)}, where {CONFIG} asks for {list(shape)}")
        if place.dtype not in dtypes:
            raise UserError(f"{path}: {name} is of type {place.dtype}, which should be {' or '.join(dtypes)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
