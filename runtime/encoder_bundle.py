"""Open an encoder's bundle: a folder with a graph, a tokenizer and a manifest.json like a decoder's (bundle.py).

    bundle = open_encoder("build/minilm")            # form and sizes are checked; verify=True compares every sha256
    bundle.task, bundle.labels, bundle.max_tokens    # what its graph answers, and of how long a text
    bundle.graph("fast")                             # an entry of "graphs", or None

`python -m export.onnx MODEL -o FOLDER` writes it. The manifest is as untrusted as a decoder's: no path leaves the folder, and
every number that later code counts on is checked here. A text's output is what TASKS names; `golden` holds PyTorch's of a few
texts, with how far each graph may be from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import AnyBundle, ENCODER_FORMAT, FORMAT, MANIFEST, check_form, read_manifest, with_files
from .errors import UserError, shown
from .files import read_json

VERSION = 1
TASKS = {"sentence-similarity": "sentence_embedding", "feature-extraction": "last_hidden_state", "text-classification": "logits",
         "regression": "logits", "token-classification": "logits", "question-answering": "start_logits"}      # the first output
BY_TOKEN = ("feature-extraction", "token-classification", "question-answering")      # whose outputs are of each token
ROLES = ("portable", "fast")
_FORM = {"name": str, "files": {str: {"bytes": int, "sha256": str}}, "tokenizer": str, "task": str, "labels": ([str], None),
         "pooling": (str, None), "golden": (str, None), "graphs": [{"role": str, "file": str}],
         "model": {"model_type": str, "vocab_size": int, "max_tokens": int, "pad_token_id": int},
         "engines": ([{"file": str, "backend": str, "version": str, "bytes": int, "compute_capabilities": [str],
                       "rows": int, "tokens": int}], None)}
_MEND = "export the model again"
_LABELLED = ("text-classification", "token-classification")


class EncoderBundle(AnyBundle):
    """An encoder's."""

    @property
    def task(self) -> str:
        """A key of TASKS."""
        return self.manifest["task"]

    @property
    def labels(self) -> list[str]:
        """Of a classification, in the order of its logits; of other tasks none."""
        return self.manifest["labels"] or []

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most, those around it included."""
        return self.manifest["model"]["max_tokens"]

    @property
    def size_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


@dataclass(frozen=True)
class Golden:
    """A text, PyTorch's first output of it (float32, flat), and by role how far (1 - cosine) a graph may be from that."""

    text: str
    output: np.ndarray
    budgets: dict[str, float]


def is_older(folder: Path) -> bool:
    """Whether a folder holds an encoder as they were before they had manifests."""
    return (folder / "model.onnx").is_file() and not (folder / MANIFEST).exists()


def is_encoder_bundle(folder: Path) -> bool:
    """Whether a folder's manifest is an encoder's. Raises UserError where it has none, or one that is no JSON."""
    return read_manifest(folder)[2].get("format") == ENCODER_FORMAT


def open_encoder(folder: str | Path, *, verify: bool = False) -> EncoderBundle:
    """Raises UserError for a folder that is no encoder's bundle or is damaged, CheckFailed for a changed file (`verify`)."""
    if isinstance(folder, (str, Path)) and is_older(Path(folder)):
        raise UserError(f"{folder} is an encoder of an older version, without a {MANIFEST}; {_MEND} with python -m export.onnx")
    folder, path, manifest = read_manifest(folder)
    if manifest.get("format") == FORMAT:
        raise UserError(f"{folder} is a decoder's bundle, which gives no embeddings, labels or entities: open it with runtime.Engine")
    if manifest.get("format") != ENCODER_FORMAT:
        raise UserError(f'{path}: "format" is not "{ENCODER_FORMAT}", so it is no encoder of this project')
    if type(manifest.get("version")) is not int or manifest["version"] != VERSION:
        raise UserError(f"{path}: version {shown(manifest.get('version'))}, but this runtime reads version {VERSION}; {_MEND}")
    check_form(path, "", manifest, _FORM)
    _check(path, manifest)
    return with_files(EncoderBundle(folder, manifest), verify)


def read_golden(bundle: EncoderBundle) -> list[Golden]:
    """The golden outputs; none where the bundle has no such file. Raises UserError where it is not what export.onnx writes."""
    if bundle.manifest.get("golden") is None:
        return []
    file = bundle.path(bundle.manifest["golden"])
    data = read_json(file, mend=_MEND)
    check_form(file, "", data, {"budgets": dict, "texts": [str], "outputs": [list]})
    budgets, outputs = data["budgets"], data["outputs"]
    if not budgets or not all(role in ROLES and isinstance(budget, float) and 0 < budget <= 0.1 for role, budget in budgets.items()):
        raise UserError(f"{file}: budgets are {shown(budgets)}; each is a number above 0 and at most 0.1; {_MEND}")
    numbers = all(isinstance(number, (int, float)) and not isinstance(number, bool) for output in outputs for number in output)
    if not data["texts"] or len(outputs) != len(data["texts"]) or not all(outputs) or not numbers:
        raise UserError(f"{file}: outputs are not numbers of each text; {_MEND}")
    return [Golden(text, np.array(output, np.float32), budgets) for text, output in zip(data["texts"], outputs)]


def _check(path: Path, manifest: dict) -> None:
    model, task, labels = manifest["model"], manifest["task"], manifest.get("labels")
    if task not in TASKS:
        raise UserError(f"{path}: task is {shown(task)}; known: {', '.join(TASKS)}")
    if (task in _LABELLED) != bool(labels) or len(set(labels or [])) != len(labels or []):
        wanted = "each of its own" if task in _LABELLED else "none"
        raise UserError(f"{path}: labels are {shown(labels)}, where a {task} has {wanted}; {_MEND}")
    if model["vocab_size"] < 1 or model["max_tokens"] < 4 or not 0 <= model["pad_token_id"] < model["vocab_size"]:
        raise UserError(f"{path}: model is {shown(model)}: max_tokens is at least 4, and pad_token_id one of vocab_size tokens; {_MEND}")
    roles = [graph["role"] for graph in manifest["graphs"]]
    if "portable" not in roles or not set(roles) <= set(ROLES) or len(set(roles)) != len(roles):
        raise UserError(f"{path}: the graphs' roles are {shown(roles)}; there is one portable graph, and perhaps one fast; {_MEND}")
    manifest["engines"] = manifest.get("engines") or []
    for engine in manifest["engines"]:
        if engine["rows"] < 1 or not 1 <= engine["tokens"] <= model["max_tokens"]:
            raise UserError(f"{path}: the engine {engine['file']} is for {engine['rows']} texts of {engine['tokens']} tokens, where the model "
                            f"takes {model['max_tokens']}; build it again with `python -m export.trt`")
    entries = manifest["graphs"] + manifest["engines"]
    named = [manifest["tokenizer"], *(entry["file"] for entry in entries), *filter(None, [manifest.get("golden")])]
    for name in named:
        if name not in manifest["files"]:
            raise UserError(f"{path}: names {name!r}, which is not among its files; {_MEND}")
