"""What is kept of an engine: its file, a JSON record beside it, and its entry in a bundle's manifest.

`model.engine` (or `model.engine.gz`) has the record `model.engine.json`: backend and version, compute capabilities,
profiles, inputs and outputs, sizes, build time and peak memory, the hash of the graph it was made from, layer counts.

A name that ends in .gz is compressed, as the engines of a bundle are: TensorRT-RTX keeps the source text of every
kernel it will compile on the device, 136 KB of it for each kernel and profile, nearly all the same (README, "Engine
size"), and only the copy in memory needs that.
"""

import copy
import gzip
import json
from pathlib import Path

import onnx
from onnx import TensorProto

from export import bundle as bundles
from export.tensorrt.build import Profiles, Settings, load_backend
from export.tensorrt.model import external_files, inputs, shape_of
from runtime import files
from runtime.bundle import AnyBundle
from runtime.errors import UserError
from runtime.machine import peak_rss_mb

COMPRESSION = 1                  # of gzip: the weights do not compress, the text does at any level


def record(plan: bytes, built: dict, settings: Settings, model: onnx.ModelProto, source: Path, profiles: Profiles,
           capacity: int | None) -> dict:
    """The facts of one build: `built` are build's own. source: the ONNX file; its external data is hashed too."""
    return {
        "backend": settings.backend, "version": load_backend(settings.backend).__version__,
        "compute_capabilities": [str(t) for t in settings.targets], "capacity": capacity,
        "profiles": [{"name": name, "shapes": {k: [list(s) for s in v] for k, v in shapes.items()}}
                     for name, shapes in profiles.items()],
        "inputs": [_described(i) for i in inputs(model).values()],
        "outputs": [_described(o) for o in model.graph.output],
        "bytes": len(plan), "peak_rss_mb": round(peak_rss_mb()), **built,
        "source": {name: bundles.file_entry(source.parent / name)["sha256"] for name in (source.name, *external_files(model))},
    }


def record_name(engine: str) -> str:
    """Name of an engine file's record."""
    return engine.removesuffix(".gz") + ".json"


def check_writable(out: Path) -> None:
    """Refuse before the build a place where the engine could not be written."""
    try:
        with files.lock(out):
            pass
    except UserError as error:
        raise UserError(f"{error}; choose another place with -o") from None
    if out.is_dir():
        raise UserError(f"{out} could not be written (it is a folder); choose another place with -o")


def write(out: Path, plan: bytes, facts: dict) -> None:
    """Engine and record side by side; each is complete or not there."""
    files.write(out, packed(out.name, plan))
    files.write(out.with_name(record_name(out.name)), _text(facts))


def add_to_bundle(bundle: AnyBundle, name: str, plan: bytes, facts: dict) -> dict:
    """Put an engine and its record into a bundle, in place of one of the same name; returns the new manifest."""
    manifest, data = copy.deepcopy(bundle.manifest), packed(name, plan)
    bundles.add_file(bundle.folder, manifest, record_name(name), _text(facts))
    entry = {"file": name, "record": record_name(name), "file_bytes": len(data)} | {key: facts[key] for key in (
        "backend", "version", "compute_capabilities", *(("capacity",) if facts["capacity"] else ("rows", "tokens")), "profiles", "bytes", "source")}
    manifest["engines"] = [e for e in manifest["engines"] if e["file"] != name] + [entry]
    bundles.add_file(bundle.folder, manifest, name, data)
    return manifest


def packed(name: str, plan: bytes) -> bytes:
    return gzip.compress(plan, COMPRESSION, mtime=0) if name.endswith(".gz") else plan


def inspect(engine: Path) -> str:
    """The record of an engine as text, and the engine's own layer information where a GPU can load it."""
    if not engine.is_file():
        raise UserError(f"{engine}: no such file; give an engine that `python -m export.trt` wrote")
    path = engine.with_name(record_name(engine.name))
    mend = "give an engine that `python -m export.trt` wrote, with its record beside it"
    facts = files.read_json(path, mend=mend)
    if not isinstance(backend := facts.get("backend"), str):
        raise UserError(f"{path}: the engine's record names no backend; {mend}")
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts.items()]
    from runtime.cuda_device import present_gpu
    from runtime.trt_engine import load_plan, read_plan
    try:
        tensorrt = load_backend(backend)
        present_gpu()
        inspector = load_plan(tensorrt, read_plan(engine), engine).create_engine_inspector()
        lines.append(inspector.get_engine_information(tensorrt.LayerInformationFormat.ONELINE))
    except UserError as error:
        lines.append(f"layer information: needs a GPU that can load the engine ({error})")
    return "\n".join(lines)


def _described(info: onnx.ValueInfoProto) -> dict:
    return {"name": info.name, "dtype": TensorProto.DataType.Name(info.type.tensor_type.elem_type).lower(),
            "shape": shape_of(info)}


def _text(facts: dict) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()
