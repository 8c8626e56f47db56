"""Fine-tune an encoder: `python -m models.finetune ENCODER --task classify|pair|regress|ner|similarity --data FILES -o OUT`.

The network is transformers', with a new head for the task's labels (none for similarity); training, its files and resuming are
models.train's. LoRA stands beside every linear of the layers, the head is trained whole, and both are merged when saved. Dropout is off:
training draws nothing at random, so a resumed run learns what an unbroken one does.

Texts longer than --context are cut and counted.
"""

import copy
import time
from dataclasses import replace
from functools import partial

import torch

from models.data.records import find_sources, source_digest
from models.encoders.judging import HEADLINE, TASKS, TorchEncoder, judge
from models.encoders.network import load, max_tokens, pooled_by, read_quantized, save, takes_types
from models.encoders.rows import EncoderRows, losses
from models.checkpoint import check_output
from models.formats import lineage
from models.tasks.examples import Example
from models.tasks.options import examples_of, set_aside
from models.training.placement import process_state
from models.training.trainer import Trainer
from runtime.encoder import TextEncoder
from runtime.errors import UserError
from runtime.machine import peak_rss_mb
from runtime.text import Tokenizer

CONTEXT = 128                            # tokens of a text by default
HEADS = {"classify": "text-classification", "pair": "text-classification", "regress": "text-classification",
         "ner": "token-classification", "similarity": "sentence-similarity"}
OF_DECODERS = ("class_weights", "augment", "mix", "prompt", "task_file", "chat", "shots")


def finetune_encoder(options) -> None:
    """Encode the examples, train, report before and after. options: models.finetune's. Raises UserError, CheckFailed."""
    start, folder, task = time.perf_counter(), options.checkpoint, options.task
    if task not in TASKS:
        raise UserError(f"{folder} is an encoder, which writes no text: --task {task} is for decoders; give one of {', '.join(TASKS)}")
    if read_quantized(folder) is not None:
        raise UserError(f"{folder} is quantized; fine-tune the checkpoint it was made of")
    for name in ("keep_adapter", *OF_DECODERS):
        if getattr(options, name) not in (None, False, ()):
            raise UserError(f"--{name.replace('_', '-')} is for decoders, and {folder} is an encoder: leave it out")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there")
    check_output(options.out / "last", folder)
    train, valid = _examples(options)
    words = dict(pair.split("=", 1) for pair in options.labels if "=" in pair)
    train, valid = ([replace(one, answers=(words.get(one.answers[0], one.answers[0]),)) for one in part] for part in (train, valid))
    labels = _labels(task, train, options)
    torch.manual_seed(options.seed)
    pooling = pooled_by(folder) if task == "similarity" else None
    state = process_state(options.device)
    model = load(folder, HEADS[task], labels=None if task == "similarity" else labels or [""], attention="sdpa")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name or task in ("classify", "pair", "regress"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    types = takes_types(model)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    longest = max_tokens(model.config)
    if options.context is not None and not 4 <= options.context <= longest:
        raise UserError(f"--context {options.context}: the model's positions are {longest}")
    encode = TextEncoder(tokenizer, options.context or min(CONTEXT, longest))
    rows = [EncoderRows(part, task, encode, labels, model.config.pad_token_id or 0) for part in (train, valid)]
    batch = options.batch or 32
    steps = options.steps if options.steps is not None else options.epochs * -(-len(train) // batch)
    options = options.filled(batch=batch, steps=steps, warmup=steps // 20, learning_rate=1e-3 if options.method == "lora" else 1e-4,
                             micro_batch=batch if task == "similarity" else rows_at_once(batch, state.device))
    encoder = TorchEncoder(model, tokenizer, TASKS[task], labels, pooling, types)
    before = judge(encoder, task, valid) if task == "similarity" else None
    network = model
    if options.method == "lora":
        network = _with_lora(model, options)
    loss, judged = losses(task, types, pooling, rows[0].graded)
    inputs = {s: source_digest(s) for s in find_sources(options.data + options.valid)}
    trainer = Trainer(network, options, *rows, partial(_save, options, inputs, pooling), inputs, loss=loss, judge=judged, pack=tuple)
    if state.is_main_process:
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        print(f"{len(train)} training and {len(valid)} validation examples of up to {rows[0].context} tokens"
              + (f", {rows[0].cut + rows[1].cut} of them cut there" if rows[0].cut + rows[1].cut else "")
              + f"; {trained / 1e6:.2f}M of {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters are trained")
    metrics = trainer.fit()
    if not state.is_main_process:
        return
    print(f"{options.out / 'last'}: loss {metrics['valid_loss']:.4f} after {trainer.step} steps")
    trainer.module.eval()
    found = judge(encoder, task, valid)
    was = f" ({HEADLINE[task]} {before[HEADLINE[task]]:.4f} before)" if before else ""
    shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float))
    print(f"{shown} on {len(valid)} examples{was}")
    lineage.add_metrics(options.out / "last", found)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak_rss_mb():.0f} MB")


def rows_at_once(batch: int, device: torch.device) -> int:
    """Texts of a micro-batch: few on a CPU, where rows of like length go together and padding is computed like text."""
    return min(batch, 8 if device.type == "cpu" else 32)


def _examples(options) -> tuple[list[Example], list[Example]]:
    examples = examples_of(options, options.data, options.limit)
    if options.task in ("classify", "pair") and len({one.answers[0] for one in examples}) < 2:
        raise UserError(f"{options.data[0]}: every example has the label {examples[0].answers[0]}, so there is nothing to tell apart: give "
                        "others")
    if options.valid:
        return examples, examples_of(options, options.valid)
    return set_aside(examples, options)


def _labels(task: str, train: list[Example], options) -> list[str]:
    if task in ("regress", "similarity"):
        return []
    if task == "ner":
        kinds = sorted({tag[2:] for one in train for tag in one.fields["tags"] if tag != "O"})
        if not kinds:
            raise UserError(f"{options.data[0]}: every tag is O, so there is no entity to learn")
        return ["O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]
    return sorted({one.answers[0] for one in train})


def _with_lora(model, options):
    from peft import LoraConfig, get_peft_model
    prefix = model.base_model_prefix
    body = getattr(model, prefix, None) if any(name == prefix for name, _ in model.named_children()) else None
    inside = f"{prefix}." if body is not None else ""
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name.startswith(inside)
               and "pooler" not in name]
    heads = [name for name, child in model.named_children() if body is not None and name != prefix and any(True for _ in child.parameters())]
    network = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets, modules_to_save=heads or None))
    for name, parameter in network.named_parameters():
        if ".pooler." in name and heads:
            parameter.requires_grad_(True)
    return network


def _save(options, inputs: dict, pooling: str | None, network, folder, metrics: dict) -> None:
    if options.method == "lora":
        network = copy.deepcopy(network).merge_and_unload()
    save(folder, network, options.checkpoint, lineage.stage("finetune", options, inputs, metrics, options.seed), pooling)
