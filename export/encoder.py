"""Export a model that is no decoder (BERT and its kin) to ONNX, for `python -m export.onnx FOLDER -o OUT --task TASK`.

The graph comes from `torch.onnx.export(dynamo=True)`, with batch and sequence dynamic, and `export.trt` compiles it with
`--shapes`; a quantized checkpoint's codes are put into it value for value (encoder_codes.py). OUT gets the graphs, the tokenizer,
golden outputs and a manifest (runtime/encoder_bundle.py). Before anything is kept, ONNX Runtime's CPU must give PyTorch's outputs,
for two shapes, one of them with padding: a difference above TOLERANCE fails the export. The golden outputs are PyTorch's, of texts
below; a fast graph, which rounds activations too, is held to a budget that is stored with them.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch

from export.bundle import TOKENIZER, check_output, compact_tokenizer, file_entry, read_json, write_manifest
from export.encoder_codes import put_codes
from models.encoders.network import (TASKS, alone, embedding, labels_of, load, max_tokens, pooled_by, quantized_tensors, read_quantized,
                                     takes_types, task_of)
from models.formats import lineage
from runtime.bundle import ENCODER_FORMAT, MANIFEST
from runtime.compare import cosine
from runtime.encoder import Encoder, TextEncoder
from runtime.encoder_bundle import VERSION, open_encoder
from runtime.errors import CheckFailed, UserError
from runtime.files import new_folder
from runtime.text import Tokenizer

OPSET, GRAPH, FAST, GOLDEN = 21, "model.onnx", "fast.onnx", "golden.json"
TOLERANCE = 1e-5                     # of the largest output, where that is above 1
EXACT, WORST = 1e-4, 0.05            # 1 - cosine to PyTorch's golden outputs: of the portable graph, and of a fast one at most
TEXTS = ("A cat sits on the mat.", "Quarterly revenue grew by nine percent, Jane Doe of Acme Corp. said in Zürich.", "猫坐在垫子上。",
         "not a film to miss , and yet one that never quite finds its feet " * 6)


def export_encoder(folder: Path, out: Path, task: str | None) -> None:
    """Write OUT. task: a key of TASKS, or None to tell it from the configuration's architecture.

    Raises UserError (a folder or task that cannot be used; nothing is written) and CheckFailed (ONNX Runtime differs).
    """
    task = task or task_of(folder)
    outputs = TASKS[task][1]
    check_output(out, GRAPH, f"holds no {GRAPH}")
    pooling = pooled_by(folder) if task == "sentence-similarity" else None
    model = _Headed(load(folder, task), outputs, pooling).eval()
    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} has no {TOKENIZER}, which a bundle needs: save the tokenizer there "
                        f"(in transformers, AutoTokenizer.from_pretrained(...).save_pretrained)")
    tokenizer, config = Tokenizer(folder / TOKENIZER), model.model.config
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{folder / TOKENIZER}: has {len(tokenizer)} tokens, where the model knows {config.vocab_size}; get the model again")
    quantized, inputs = read_quantized(folder), dummy_inputs(model.model, batch=2, length=16)
    with new_folder(out) as partial:
        _write_graph(model, inputs, outputs, partial / GRAPH)
        if quantized is not None:
            put_codes(partial / GRAPH, partial / FAST, quantized_tensors(folder, quantized))
        worst = max(difference(model, shape, partial / GRAPH) for shape in (
            inputs, dummy_inputs(model.model, batch=3, length=7, padding=2)))
        if not worst <= TOLERANCE:
            raise CheckFailed(f"{folder}: ONNX Runtime differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}")
        (partial / TOKENIZER).write_text(json.dumps(compact_tokenizer(read_json(folder / TOKENIZER)), ensure_ascii=False,
                                                    separators=(",", ":")), encoding="utf-8")
        manifest = _manifest(out.resolve().name, folder, task, pooling, config, (partial / FAST).is_file())
        _prove(model, tokenizer, partial, manifest)
        open_encoder(partial)                               # what the runtime would refuse is not left behind
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{out}: {task}, inputs {', '.join(inputs)}, outputs {', '.join(outputs)}, {size / 1e6:.1f} MB; "
          f"largest difference to PyTorch {worst:.1e}")


def _manifest(name: str, folder: Path, task: str, pooling: str | None, config, fast: bool) -> dict:
    regression = task == "text-classification" and config.problem_type == "regression"
    task = "regression" if regression else task
    graphs = [{"role": "portable", "file": GRAPH, "opset": OPSET}, *([{"role": "fast", "file": FAST, "opset": OPSET}] if fast else [])]
    return {"format": ENCODER_FORMAT, "version": VERSION, "name": name, "files": {}, "tokenizer": TOKENIZER, "task": task,
            "labels": labels_of(config) if task.endswith("-classification") else None, "pooling": pooling, "normalize": pooling is not None,
            "golden": None, "graphs": graphs,
            "model": {"model_type": config.model_type, "vocab_size": config.vocab_size, "max_tokens": max_tokens(config),
                      "pad_token_id": config.pad_token_id or 0},
            "lineage": [*lineage.read(folder), lineage.stage("export.onnx", {"task": task}, {})]}


def _prove(model, tokenizer: Tokenizer, folder: Path, manifest: dict) -> None:
    """Golden outputs and the manifest, with what each graph differs by from PyTorch. Raises CheckFailed where that is too much."""
    encode = TextEncoder(tokenizer, manifest["model"]["max_tokens"])
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            expected.append(model(**alone(model.model, encode(text)))[0][0].flatten().numpy())
    files = [file for file in sorted(folder.iterdir()) if file.name != MANIFEST]
    manifest["files"] = {file.name: file_entry(file) for file in files}
    write_manifest(folder, manifest)
    budgets = {}
    for graph in manifest["graphs"]:
        with Encoder(folder, provider="cpu", role=graph["role"]) as encoder:
            worst = max(1 - cosine(row.ravel(), want) for row, want in zip(encoder.outputs(list(TEXTS)), expected))
        limit = EXACT if graph["role"] == "portable" else WORST
        if not worst <= limit:
            raise CheckFailed(f"the {graph['role']} graph differs from PyTorch by a cosine of 1 - {worst:.1e}, more than {limit:g}: "
                              "quantize with more bits")
        budgets[graph["role"]] = float(min(limit, max(1e-3, 4 * worst)) if graph["role"] == "fast" else EXACT)
    (folder / GOLDEN).write_text(json.dumps({"budgets": budgets, "texts": list(TEXTS), "outputs": [
        [float(f"{number:.6g}") for number in row] for row in expected]}), encoding="utf-8")
    manifest["golden"], manifest["files"][GOLDEN] = GOLDEN, file_entry(folder / GOLDEN)
    write_manifest(folder, manifest)


def dummy_inputs(model, batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of the names that the model's forward takes; the last `padding` tokens of row 0 are masked."""
    shape = batch, length
    inputs = {"input_ids": torch.randint(model.config.vocab_size, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    if takes_types(model):
        inputs["token_type_ids"] = torch.randint(getattr(model.config, "type_vocab_size", 2), shape)
    if padding:
        inputs["attention_mask"][0, -padding:] = 0
    return inputs


def difference(model, inputs: dict[str, torch.Tensor], graph: Path) -> float:
    """Largest difference between ONNX Runtime's CPU and PyTorch, relative where an output exceeds 1."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")      # which would round activations, too
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
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
        return (embedding(result.last_hidden_state, attention_mask, self.pooling),)


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
