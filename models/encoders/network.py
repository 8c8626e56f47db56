"""An encoder's checkpoint: a Hugging Face folder of BERT's kin, opened as transformers' network and written again.

    model = load(folder, "text-classification")      # fp32, dropout as the configuration says; quantized weights as what their codes say
    save(folder, model, source, stage)                # config.json, model.safetensors, tokenizer, pooling, lineage.json

A sentence's embedding is the mean over its real tokens, or the first token's state where 1_Pooling says so, normalized: what
sentence-transformers gives for such folders. Other poolings and further modules are refused.

A quantized encoder has `M.codes` and `M.scales` in place of `M.weight`, and a quantization_config, as a decoder has
(models/network/quantized.py), under transformers' names.
"""

import inspect
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.formats import lineage
from models.network.quantized import Quantization, QuantizedTensor
from runtime.encoder import Encoded
from runtime.errors import UserError
from runtime.files import new_folder, read_json

TASKS = {                            # the class of transformers, the graph's outputs
    "feature-extraction": ("AutoModel", ("last_hidden_state",)),
    "sentence-similarity": ("AutoModel", ("sentence_embedding",)),
    "text-classification": ("AutoModelForSequenceClassification", ("logits",)),
    "token-classification": ("AutoModelForTokenClassification", ("logits",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
}
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
WEIGHTS = "model.safetensors"
_SHIFTED = ("roberta", "xlm-roberta", "mpnet")                # whose positions begin behind the padding's id
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
               "merges.txt", "spm.model", "spiece.model", "sentencepiece.bpe.model", "LICENSE", "NOTICE")
_SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


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
        if kind == "Pooling" and not (folder / "1_Pooling" / "config.json").is_file():
            raise UserError(f"{folder}: modules.json names a pooling, and {folder / '1_Pooling' / 'config.json'} is not there: get the model again")
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


def embedding(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Normalized embeddings [b, h] of states [b, s, h], of which `mask` [b, s] has a 1 where a token is real."""
    real = mask[:, :, None].to(states.dtype)
    pooled = states[:, 0] if pooling == "cls" else (states * real).sum(1) / real.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1)


def load(folder: Path, task: str, *, labels: list[str] | None = None, attention: str = "eager"):
    """The transformers model of a local folder for a task, fp32, ready to be asked (`eval`).

    labels: begin a new head for these, whatever the folder has ([""]: one number). Raises UserError.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give the folder of a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors in it; save the model with save_pretrained")
    for library in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(library).setLevel(logging.ERROR)   # what they say of themselves
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    more = {}
    if labels is not None:
        more = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)},
                "problem_type": "regression" if labels == [""] else None}
    kind, quantized = getattr(transformers, TASKS[task][0]), read_quantized(folder)
    state = None if quantized is None else dense(folder, quantized)
    try:
        if state is not None:                                # which from_pretrained knows nothing of; all names are the class's own
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            del config.quantization_config
            model = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
            report = {"missing_keys": model.load_state_dict(state, strict=False).missing_keys, "mismatched_keys": ()}
        else:
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=attention, use_safetensors=True, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True, **more)
    except Exception as error:                               # whose types have nothing in common
        raise UserError(f"{folder}: transformers cannot load it for {task} ({type(error).__name__}: {' '.join(str(error).split())})"
                        ) from None
    fresh = ("pooler", "classifier", "score", "head.", "qa_outputs", "dense") if labels is not None else ("pooler",)
    mismatched = [key for key in sorted(report["mismatched_keys"]) if labels is None or not any(part in key[0] for part in fresh)]
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise UserError(f"{folder}: {name} is {list(stored)}, where config.json asks for {list(wanted)}; save the model again")
    missing = [name for name in report["missing_keys"] if not any(part in name for part in fresh)]
    if missing:
        raise UserError(f"{folder}: it has no weights for {task} ({', '.join(sorted(missing)[:3])}); give the --task it was "
                        "trained for")
    return model.eval()


def max_tokens(config) -> int:
    """Tokens of a text at most, those around it included."""
    most = getattr(config, "max_position_embeddings", None) or 512
    return most - (config.pad_token_id or 0) - 1 if config.model_type in _SHIFTED else most


def takes_types(model) -> bool:
    """Whether the network is told which of two texts a token is of."""
    return "token_type_ids" in inspect.signature(model.forward).parameters and getattr(model.config, "type_vocab_size", 2) > 1


def alone(model, one: Encoded) -> dict[str, torch.Tensor]:
    """What the network takes for one text, or one pair."""
    given = {"input_ids": torch.from_numpy(one.ids)[None], "attention_mask": torch.ones(1, len(one), dtype=torch.long)}
    return given | ({"token_type_ids": torch.from_numpy(one.types)[None]} if takes_types(model) else {})


def labels_of(config) -> list[str]:
    """The labels of a classification, in the order of its logits."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def read_quantized(folder: Path) -> Quantization | None:
    """What is quantized of a checkpoint, by transformers' names; None: nothing."""
    found = read_json(folder / "config.json", strict=False).get("quantization_config")
    return None if found is None else Quantization.from_dict(found)


def quantized_tensors(folder: Path, quantization: Quantization) -> dict[str, QuantizedTensor]:
    """Module -> its codes. Raises UserError where they are not what the configuration says."""
    stored, found = load_file(folder / WEIGHTS), {}
    for name, form in quantization.tensors.items():
        parts = {suffix: stored.get(f"{name}.{suffix}") for suffix in ("codes", "scales", *(() if form.symmetric else ("zeros",)))}
        if any(part is None for part in parts.values()):
            raise UserError(f"{folder / WEIGHTS} lacks the codes of {name}, which config.json asks for: quantize the original again")
        columns = parts["codes"].shape[1] * 8 // form.bits
        found[name] = QuantizedTensor.stored(form, columns, parts)
    return found


def dense(folder: Path, quantization: Quantization) -> dict[str, torch.Tensor]:
    """Every tensor of a quantized checkpoint, float32, codes as what they stand for."""
    codes = quantized_tensors(folder, quantization)
    rest = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items()
            if name.rpartition(".")[0] not in codes or name.endswith(".bias")}
    return rest | {f"{name}.weight": tensor.dequantize() for name, tensor in codes.items()}


def save(folder: Path, model, source: Path, stage: dict, pooling: str | None = None) -> None:
    """Write a model into an empty folder, with the tokenizer and trail of `source`. pooling: it gives embeddings, made so."""
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    _luggage(folder, source, stage, pooling is not None)
    if pooling is not None and not (folder / "1_Pooling").is_dir():
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": model.config.hidden_size, **modes}))
        parts = [("", "0", "Transformer"), ("1_Pooling", "1", "Pooling"), ("2_Normalize", "2", "Normalize")]
        (folder / "modules.json").write_text(json.dumps([{"idx": i, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
                                                         for i, (path, name, kind) in enumerate(parts)]))


def save_quantized(folder: Path, source: Path, tensors: Iterable[tuple[str, torch.Tensor]], quantization: Quantization, stage: dict) -> None:
    """Write a quantized checkpoint into an empty folder; tensors: all of them, `M.codes` and so on where M is quantized."""
    save_file({name: tensor.contiguous() for name, tensor in tensors}, folder / WEIGHTS, metadata={"format": "pt"})
    config = read_json(source / "config.json", strict=False) | {"quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _luggage(folder, source, stage, (source / "1_Pooling").is_dir())


def copy_encoder(source: Path, out: Path, stage: dict):
    """Write an encoder's folder again, its weights as they are. Returns its network. Raises UserError for one that cannot be used."""
    task = task_of(source)
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: save its tokenizer with transformers (AutoTokenizer, save_pretrained) and try again")
    if (source / "modules.json").is_file() and not (source / "1_Pooling").is_dir():
        pooled_by(source)                                    # which is not "mean" for want of a file
    model = load(source, task)
    with new_folder(out) as folder:
        for file in (source / "config.json", *source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")):
            shutil.copyfile(file, folder / file.name)
        _luggage(folder, source, stage, task == "sentence-similarity")
    return model


def _luggage(folder: Path, source: Path, stage: dict, sentences: bool) -> None:
    for name in (*_COMPANIONS, *(_SENTENCES if sentences else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if sentences and (source / "1_Pooling").is_dir():
        shutil.copytree(source / "1_Pooling", folder / "1_Pooling")
    lineage.write(folder, [*lineage.read(source), stage])
