"""Fine-tune a checkpoint on labelled examples: `python -m models.finetune CKPT --task chat --data FILES -o OUT`.

`chat`: chats and instructions (chat, ShareGPT, Alpaca, prompt and completion, SQuAD) through the model's own template,
the loss on the assistant's replies alone. `classify`: a text and a label; the model reads `--prompt` with the text
and learns to continue with the label's words; its answer is the label it finds likeliest. LoRA (merged when saved, or kept
as a `peft` adapter) or every weight. The run's folder, resuming and several processes are those of models.train.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from models.formats import lineage
from models.data.corpus import IGNORE, Split
from models.data.records import as_labelled, as_messages, find_sources, read_records, source_digest, template_arguments
from models.data.examples import Examples, encode_chat, encode_labelled, fitting, join
from models.progress import progress
from models.data.tables import HEADERS
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.machine import peak_rss_mb
from runtime.text import Tokenizer

EXAMPLES = """examples:
  python -m models.finetune build/smollm2-135m --task classify --data ../shared/data/classify/sst2-train.tsv \\
      --limit 800 --valid ../shared/data/classify/sst2-dev.tsv --labels 0=negative 1=positive \\
      --prompt "Review: {text}\\nSentiment:" -o build/smollm2-sst2
  python -m models.finetune build/smollm2-135m --task chat --data ../shared/data/chat/alpaca-en.json \\
      -o build/smollm2-chat
"""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainerOptions):
    """Fine-tune a checkpoint on chats or labelled texts, with LoRA or in full."""
    checkpoint: Path = arg(positional=True, help="checkpoint to fine-tune")
    task: str = arg(help="what the examples are", choices=("chat", "classify"))
    data: tuple[str, ...] = arg(help="files, folders, globs or hf:NAME@SPLIT to learn from")
    valid: tuple[str, ...] = arg((), help="files to evaluate on (by default a share of --data)")
    valid_share: float = arg(0.1, help="share of examples set aside where --valid is not given", above=0, below=1)
    format: str | None = arg(None, help="format of every file, in place of its ending",
                             choices=("jsonl", "json", "tsv", "csv"))
    header: str = arg("auto", help="whether the first row of CSV and TSV files names the columns", choices=HEADERS)
    field: str | None = arg(None, help="classify: field or column of the text")
    label_field: str | None = arg(None, help="classify: field or column of the label")
    limit: int | None = arg(None, help="learn from this many examples, the first ones", least=1)
    epochs: int = arg(3, help="passes over the data, where --steps is not given", least=1)
    context: int | None = arg(None, help="leave out examples of more tokens (by default 512, or the model's context)", least=1)
    prompt: str = arg("Text: {text}\\nLabel:", help="classify: what precedes the label; \\n is a new line")
    labels: tuple[str, ...] = arg((), help="classify: the labels in words, as 0=negative 1=positive")
    method: str = arg("lora", help="what is trained", choices=("lora", "full"), group="LoRA")
    rank: int = arg(16, help="LoRA's rank", least=1, group="LoRA")
    alpha: float = arg(32.0, help="LoRA's scale, times 1 / rank", above=0, group="LoRA")
    keep_adapter: bool = arg(False, help="save the adapter alone, not merged into the weights", group="LoRA")
    weight_decay: float = arg(0.0, help="AdamW's decay of matrices", least=0, group="training")

    def __post_init__(self):
        super().__post_init__()
        if self.keep_adapter and self.method == "full":
            raise UserError("--keep-adapter is for --method lora: full fine-tuning has no adapter")


def main(argv=None) -> int:
    return run(FinetuneOptions, "finetune", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
import torch.nn.functional as F

from models.formats.chat import chat_encoder
from models.checkpoint import check_output, load_decoder, open_checkpoint, fill_checkpoint
from models.training.lora import add_lora, check_adapter, merged_tensors, save_adapter
from models.training.memory import memory_line, training_bytes
from models.training.trainer import Trainer, mixed_precision, process_state

MICRO_TOKENS = 2048              # of a micro-batch, by default
SCORED_TOGETHER = 16             # examples whose accuracy is measured at once


def finetune(options: FinetuneOptions) -> None:
    """Encode the examples, train, report before and after. Raises UserError, or CheckFailed at a loss not finite."""
    start = time.perf_counter()
    checkpoint, tokenizer_file = open_checkpoint(options.checkpoint), options.checkpoint / "tokenizer.json"
    if checkpoint.quantization:
        raise UserError(f"{options.checkpoint} is quantized; fine-tune the checkpoint it was made of")
    if options.keep_adapter:
        check_adapter(checkpoint)
    options = options.filled(context=min(512, checkpoint.config.context_length))
    if options.context > checkpoint.config.context_length:
        raise UserError(f"--context {options.context}: the model's context is {checkpoint.config.context_length}")
    if not tokenizer_file.is_file():
        raise UserError(f"{options.checkpoint}: no tokenizer.json there")
    check_output(options.out / "last", options.checkpoint)
    tokenizer, state = Tokenizer(tokenizer_file), process_state()
    task = Chat(options, tokenizer) if options.task == "chat" else Classify(options, tokenizer)
    pad = checkpoint.config.pad_token_id or 0
    train, valid = (Examples(fitting(part, options.context, name), pad)
                    for part, name in zip(_split(options, task), ("training data", "validation data")))
    batch = options.batch or 16
    steps = options.steps if options.steps is not None else options.epochs * -(-len(train) // batch)
    options = options.filled(batch=batch, steps=steps, micro_batch=min(batch, max(1, MICRO_TOKENS // train.context)),
                             warmup=steps // 20, learning_rate=5e-4 if options.method == "lora" else 2e-5)
    torch.manual_seed(options.seed)
    model = load_decoder(options.checkpoint)
    if options.method == "lora":
        frozen = torch.bfloat16 if mixed_precision(options.precision) == "bf16" else torch.float32
        model = add_lora(model, options.rank, options.alpha, options.checkpoint, frozen)
    inputs = {"checkpoint": checkpoint.sha256()} | {
        s: source_digest(s) for s in find_sources(options.data + options.valid)}
    trainer = Trainer(model, options, train, valid, partial(_save, checkpoint, options, inputs), inputs)
    if state.is_main_process:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{len(train)} training and {len(valid)} validation examples of up to {train.context} tokens; "
              f"{trained / 1e6:.2f}M of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters are trained")
        merged = 0 if options.method == "full" or options.keep_adapter else sum(map(checkpoint.nbytes, checkpoint.names()))
        print(memory_line(training_bytes(model, checkpoint.config, options.micro_batch, train.context, train.labels,
                                         options.checkpointing, ragged=True, merged=merged)))
    before = task.accuracy(trainer) if trainer.step == 0 else None
    metrics = trainer.fit()
    after = task.accuracy(trainer)
    if state.is_main_process:
        was = f"{trainer.first_loss:.4f} before, " if trainer.first_loss is not None else ""
        print(f"{options.out / 'last'}: loss on answers {was}{metrics['valid_loss']:.4f} after {trainer.step} steps")
        if after is not None:
            was = f"{before:.1%} before, " if before is not None else ""
            print(f"accuracy on {min(len(valid), options.eval_rows or len(valid))} examples: {was}{after:.1%} after")
        print(f"{(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak_rss_mb():.0f} MB")


class Chat:
    """Chats, with the loss on replies."""

    def __init__(self, options: FinetuneOptions, tokenizer: Tokenizer):
        self.chat = chat_encoder(options.checkpoint, tokenizer)
        if self.chat is None:
            raise UserError(f"{options.checkpoint} has no chat template; put one beside it as chat_template.jinja")

    def encode(self, record) -> list:
        """Its examples. A record's tools, documents and chat_template_kwargs are the template's."""
        try:
            return encode_chat(as_messages(record), self.chat, **template_arguments(record))
        except UserError as error:
            raise UserError(f"{record.place}: {str(error).removeprefix(f'{record.place}: ')}") from None

    def accuracy(self, trainer) -> None:
        """There is none."""


class Classify:
    """Labelled texts; the set of labels is what --labels says, or what the training data has."""

    def __init__(self, options: FinetuneOptions, tokenizer: Tokenizer):
        self.pair = partial(as_labelled, field=options.field, label_field=options.label_field)
        self.tokenizer, self.prompt = tokenizer, options.prompt.replace("\\n", "\n")
        if "{text}" not in self.prompt:
            raise UserError(f"--prompt {options.prompt!r}: has no {{text}} to put the text in")
        pairs = [label.partition("=") for label in options.labels]
        if bad := [name + sign for name, sign, words in pairs if not words]:
            raise UserError(f"--labels {bad[0]}: give each label as NAME=WORDS")
        self.words = {name: words for name, _, words in pairs}
        if not self.words:
            records = _records(options, options.data, options.limit)
            self.words = {label: label for label in sorted({self.pair(record)[1] for record in records})}
            if len(self.words) < 2:
                raise UserError(f"{options.data[0]}: every example has the label {', '.join(self.words)}, so there is nothing to "
                                f"tell apart: give others, or name every label with --labels")
        self.answers = [tokenizer.encode(" " + words, special_tokens=False) for words in self.words.values()]

    def encode(self, record):
        text, label = self.pair(record)
        if label not in self.words:
            raise UserError(f"{record.place}: label {label!r} was never seen; known are {', '.join(self.words)}. "
                            "Mend the file, or name every label with --labels")
        return [encode_labelled(text, self.words[label], self.prompt, self.tokenizer)]

    @torch.no_grad()
    def accuracy(self, trainer: Trainer) -> float:
        """Share of the first `eval_rows` validation examples whose label continues the prompt most likely."""
        right = 0
        examples = sorted(trainer.valid.encoded[:trainer.options.eval_rows or None], key=lambda example: len(example[0]))
        trainer.module.eval()
        for start in progress(range(0, len(examples), SCORED_TOGETHER), label="accuracy", unit="batch"):
            chunk = [(ids[~learned], ids[learned]) for ids, learned in examples[start:start + SCORED_TOGETHER]]
            asked = [join(question, answer) for question, _ in chunk for answer in self.answers]
            rows = Examples(asked, trainer.valid.pad)
            with trainer.accelerator.autocast():
                scores = _row_scores(trainer.module, *trainer.tensors(rows.rows(range(len(rows)))))
            best = scores.view(len(chunk), -1).argmax(1)
            right += sum(self.answers[i].tolist() == answer.tolist() for i, (_, answer) in zip(best, chunk))
        trainer.module.train()
        return right / len(examples)


def _row_scores(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """ln p of each row's labels. Rows of equal inputs (answers of one token) are run once."""
    input_ids, which = input_ids.unique(dim=0, return_inverse=True)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    labels = labels[:, columns]
    logits = model(input_ids, logits_positions=columns.expand(len(input_ids), -1))[which]
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none").sum(1)


def _records(options: FinetuneOptions, names: tuple[str, ...], limit: int | None = None):
    return islice(read_records(find_sources(names), options.format, header=options.header,
                               wanted=(options.field, options.label_field)), limit)


def _split(options: FinetuneOptions, task):
    """Encoded training and validation examples."""
    records = list(_records(options, options.data, options.limit))
    if options.valid:
        return [list(chain.from_iterable(map(task.encode, part)))
                for part in (records, _records(options, options.valid))]
    sides = [Split(part, options.valid_share, options.seed) for part in ("train", "valid")]
    parts = [[example for r in records if side.has(str(r.fields)) for example in task.encode(r)] for side in sides]
    if not all(parts):
        raise UserError(f"{options.data[0]}: {len(records)} examples are too few to set {options.valid_share:.0%} "
                        "aside; give --valid files")
    return parts


def _save(checkpoint, options: FinetuneOptions, inputs: dict, model, folder: Path, metrics: dict) -> None:
    stage = lineage.stage("finetune", options, inputs, metrics, options.seed)
    if options.keep_adapter:
        save_adapter(model, folder, checkpoint.hf_config)
        lineage.write(folder, [*lineage.read(checkpoint.path), stage])
    else:
        tensors = merged_tensors(model, checkpoint) if options.method == "lora" else model.state_dict().items()
        fill_checkpoint(folder, checkpoint.hf_config, tensors, checkpoint.path, stage)
