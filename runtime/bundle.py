"""Open a bundle: the folder an app ships, described by its `manifest.json`.

    bundle = open_bundle("build/smollm2-135m-int4")      # structure and sizes are checked
    bundle.graph("fast")                                 # an entry of the manifest's "graphs", or None
    bundle.path("weights.bin")                           # absolute path of a file the manifest lists
    bundle.tensor("final_norm.weight")                   # its bytes in weights.bin, mapped, not read

Opening costs a `stat` per file; `verify=True`, or `changed_files`, reads every byte and compares sha256. A manifest is
untrusted: a path that leaves the folder, by "..", by an absolute path or through a symlink, is refused, and a tensor
that lies outside its file is refused before anything maps it. The manifest itself has no hash; whoever can replace it
can replace the bundle. Format: docs/formats.md.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from .errors import CheckFailed, UserError, shown
from .files import read_json, restored
from .token_ids import pad_id, token_id, token_ids

FORMAT, ENCODER_FORMAT = "edgewright-bundle", "edgewright-encoder"      # of a decoder, and of an encoder (encoder_bundle.py)
VERSION, VERSIONS = 2, (1, 2)      # what is written, and what is read: version 1 has no layers but attention
MANIFEST = "manifest.json"
ROLES = ("portable", "fast", "cuda")
DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4,
              "uint2": 2, "uint3": 3, "uint5": 5, "uint6": 6, "float8_e4m3fn": 8}
_PACKED_BY_ROW = ("uint2", "uint3", "uint4", "uint5", "uint6")       # each row ends on a byte; int4 does as ONNX does
_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}      # others are given as raw bytes
# What a manifest must hold: (form, None) may be null or missing, [form] is a list, {str: form} an object of any names.
_FORM = {
    "name": str, "files": {str: {"bytes": int, "sha256": str}},
    "tokenizer": str, "chat_template": (str, None), "golden": (str, None), "draft": (str, None), "task": (str, None),
    "model": {"config": {"vocab_size": int, "hidden_size": int, "head_dim": int}, "max_context": int,
              "bos_token_id": (int, None), "eos_token_ids": [int], "pad_token_id": (int, None),
              "special_tokens": ({str: str}, None), "generation": (dict, None)},
    "weights": {"file": str, "bytes": int,
                "tensors": [{"name": str, "dtype": str, "shape": [int], "offset": int, "bytes": int}]},
    "graphs": [{"role": str, "file": str}],
    "engines": [{"file": str, "backend": str, "version": str, "capacity": int, "bytes": (int, None),
                 "compute_capabilities": [str], "profiles": [dict]}]}


@dataclass(frozen=True)
class AnyBundle:
    """A checked manifest and its folder: what decoders' and encoders' (encoder_bundle.py) bundles share."""

    folder: Path
    manifest: dict

    @property
    def name(self) -> str:
        return self.manifest["name"]

    def graph(self, role: str) -> dict | None:
        """The manifest's entry for the graph of this role, or None."""
        return next((graph for graph in self.manifest["graphs"] if graph["role"] == role), None)

    def path(self, name: str) -> Path:
        """Absolute path of a file that the manifest lists."""
        return self.folder / name


class Bundle(AnyBundle):
    """A decoder's."""

    @property
    def model(self) -> dict:
        """config (of `models.network.config.ModelConfig`), max_context, bos_token_id, eos_token_ids, pad_token_id,
        special_tokens (by the names that chat templates use), generation."""
        return self.manifest["model"]

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and reply together."""
        return self.model["max_context"]

    @property
    def weights_bytes(self) -> int:
        """Size of the shared weights file."""
        return self.manifest["weights"]["bytes"]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the weights file, mapped read-only: float32, float16 and int8 in their own dtype and shape, any
        other dtype as its packed bytes, uint8 [bytes]. Raises UserError where the bundle has no such tensor."""
        entry = next((t for t in self.manifest["weights"]["tensors"] if t["name"] == name), None)
        if entry is None:
            raise UserError(f"{self.folder / MANIFEST}: the weights have no tensor {name!r}; export the bundle again")
        dtype = _NUMPY_DTYPES.get(entry["dtype"])
        shape = tuple(entry["shape"]) if dtype else (entry["bytes"],)
        return np.memmap(self.path(self.manifest["weights"]["file"]), dtype=dtype or np.uint8, mode="r",
                         offset=entry["offset"], shape=shape)


def open_bundle(folder: str | Path, *, verify: bool = False) -> Bundle:
    """Read and check the manifest in `folder`; with `verify`, every file's sha256 too.

    Raises UserError (no bundle, unknown version, a file missing, shortened or outside the folder, a broken manifest)
    and CheckFailed (`verify` found a changed file, named in the message).
    """
    folder, path, manifest = read_manifest(folder)
    if manifest.get("format") == ENCODER_FORMAT:
        raise UserError(f"{folder} is an encoder's bundle, which generates no text: open it with runtime.Encoder")
    if manifest.get("format") != FORMAT:
        raise UserError(f'{path}: "format" is not "{FORMAT}", so it is no bundle of this project')
    if (version := manifest.get("version")) not in VERSIONS or type(version) is not int:
        raise UserError(f"{path}: bundle version {version!r}, but this runtime reads versions {' and '.join(map(str, VERSIONS))}; "
                        "export the bundle again or update the runtime")
    _check_manifest(path, manifest)
    return with_files(Bundle(folder, manifest), verify)


def with_files(bundle: AnyBundle, verify: bool) -> AnyBundle:
    """The bundle, whose files are all there in their sizes, and with `verify` in their sha256. Raises UserError, CheckFailed."""
    for name, entry in bundle.manifest["files"].items():
        check_file(bundle.folder, name, entry)
    if verify and (changed := changed_files(bundle)):
        raise CheckFailed(f"{bundle.folder}: changed since the bundle was written: {', '.join(changed)}")
    return bundle


def read_manifest(folder: str | Path) -> tuple[Path, Path, dict]:
    """The folder, its manifest's path, and what that holds, of which nothing is checked yet. Raises UserError."""
    try:
        folder = Path(folder).expanduser().absolute()
    except (TypeError, RuntimeError) as error:                # no path, or ~ of nobody
        raise UserError(f"{shown(folder)} is no folder of a bundle ({error})") from None
    path = restored(folder) / MANIFEST
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give the folder of a bundle, as `python -m export.onnx` writes it")
    if not path.exists():
        raise UserError(f"{folder}: no {MANIFEST} in it, so it is no bundle; `python -m export.onnx` makes one")
    manifest = read_json(path, mend="export the bundle again")
    return folder, path, manifest


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a stored tensor. int4 is packed over the whole tensor as ONNX does, unsigned codes row by row."""
    rows, row = (math.prod(shape[:-1]), shape[-1]) if dtype in _PACKED_BY_ROW and shape else (1, math.prod(shape))
    return rows * -(-row * DTYPE_BITS[dtype] // 8)


def changed_files(bundle) -> list[str]:
    """Names of the files whose sha256 is not the manifest's. Reads every byte of the bundle."""
    import hashlib                                # brings OpenSSL, which opening does not need
    changed = []
    for name, entry in bundle.manifest["files"].items():
        with open(bundle.path(name), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                changed.append(name)
    return changed


def _check_manifest(path: Path, manifest: dict) -> None:
    """Every field the runtime uses is there and of the right type, so that no later code has to doubt it."""
    check_form(path, "", manifest, _FORM)
    model, weights, files = manifest["model"], manifest["weights"], manifest["files"]
    vocab = model["config"]["vocab_size"]
    if model["max_context"] < 1:
        raise UserError(f"{path}: model.max_context is {model['max_context']}; it must be at least 1")
    token_ids(model["eos_token_ids"], vocab, f"{path}: model.eos_token_ids")
    for key, check in (("bos_token_id", token_id), ("pad_token_id", pad_id)):      # which may be left out
        model[key] = check(model.get(key), vocab, f"{path}: model.{key}")
    named = {"weights.file": weights["file"], "tokenizer": manifest["tokenizer"]}
    for key in ("graphs", "engines"):
        named |= {f"{key}[{i}].file": entry["file"] for i, entry in enumerate(manifest[key])}
    for key in ("chat_template", "golden", "draft", "task"):
        if manifest.setdefault(key, None) is not None:
            named[key] = manifest[key]
    for where, name in named.items():
        if name not in files:
            raise UserError(f"{path}: {where} is {name!r}, which is not among its files; export the bundle again")
    for i, graph in enumerate(manifest["graphs"]):
        if graph["role"] not in ROLES:
            raise UserError(f"{path}: graphs[{i}].role is {graph['role']!r}; known: {', '.join(ROLES)}")
    if weights["bytes"] != files[weights["file"]]["bytes"]:
        raise UserError(f"{path}: weights.bytes and the size of {weights['file']} among its files differ; export again")
    for tensor in weights["tensors"]:
        where, dtype, shape = f"{path}: weights.tensors[{tensor['name']!r}]", tensor["dtype"], tensor["shape"]
        if dtype not in DTYPE_BITS:
            raise UserError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
        offset, size = tensor["offset"], tensor["bytes"]
        if min(shape, default=1) < 0 or offset < 0 or size != tensor_bytes(dtype, shape) or offset + size > weights["bytes"]:
            raise UserError(f"{where}: {dtype} {shape} at {offset}, {size} bytes, does not fit {weights['file']} "
                            f"({weights['bytes']} bytes); export the bundle again")


def check_form(path: Path, where: str, value: object, form) -> None:
    """Raises UserError where `value` is not of this form: see _FORM."""
    form, null = form if isinstance(form, tuple) else (form, False)
    if null is None and value is None:
        return
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = kind.__name__ + (" or null" if null is None else "")
        raise UserError(f"{path}: {where} should be {expected}, not {shown(value)}; export the bundle again")
    if isinstance(form, list):
        for i, item in enumerate(value):
            check_form(path, f"{where}[{shown(item.get('name', i)) if isinstance(item, dict) else i}]", item, form[0])
    elif isinstance(form, dict):
        for key, inner in (dict.fromkeys(value, form[str]) if str in form else form).items():
            check_form(path, f"{where}.{key}" if where else key, value.get(key), inner)


def check_file(folder: Path, name: str, entry: dict) -> None:
    """The file is inside the folder, is a file, and has the size the manifest gives."""
    path = folder / name
    parts = PurePosixPath(name).parts
    if (not parts or ".." in parts or "\0" in name or "\\" in name or PurePosixPath(name).is_absolute()
            or PureWindowsPath(name).drive or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))):
        raise UserError(f"{folder / MANIFEST}: the path {name!r} leaves the bundle's folder; refused")
    try:
        size = os.stat(path).st_size
    except OSError:
        raise UserError(f"{path}: missing from the bundle; copy or export it again") from None
    if not path.is_file():
        raise UserError(f"{path}: is not a file; copy or export the bundle again")
    if size != entry["bytes"]:
        raise UserError(f"{path}: {size} bytes, but the manifest says {entry['bytes']}; copy or export the bundle again")
