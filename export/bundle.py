"""Write a bundle: the folder an app ships. Reading one is `runtime/bundle.py`; the format is in docs/formats.md.

A file is added to an existing bundle (a graph, an engine, golden outputs) in an order that never leaves a manifest that
disagrees with the files: it is written beside its name, then renamed, then `manifest.json` is replaced; where a file of
that name was listed before, a manifest without it comes first. So whatever interrupts this, the bundle opens, with the
new file or without.

`WeightsWriter` writes `weights.bin` as a stream: one tensor in memory at a time, each aligned to 64 bytes (a vector
register), those over 1 MiB to 4096 (a page, so that they can be mapped), hashed on the way.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from models.formats.chat import template_source
from models.checkpoint import Checkpoint
from runtime import files, task
from runtime.bundle import FORMAT, MANIFEST, VERSION, tensor_bytes
from runtime.errors import UserError
from runtime.tensors import LARGE, PAGE, VECTOR

WEIGHTS, TOKENIZER, CHAT_TEMPLATE, GOLDEN = "weights.bin", "tokenizer.json", "chat_template.jinja", "golden.json"


class WeightsWriter:
    """An open weights file. `tensors` lists what has been written, as the manifest does, `size` is its bytes so far, `formats`
    says how the quantized matrices among them are coded."""

    def __init__(self, path: Path):
        self._file, self._hash, self.size = open(path, "wb"), hashlib.sha256(), 0
        self.tensors: list[dict] = []
        self.formats: dict[str, dict] = {}

    def add(self, name: str, dtype: str, shape: Iterable[int], chunks: Iterable[np.ndarray]) -> None:
        """Append a tensor, given as consecutive pieces of its bytes. dtype: a key of runtime.bundle.DTYPE_BITS."""
        shape = [int(size) for size in shape]
        expected = tensor_bytes(dtype, shape)
        self._write(bytes(-self.size % (PAGE if expected > LARGE else VECTOR)))
        offset = self.size
        for chunk in chunks:
            self._write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
        if self.size - offset != expected:
            raise ValueError(f"{name} {dtype} {shape} takes {expected} bytes, got {self.size - offset}")
        self.tensors.append({"name": name, "dtype": dtype, "shape": shape, "offset": offset, "bytes": expected})

    def _write(self, data) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict:
        """Finish; returns the file's entry for the manifest's "files"."""
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


def check_output(out: Path, file: str = MANIFEST, problem: str = "is not a bundle") -> None:
    """Refuse early a target that is neither new, nor empty, nor a folder with `file` in it to replace."""
    if out.exists() and not (out / file).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and {problem}: choose another folder, or remove it")


def manifest(name: str, model: dict, weights: WeightsWriter, weights_entry: dict, lineage: list[dict]) -> dict:
    """A manifest without graphs; `add` and `describe_companions` fill in the rest."""
    return {"format": FORMAT, "version": VERSION, "name": name, "model": model, "graphs": [], "engines": [],
            "weights": {"file": WEIGHTS, "bytes": weights_entry["bytes"], "formats": weights.formats,
                        "tensors": weights.tensors},
            "files": {WEIGHTS: weights_entry}, "tokenizer": TOKENIZER, "chat_template": None, "task": None, "golden": None,
            "lineage": lineage}


def copy_companions(checkpoint: Checkpoint, folder: Path, manifest: dict) -> None:
    """Tokenizer, chat template and task of a checkpoint, written into the bundle and entered in its manifest."""
    tokenizer = compact_tokenizer(read_json(checkpoint.path / TOKENIZER))
    texts = {TOKENIZER: json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))}
    if (template := template_source(checkpoint.path)) is not None:
        texts[CHAT_TEMPLATE] = template
        manifest["chat_template"] = CHAT_TEMPLATE
    if (checkpoint.path / task.FILE).is_file():
        task.read_task(checkpoint.path / task.FILE)             # one that no engine would read is refused here
        texts[task.FILE] = (checkpoint.path / task.FILE).read_text("utf-8")
        manifest["task"] = task.FILE
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        manifest["files"][name] = file_entry(folder / name)


def compact_tokenizer(data: dict) -> dict:
    """The contents of a tokenizer.json without what it says of training batches, and BPE's merges as "a b" in place of ["a", "b"].

    `tokenizers` reads both; the older form in three quarters of the time, and 20 MB of memory less for 49,000 merges.
    Pairs stay where a token holds a space or a line would look like a header, which that form cannot say.
    """
    data = data | {"truncation": None, "padding": None}
    merges = data["model"].get("merges", [])
    if any(isinstance(pair, str) or " " in "".join(pair) or pair[0].startswith("#version") for pair in merges):
        return data
    return {**data, "model": {**data["model"], "merges": [" ".join(pair) for pair in merges]}} if merges else data


def read_json(path: Path) -> dict:
    """An optional JSON file of a checkpoint; {} where there is none. Raises UserError where it is no JSON object."""
    return files.read_json(path, mend="mend it or remove it", largest=files.LARGEST_TOKENIZER) if path.is_file() else {}


def add_file(folder: Path, manifest: dict, name: str, data) -> None:
    """Write one file, given as bytes, into an existing bundle and replace its manifest last.

    manifest: the new one, which names the file already; its entry in "files" is added here.
    Raises UserError where the disk is full or the folder cannot be written; the bundle stays as it was.
    """
    with files.new_file(folder / name) as part:
        part.write_bytes(data)
        manifest["files"][name] = file_entry(part)
        previous = files.read_json(folder / MANIFEST)
        if name in previous["files"]:
            write_manifest(folder, without_file(previous, name))
    write_manifest(folder, manifest)


def without_file(manifest: dict, name: str) -> dict:
    """The manifest of the same bundle without one of its graphs or engines, or without golden outputs or its draft."""
    return manifest | {"files": {file: entry for file, entry in manifest["files"].items() if file != name},
                       "graphs": [graph for graph in manifest["graphs"] if graph["file"] != name],
                       "engines": [engine for engine in manifest.get("engines") or [] if engine["file"] != name],
                       **{key: None if manifest.get(key) == name else manifest.get(key) for key in ("golden", "draft")}}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Replace manifest.json atomically."""
    files.write(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")


def file_entry(path: Path) -> dict:
    """Size and sha256 of a file, for the manifest's "files"."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
