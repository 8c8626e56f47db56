"""Folders of the baseline language models (gru.py, ngram.py), written and read like checkpoints.

    config.json        {"model_type": "edgewright_gru" | "edgewright_ngram", ...}
    model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja, lineage.json

They are no transformers: `models.checkpoint` and everything built on it refuse them by their model_type.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models import lineage
from runtime.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_baseline(out: Path, config: dict, tensors: dict[str, torch.Tensor], tokenizer: Path, stage: dict) -> None:
    """Write the folder `out`, which must not exist; it appears when it is whole."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, temporary / name)
        lineage.write(temporary, [*lineage.read(tokenizer), stage])
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_baseline(path: Path | str, model_type: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, tensors) of a folder. Raises UserError where it is not a whole folder of that kind."""
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text())
        if config.get("model_type") != model_type:
            raise UserError(f"{path}: model_type is {config.get('model_type')!r}, where {model_type!r} is needed")
        return config, load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as {model_type}: {error}") from None
