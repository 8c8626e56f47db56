"""Folders of the baseline language models (gru.py, ngram.py), written and read like checkpoints.

    config.json        {"model_type": "edgewright_gru" | "edgewright_ngram", ...}
    model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja, lineage.json

They are no transformers: `models.checkpoint` and everything built on it refuse them by their model_type.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.formats import lineage
from models.formats.safetensors_file import save_tensors
from runtime.errors import UserError
from runtime.files import read_json, write

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_baseline(folder: Path, config: dict, tensors: dict[str, torch.Tensor], tokenizer: Path, stage: dict) -> None:
    """Write the files into `folder`. Raises OSError where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    lineage.write(folder, [*lineage.read(tokenizer), stage])


def read_baseline(path: Path | str, model_type: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, tensors) of a folder. Raises UserError where it is not a whole folder of that kind."""
    path = Path(path)
    config = read_json(path / "config.json")
    if config.get("model_type") != model_type:
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}, where {model_type!r} is needed")
    try:
        return config, load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as {model_type}: {error}") from None
