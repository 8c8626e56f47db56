"""Fine-tune a checkpoint on a task's examples: `python -m models.finetune CKPT --task qa --data FILES -o OUT`.

The model learns to answer the prompts that the task asks with (models/tasks/, runtime/task.py), the loss on the answer alone;
of `chat` on every reply, through the model's own template. Each checkpoint of the run has the task beside it, task.json, by
which models.evaluate and a bundle's `Engine.solve` ask it. LoRA (merged when saved, or kept as a `peft` adapter) or every
weight. An encoder (BERT and its kin) learns classify, pair, regress, ner or similarity (models/encoders/finetune.py). The run's folder, resuming and several processes are those of models.train.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.formats import lineage
from models.data.records import find_sources, source_digest
from models.data.examples import Encoded, Examples, fitting
from models.tasks.augment import KINDS, augmented
from models.tasks.defaults import DECODER_TASKS, TASKS
from models.tasks.examples import Example, read_examples, split_shots
from models.tasks.mixing import class_weights, parse_mix, share, weighted
from models.tasks.options import TaskOptions, check_label, examples_of, open_task, set_aside, with_shots
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import read_json, write
from runtime.machine import peak_rss_mb
from runtime.task import FILE, Task
from runtime.text import Tokenizer

EXAMPLES = """examples:
  python -m models.finetune build/smollm2-135m --task classify --data ../shared/data/classify/sst2-train.tsv \\
      --limit 800 --valid ../shared/data/classify/sst2-dev.tsv --labels 0=negative 1=positive \\
      --prompt "Review: {text}\\nSentiment:" -o build/smollm2-sst2
  python -m models.finetune build/smollm2-135m --task qa --chat --data ../shared/data/qa/xquad-en.json -o build/smollm2-qa
  python -m models.finetune build/smollm2-135m --task chat --data ../shared/data/chat/alpaca-en.json \\
      -o build/smollm2-chat
"""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TaskOptions, TrainerOptions):
    """Fine-tune a checkpoint on a task, with LoRA or in full."""
    checkpoint: Path = arg(positional=True, help="checkpoint to fine-tune")
    task: str = arg(help="what the examples are", choices=TASKS)
    data: tuple[str, ...] = arg(help="files, folders, globs or hf:NAME@SPLIT to learn from")
    valid: tuple[str, ...] = arg((), help="files to evaluate on (by default a share of --data)")
    valid_share: float = arg(0.1, help="share of examples set aside where --valid is not given", above=0, below=1)
    limit: int | None = arg(None, help="learn from this many examples, the first ones", least=1)
    epochs: int = arg(3, help="passes over the data, where --steps is not given", least=1)
    class_weights: tuple[str, ...] = arg((), help="labels: how often each is learned from: balanced, or NAME=WEIGHT ...", group="the data")
    augment: str | None = arg(None, help="labels and scores: learn from a changed copy of each text too (models/tasks/augment.py); auto: of the "
                                         "kind that helps most on held-out examples in a short run, or of none", choices=("auto", *KINDS),
                              group="the data")
    mix: tuple[str, ...] = arg((), help="other tasks to learn in the same run, as TASK@WEIGHT=FILE: WEIGHT examples of it to one of --data",
                               group="the data")
    context: int | None = arg(None, help="leave out examples of more tokens (by default 512, or the model's context)", least=1)
    method: str = arg("lora", help="what is trained", choices=("lora", "full"), group="LoRA")
    rank: int = arg(16, help="LoRA's rank", least=1, group="LoRA")
    alpha: float = arg(32.0, help="LoRA's scale, times 1 / rank", above=0, group="LoRA")
    keep_adapter: bool = arg(False, help="save the adapter alone, not merged into the weights", group="LoRA")
    weight_decay: float = arg(0.0, help="decay of matrices", least=0, group="training")

    def __post_init__(self):
        super().__post_init__()
        if self.keep_adapter and self.method == "full":
            raise UserError("--keep-adapter is for --method lora: full fine-tuning has no adapter")


def main(argv=None) -> int:
    return run(FinetuneOptions, "finetune", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from models.encoders.finetune import finetune_encoder
from models.encoders.network import is_encoder
from models.formats.chat import chat_encoder, special_ids
from models.checkpoint import check_output, load_decoder, open_checkpoint, fill_checkpoint
from models.tasks.learning import accuracy, encode
from models.training.lora import add_lora, check_adapters, merged_tensors, save_adapter
from models.training.memory import memory_line, rows_at_once, training_bytes
from models.training.placement import mixed_precision, process_state
from models.training.trainer import Trainer

MICRO_TOKENS = 2048              # of a micro-batch, by default on a CPU
RATES = {"lora": 5e-4, "full": 2e-5}


def finetune(options: FinetuneOptions) -> None:
    """Encode the examples, train, report before and after. Raises UserError, or CheckFailed at a loss not finite."""
    start = time.perf_counter()
    if is_encoder(options.checkpoint):
        return finetune_encoder(options)
    if options.task not in DECODER_TASKS:
        raise UserError(f"--task {options.task}: compares the embeddings of an encoder; a decoder learns scores with --task regress")
    checkpoint, tokenizer_file = open_checkpoint(options.checkpoint), options.checkpoint / "tokenizer.json"
    if checkpoint.quantization:
        raise UserError(f"{options.checkpoint} is quantized; fine-tune the checkpoint it was made of")
    if options.method == "lora":
        check_adapters(checkpoint, options.keep_adapter)
    options = options.filled(context=min(512, checkpoint.config.context_length))
    if options.context > checkpoint.config.context_length:
        raise UserError(f"--context {options.context}: the model's context is {checkpoint.config.context_length}")
    if not tokenizer_file.is_file():
        raise UserError(f"{options.checkpoint}: no tokenizer.json there")
    check_output(options.out / "last", options.checkpoint)
    tokenizer, state = Tokenizer(tokenizer_file), process_state(options.device)
    task, learned, held = _examples(options)
    chat, pad = chat_encoder(options.checkpoint, tokenizer), checkpoint.config.pad_token_id or 0
    end = next(iter(special_ids(checkpoint.config, options.checkpoint)["eos_token_ids"]), None)

    def rows(task: Task, examples: list[Example], name: str) -> list[Encoded]:
        return fitting([row for example in examples for row in encode(task, example, tokenizer, chat, end)], options.context, name)
    valid = Examples(rows(task, held, "validation data"), pad)
    if options.augment:
        kind = options.augment if options.augment != "auto" else chosen_kind(options, task, learned, valid, lambda some: rows(task, some, "trial"))
        learned = learned + (augmented(kind, learned, options.seed) if kind else [])
    train = rows(task, learned, "training data")
    for other, more, weight in _mixed(options):
        train = train + share(rows(other, more, f"training data of {other.name}"), max(1, round(weight * len(learned))), options.seed)
    train = Examples(train, pad)
    answers = [task.tail(learned[0].fields, words, tokenizer, chat) for words in task.labels.values()] if task.answer == "label" else []
    batch = options.batch or 16
    steps = options.steps if options.steps is not None else options.epochs * -(-len(train) // batch)
    options = options.filled(batch=batch, steps=steps, warmup=steps // 20, learning_rate=RATES[options.method])
    model = learner(options)
    options = options.filled(micro_batch=rows_at_once(
        model, checkpoint.config, max(1, batch // state.num_processes), train.context, train.labels, options.checkpointing, state.device,
        max(1, MICRO_TOKENS // train.context)))
    mixed = tuple(parse_mix(entry, DECODER_TASKS)[2] for entry in options.mix)
    inputs = {"checkpoint": checkpoint.sha256()} | {s: source_digest(s) for s in find_sources(options.data + options.valid + mixed)}
    trainer = Trainer(model, options, train, valid, partial(_save, checkpoint, options, task, inputs), inputs)
    if state.is_main_process:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{len(train)} training and {len(valid)} validation examples of up to {train.context} tokens; "
              f"{trained / 1e6:.2f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters are trained")
        merged = 0 if options.method == "full" or options.keep_adapter else sum(map(checkpoint.nbytes, checkpoint.names()))
        print(memory_line(training_bytes(model, checkpoint.config, options.micro_batch, train.context, train.labels,
                                         options.checkpointing, ragged=True, merged=merged), state.device))
    judged = valid.encoded[:options.eval_rows or None] if answers else []
    before = accuracy(trainer, judged, answers, pad) if judged and trainer.step == 0 else None
    metrics = trainer.fit()
    after = accuracy(trainer, judged, answers, pad) if judged else None
    if state.is_main_process:
        was = f"{trainer.first_loss:.4f} before, " if trainer.first_loss is not None else ""
        print(f"{options.out / 'last'}: loss on answers {was}{metrics['valid_loss']:.4f} after {trainer.step} steps")
        if after is not None:
            was = f"{before:.1%} before, " if before is not None else ""
            print(f"accuracy on {len(judged)} examples: {was}{after:.1%} after")
        print(f"{(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak_rss_mb():.0f} MB")


def learner(options: FinetuneOptions) -> torch.nn.Module:
    """The checkpoint's network, as it is before the first step."""
    torch.manual_seed(options.seed)
    model = load_decoder(options.checkpoint)
    if options.method == "full":
        return model
    frozen = torch.bfloat16 if mixed_precision(options.precision, process_state(options.device).device) == "bf16" else torch.float32
    return add_lora(model, options.rank, options.alpha, options.checkpoint, frozen)


def chosen_kind(options: FinetuneOptions, task: Task, learned: list[Example], valid: Examples, rows) -> str | None:
    """The kind of changed copies that gives the lowest loss on the held-out examples in a short run, None where none does better than
    no copies. Told, and kept in the run's folder for --resume."""
    kept = options.out / "augment.json"
    if options.resume and kept.is_file():
        return read_json(kept)["kind"]
    if process_state(options.device).num_processes > 1:
        raise UserError("--augment auto: tries the kinds in one process; name one of them")
    batch, losses = options.batch or 16, {}
    steps = max(4, (options.steps or options.epochs * -(-len(learned) // batch)) // 4)
    for kind in (None, *KINDS):
        with tempfile.TemporaryDirectory() as folder:
            train = Examples(rows(learned + (augmented(kind, learned, options.seed) if kind else [])), valid.pad)
            short = replace(options, out=Path(folder) / "run", steps=steps, eval_every=steps, patience=None, resume=False).filled(
                batch=batch, warmup=steps // 20, micro_batch=max(1, MICRO_TOKENS // train.context), learning_rate=RATES[options.method])
            losses[kind] = Trainer(learner(options), short, train, valid, lambda *_: None, {}).fit()["valid_loss"]
    best = min(losses, key=losses.get)
    told = ", ".join(f"{kind or 'none'} {loss:.4f}" for kind, loss in losses.items())
    print(f"changed copies, held-out loss after {steps} steps: {told}: {best or 'none of them helps, so none'} is taken")
    options.out.mkdir(parents=True, exist_ok=True)
    write(kept, json.dumps({"kind": best, "valid_loss": {kind or "none": loss for kind, loss in losses.items()}}) + "\n")
    return best


def _examples(options: FinetuneOptions) -> tuple[Task, list[Example], list[Example]]:
    """The task, and its examples to learn from and to judge on. Raises UserError for those that cannot be used."""
    examples = examples_of(options, options.data, options.limit)
    task = open_task(options.task, options, examples, options.checkpoint)
    if task.answer == "label" and not options.labels and len(seen := {example.answers[0] for example in examples}) < 2:
        raise UserError(f"{options.data[0]}: every example has the label {', '.join(seen)}, so there is nothing to tell apart: give others, "
                        "or name every label with --labels")
    if options.valid:
        train, valid = examples, examples_of(options, options.valid)
        for example in valid if task.answer != "text" else ():
            check_label(task, example)
    else:
        train, valid = set_aside(examples, options)
    if options.class_weights:
        train = weighted(train, class_weights(options.class_weights, task, train), options.seed)
    if options.augment and task.answer == "text":
        raise UserError(f"--augment {options.augment}: keeps labels and scores; of task {task.name}, whose answers are texts, nothing is known "
                        "to be kept")
    if options.shots:
        solved, train = split_shots(train, options.shots, None, options.seed)
        task = with_shots(task, solved)
    return task, train, valid


def _mixed(options: FinetuneOptions) -> list[tuple[Task, list[Example], float]]:
    """The other tasks to learn, their examples, and how many of them to one of --data's."""
    found = []
    for entry in options.mix:
        name, weight, file = parse_mix(entry, DECODER_TASKS)
        examples, asked = read_examples(name, [file]), TaskOptions(chat=options.chat if name != "chat" else None)
        found.append((open_task(name, asked, examples, options.checkpoint), examples, weight))
    return found


def _save(checkpoint, options: FinetuneOptions, task: Task, inputs: dict, model, folder: Path, metrics: dict) -> None:
    stage = lineage.stage("finetune", options, inputs, metrics, options.seed)
    if options.keep_adapter:
        save_adapter(model, folder, checkpoint.hf_config)
        lineage.write(folder, [*lineage.read(checkpoint.path), stage])
        task.save(folder / FILE)
    else:
        tensors = merged_tensors(model, checkpoint) if options.method == "lora" else model.state_dict().items()
        fill_checkpoint(folder, checkpoint.hf_config, tensors, checkpoint.path, stage, lambda folder: task.save(folder / FILE))
