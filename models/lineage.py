"""The trail a stage leaves: `lineage.json` beside the weights, one entry a stage, oldest first.

    {"version": 1, "stages": [{"stage", "options", "inputs": {name: sha256}, "versions", "seed", "metrics", "created"}]}

Every stage that writes a checkpoint appends its entry to those of the checkpoint it read.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime import files
from runtime.errors import UserError
from runtime.files import read_json

FILE, VERSION = "lineage.json", 1
_PACKAGES = ("edgewright", "numpy", "torch", "safetensors")


def stage(name: str, options, inputs: dict[str, str], metrics: dict | None = None, seed: int | None = None) -> dict:
    """One entry. `options` is the stage's dataclass or a dict, `inputs` maps what was read to its sha256."""
    options = asdict(options) if is_dataclass(options) else dict(options)
    return {"stage": name, "options": json.loads(json.dumps(options, default=str)), "inputs": inputs,
            "versions": _versions(), "seed": seed, "metrics": metrics or {},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}


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


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
