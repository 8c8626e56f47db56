"""Export a model that is no decoder (BERT and its kin) to ONNX, for `python -m export.onnx FOLDER -o OUT --task TASK`.

The model's class for a task and its dummy inputs come from optimum (TasksManager, DummyTextInputGenerator); the graph
from `torch.onnx.export(dynamo=True)`, with batch and sequence dynamic. OUT gets `model.onnx`, the configuration and
the tokenizer. Before anything is kept, ONNX Runtime's CPU must give PyTorch's outputs, for two shapes, one of them with
padding; a difference above TOLERANCE fails the export.

Tasks: feature-extraction (last_hidden_state), sentence-similarity (sentence_embedding: the mean over real tokens,
normalized, as sentence-transformers' mean pooling does), text-classification and token-classification (logits),
question-answering (start_logits, end_logits). The graph is fp32, and `export.trt` compiles it with `--shapes`.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from runtime.errors import CheckFailed, UserError
from runtime.files import new_folder, read_json

OUTPUTS = {"feature-extraction": ("last_hidden_state",), "sentence-similarity": ("sentence_embedding",),
           "text-classification": ("logits",), "token-classification": ("logits",),
           "question-answering": ("start_logits", "end_logits")}
ARCHITECTURES = {"ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
                 "ForQuestionAnswering": "question-answering"}
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
OPSET, GRAPH = 18, "model.onnx"
TOLERANCE = 1e-5                     # of the largest output, where that is above 1


def export_encoder(folder: Path, out: Path, task: str | None) -> None:
    """Write OUT. task: a key of OUTPUTS, or None to tell it from the configuration's architecture.

    Raises UserError (a folder or task that cannot be used; nothing is written) and CheckFailed (ONNX Runtime differs).
    """
    task = task or task_of(folder)
    if task not in OUTPUTS:
        raise UserError(f"--task {task}: known tasks are {', '.join(OUTPUTS)}")
    if out.exists() and not (out / GRAPH).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no {GRAPH}: choose another folder, or remove it")
    model = _Headed(load(folder, task), task).eval()
    inputs = dummy_inputs(model.model, task, batch=2, length=16)
    with new_folder(out) as partial:
        _write_graph(model, inputs, OUTPUTS[task], partial / GRAPH)
        worst = max(difference(model, shape, partial / GRAPH) for shape in (
            inputs, dummy_inputs(model.model, task, batch=3, length=7, padding=2)))
        if not worst <= TOLERANCE:
            raise CheckFailed(f"{folder}: ONNX Runtime differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}")
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    size = (out / GRAPH).stat().st_size
    print(f"{out / GRAPH}: {task}, inputs {', '.join(inputs)}, outputs {', '.join(OUTPUTS[task])}, {size / 1e6:.1f} MB; "
          f"largest difference to PyTorch {worst:.1e}")


def is_encoder(folder: Path) -> bool:
    """Whether a checkpoint's architecture is one of BERT's kin, by its configuration."""
    try:
        return read_json(folder / "config.json", strict=False).get("model_type") in MODEL_TYPES
    except UserError:
        return False                                         # the decoder's reader says what is wrong with it


def task_of(folder: Path) -> str:
    """The task that a checkpoint's architecture was made for."""
    architectures = read_json(folder / "config.json", strict=False).get("architectures") or [""]
    head = next((task for name, task in ARCHITECTURES.items() if architectures[0].endswith(name)), None)
    pooled = (folder / "1_Pooling").is_dir() and "sentence-similarity"
    return head or pooled or "feature-extraction"


def load(folder: Path, task: str):
    """The transformers model of a local folder for a task, fp32. Raises UserError."""
    from optimum.exporters.tasks import TasksManager
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors in it; save the model with save_pretrained")
    try:
        kind = TasksManager.get_model_class_for_task("feature-extraction" if task == "sentence-similarity" else task)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True,
                                             local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it for {task} ({error})") from None
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise UserError(f"{folder}: it has no weights for {task} ({', '.join(sorted(missing)[:3])}); give the --task it was "
                        "trained for")
    return model


def dummy_inputs(model, task: str, batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the names that the model's forward takes; the last `padding` tokens of row 0 are masked."""
    from optimum.utils.input_generators import DummyTextInputGenerator
    from optimum.utils.normalized_config import NormalizedTextConfig
    maker = DummyTextInputGenerator(task, NormalizedTextConfig(model.config), batch_size=batch, sequence_length=length)
    taken = inspect.signature(model.forward).parameters
    names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in taken]
    if getattr(model.config, "type_vocab_size", 2) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")
    inputs = {name: maker.generate(name, framework="pt") for name in names}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padding:
        inputs["attention_mask"][0, -padding:] = 0
    return inputs


def difference(model, inputs: dict[str, torch.Tensor], graph: Path) -> float:
    """Largest difference between ONNX Runtime's CPU and PyTorch, relative where an output exceeds 1."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = [value.numpy() for value in model(**inputs)]
    return max(float(np.abs(g - e).max() / max(1.0, np.abs(e).max())) for g, e in zip(got, expected, strict=True))


class _Headed(torch.nn.Module):
    """A transformers model whose outputs are the task's, as a tuple of tensors."""

    def __init__(self, model, task: str):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        if self.task != "sentence-similarity":
            return tuple(result[name] for name in OUTPUTS[self.task])
        real = attention_mask[:, :, None].to(result.last_hidden_state.dtype)
        mean = (result.last_hidden_state * real).sum(1) / real.sum(1).clamp(min=1e-9)
        return (torch.nn.functional.normalize(mean, dim=1),)


def _write_graph(model, inputs, outputs, path: Path) -> None:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")                      # of torch's exporter, about itself
        program = torch.onnx.export(model, kwargs=inputs, dynamo=True, opset_version=OPSET, verbose=False,
                                    input_names=list(inputs), output_names=list(outputs),
                                    dynamic_shapes={name: {0: batch, 1: length} for name in inputs})
    program.save(str(path), external_data=sum(p.nbytes for p in model.parameters()) > 2**30)
