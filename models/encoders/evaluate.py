"""Judge an encoder, a checkpoint or a bundle: `python -m models.evaluate ENCODER --task classify|pair|regress|ner|similarity --data FILES`."""

from dataclasses import fields
from pathlib import Path

from models.encoders.judging import TASKS, TorchEncoder, judge
from models.encoders.network import is_encoder, labels_of, load, pooled_by, takes_types, task_of
from models.tasks.options import examples_of
from runtime.bundle import MANIFEST
from runtime.encoder import Encoder
from runtime.encoder_bundle import is_encoder_bundle
from runtime.errors import UserError
from runtime.text import Tokenizer

OF_TEXT = ("reference", "window", "max_windows", "show_prompt", "examples", "n", "temperature", "top_k", "top_p", "provider", "graph", "exact",
           "task_file", "prompt", "chat", "shots")               # options of models.evaluate that mean nothing where no text is written


def is_any_encoder(folder: Path) -> bool:
    """Whether a folder is an encoder's bundle or checkpoint."""
    return is_encoder_bundle(folder) if (folder / MANIFEST).is_file() else is_encoder(folder)


def evaluate_encoder(options) -> dict:
    """The metrics, for models.evaluate to show. options: its. Raises UserError."""
    if options.task not in TASKS:
        raise UserError(f"{options.model} is an encoder, which writes no text: give --task {', '.join(TASKS)}")
    for option in fields(options):
        if option.name in OF_TEXT and getattr(options, option.name) != option.default:
            raise UserError(f"--{option.name.replace('_', '-')} is for models that write text, and {options.model} is an encoder: leave it out")
    examples = examples_of(options, options.data, options.limit)
    words = dict(pair.split("=", 1) for pair in options.labels if "=" in pair)
    with opened(options.model, options.threads) as encoder:
        found = judge(encoder, options.task, examples, words, options.stride)
        backend = f"onnxruntime {encoder.role}" if hasattr(encoder, "role") else "pytorch"
        return {"backend": backend, "examples": len(examples), "truncated": encoder.truncated, **found}


def opened(folder: Path, threads: int | None = None) -> Encoder:
    """A bundle, or a checkpoint in PyTorch."""
    if (folder / MANIFEST).is_file():
        return Encoder(folder, threads=threads)
    task = task_of(folder)
    model = load(folder, task, attention="sdpa")
    kind = "regression" if getattr(model.config, "problem_type", None) == "regression" else task
    return TorchEncoder(model, Tokenizer(folder / "tokenizer.json"), kind, labels_of(model.config) if kind.endswith("-classification") else [],
                        pooled_by(folder) if task == "sentence-similarity" else None, takes_types(model))
