"""Export a model that is no decoder (BERT and its kin) to ONNX, for `python -m export.onnx FOLDER -o OUT --task TASK`.

The graph comes from `torch.onnx.export(dynamo=True)`, with batch and sequence dynamic; it is fp32, and `export.trt`
compiles it with `--shapes`. OUT gets `model.onnx`, the configuration and the tokenizer. Before anything is kept, ONNX
Runtime's CPU must give PyTorch's outputs, for two shapes, one of them with padding; a difference above TOLERANCE fails
the export.

A sentence's embedding is the mean over its real tokens, or the first token's state where 1_Pooling says so, normalized:
what sentence-transformers gives for such folders. Other poolings and further modules are refused.
"""

import inspect
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from export.bundle import check_output
from runtime.errors import CheckFailed, UserError
from runtime.files import new_folder, read_json

TASKS = {                            # the class of transformers, the graph's outputs
    "feature-extraction": ("AutoModel", ("last_hidden_state",)),
    "sentence-similarity": ("AutoModel", ("sentence_embedding",)),
    "text-classification": ("AutoModelForSequenceClassification", ("logits",)),
    "token-classification": ("AutoModelForTokenClassification", ("logits",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
}
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
              "vocab.json", "merges.txt", "spm.model", "spiece.model", "sentencepiece.bpe.model")
OPSET, GRAPH = 18, "model.onnx"
TOLERANCE = 1e-5                     # of the largest output, where that is above 1


def export_encoder(folder: Path, out: Path, task: str | None) -> None:
    """Write OUT. task: a key of TASKS, or None to tell it from the configuration's architecture.

    Raises UserError (a folder or task that cannot be used; nothing is written) and CheckFailed (ONNX Runtime differs).
    """
    task = task or task_of(folder)
    outputs = TASKS[task][1]
    check_output(out, GRAPH, f"holds no {GRAPH}")
    pooling = pooled_by(folder) if task == "sentence-similarity" else None
    model = _Headed(load(folder, task), outputs, pooling).eval()
    inputs = dummy_inputs(model.model, batch=2, length=16)
    with new_folder(out) as partial:
        _write_graph(model, inputs, outputs, partial / GRAPH)
        worst = max(difference(model, shape, partial / GRAPH) for shape in (
            inputs, dummy_inputs(model.model, batch=3, length=7, padding=2)))
        if not worst <= TOLERANCE:
            raise CheckFailed(f"{folder}: ONNX Runtime differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}")
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    size = (out / GRAPH).stat().st_size
    print(f"{out / GRAPH}: {task}, inputs {', '.join(inputs)}, outputs {', '.join(outputs)}, {size / 1e6:.1f} MB; "
          f"largest difference to PyTorch {worst:.1e}")


def is_encoder(folder: Path) -> bool:
    """Whether a checkpoint's architecture is one of BERT's kin, by its configuration."""
    try:
        return read_json(folder / "config.json", strict=False).get("model_type") in MODEL_TYPES
    except UserError:
        return False                                         # the decoder's reader says what is wrong with it


def task_of(folder: Path) -> str:
    """The task that a checkpoint's architecture was made for."""
    architecture = str((read_json(folder / "config.json", strict=False).get("architectures") or [""])[0])
    for task, (kind, _) in TASKS.items():
        if kind != "AutoModel" and architecture.endswith(kind.removeprefix("AutoModel")):
            return task
    return "sentence-similarity" if (folder / "1_Pooling").is_dir() else "feature-extraction"


def pooled_by(folder: Path) -> str:
    """"mean" or "cls": how a folder of sentence-transformers makes a sentence's embedding. Raises UserError for other ways."""
    for part in read_json(folder / "modules.json", list, strict=False) if (folder / "modules.json").is_file() else ():
        kind = str(part.get("type")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(f"{folder}: its embeddings also go through a {kind} module, which is not exported; "
                            "give --task feature-extraction and do the rest in the program around the graph")
    file = folder / "1_Pooling" / "config.json"
    told = read_json(file, strict=False) if file.is_file() else {}
    modes = [key.removeprefix("pooling_mode_") for key, value in told.items() if key.startswith("pooling_mode_") and value is True]
    if modes not in ([], ["mean_tokens"], ["cls_token"]):
        raise UserError(f"{file}: embeddings by {' and '.join(modes)} are not exported, only by mean_tokens or cls_token; "
                        "give --task feature-extraction and do the rest in the program around the graph")
    return "cls" if modes == ["cls_token"] else "mean"


def load(folder: Path, task: str):
    """The transformers model of a local folder for a task, fp32. Raises UserError."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors in it; save the model with save_pretrained")
    for library in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(library).setLevel(logging.ERROR)   # what they say of themselves
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, report = getattr(transformers, TASKS[task][0]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:                               # whose types have nothing in common
        raise UserError(f"{folder}: transformers cannot load it for {task} ({type(error).__name__}: {' '.join(str(error).split())})"
                        ) from None
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: {name} is {list(stored)}, where config.json asks for {list(wanted)}; save the model again")
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise UserError(f"{folder}: it has no weights for {task} ({', '.join(sorted(missing)[:3])}); give the --task it was "
                        "trained for")
    return model


def dummy_inputs(model, batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the names that the model's forward takes; the last `padding` tokens of row 0 are masked."""
    shape, types = (batch, length), getattr(model.config, "type_vocab_size", 2)
    inputs = {"input_ids": torch.randint(model.config.vocab_size, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    if "token_type_ids" in inspect.signature(model.forward).parameters and types > 1:
        inputs["token_type_ids"] = torch.randint(types, shape)
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
    """A transformers model whose outputs are the task's, as a tuple of tensors. pooling: of a sentence's embedding."""

    def __init__(self, model, outputs: tuple[str, ...], pooling: str | None):
        super().__init__()
        self.model, self.outputs, self.pooling = model, outputs, pooling

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        if self.pooling is None:
            return tuple(result[name] for name in self.outputs)
        states = result.last_hidden_state
        real = attention_mask[:, :, None].to(states.dtype)
        pooled = states[:, 0] if self.pooling == "cls" else (states * real).sum(1) / real.sum(1).clamp(min=1e-9)
        return (torch.nn.functional.normalize(pooled, dim=1),)


def _write_graph(model, inputs, outputs, path: Path) -> None:
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")                      # of torch's exporter, about itself
        try:
            program = torch.onnx.export(model, kwargs=inputs, dynamo=True, opset_version=OPSET, verbose=False,
                                        input_names=list(inputs), output_names=list(outputs),
                                        dynamic_shapes={name: {0: batch, 1: length} for name in inputs})
        except ModuleNotFoundError:                          # onnxscript: runtime.cli says what installs it
            raise
        except Exception as error:                           # of a library that promises no type
            raise UserError(f"PyTorch's exporter cannot export this {model.model.config.model_type} model "
                            f"({(str(error).strip() or type(error).__name__).splitlines()[0]})") from None
    program.save(str(path), external_data=sum(p.nbytes for p in model.parameters()) > 2**30)
