"""The trail a stage leaves: `lineage.json` beside the weights, one entry a stage, oldest first.

    {"version": 1, "stages": [{"stage", "options", "inputs": {name: sha256}, "versions", "seed", "metrics", "created"}]}

Every stage that writes a checkpoint appends its entry to those of the checkpoint it read.
"""

import contextlib
import json
import os
import platform
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime import __version__, files
from runtime.errors import UserError
from runtime.files import read_json

FILE, VERSION = "lineage.json", 1


def stage(name: str, options, inputs: dict[str, str], metrics: dict | None = None, seed: int | None = None) -> dict:
    """One entry. `options` is the stage's dataclass or a dict, `inputs` maps what was read to its sha256.

    Of paths only the last name is kept: a trail is shipped, and where files lay is nobody else's affair.
    """
    options = asdict(options) if is_dataclass(options) else dict(options)
    digests: dict[str, str] = {}
    for source, digest in inputs.items():
        last, number = _named(source), 1
        while (unique := last if number == 1 else f"{last} ({number})") in digests:
            number += 1
        digests[unique] = digest
    versions = {"python": platform.python_version(), "edgewright": __version__}
    for package in ("numpy", "torch", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"stage": name, "options": {key: _named(value) for key, value in options.items()}, "inputs": digests,
            "versions": versions, "seed": seed, "metrics": metrics or {},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _named(value):
    """An option as JSON has it, paths as their last name."""
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in value]
    if isinstance(value, Path) or isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or os.path.exists(value)):
        return os.path.basename(os.path.abspath(os.path.expanduser(value)))
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.loads(json.dumps(value, default=str))


def read(folder: Path) -> list[dict]:
    """The stages a checkpoint has come through; none where it has no lineage.json."""
    file = Path(folder) / FILE
    if not file.exists():
        return []
    data = read_json(file, mend="mend it, or delete it to start a new trail", strict=False)
    stages, number = data.get("stages"), data.get("version")
    if number != VERSION or not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{file} has version {number!r}, where this program reads a list of stages of version {VERSION}")
    return stages


def write(folder: Path, stages: list[dict]) -> None:
    files.write(Path(folder) / FILE, json.dumps({"version": VERSION, "stages": stages}, indent=2, ensure_ascii=False) + "\n")


def add_metrics(folder: Path, metrics: dict) -> None:
    """Add what was measured on the finished result to its newest stage, for instance its perplexity."""
    stages = read(folder)
    stages[-1]["metrics"] |= metrics
    write(folder, stages)
