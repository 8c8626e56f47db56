"""Train a language model, from scratch or continued: `python -m models.train`.

From scratch, `--preset 5m` derives the model's shape, learning rate, batch and number of steps (20 tokens a
parameter; Hoffmann et al. 2022); any of them can be given instead. `--checkpoint` continues a checkpoint on new text.

The run's folder holds best/ and last/ (Hugging Face folders), metrics.jsonl and TensorBoard logs/. After a crash or
kill -9, the same command with --resume continues from last/ with the losses an uninterrupted run would have had.
Many processes: `accelerate launch --num_processes 2 -m models.train ...`.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.formats import lineage
from models.formats.chat import tokenizer_facts, tokenizer_file
from models.data.corpus import Blocks, Corpus, DataOptions, Split, build_corpus
from models.data.records import source_digest
from models.training.presets import gated_config, preset
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError

EXAMPLES = """examples:
  python -m models.tokenizer train --data ../shared/data/text/sotu-train.txt -o build/sotu-tokenizer --vocab-size 4096
  python -m models.train --preset 5m --tokenizer build/sotu-tokenizer --data ../shared/data/text/sotu-train.txt \\
      --valid ../shared/data/text/sotu-valid.txt --steps 600 -o build/sotu-5m
  python -m models.train --checkpoint build/smollm2-135m --data corpus/ --learning-rate 1e-4 --steps 200 -o build/more
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions, TrainerOptions):
    """Train a language model on text, from scratch or continued."""
    valid: tuple[str, ...] = arg((), help="files to evaluate on (by default a share of --data)")
    valid_share: float = arg(0.02, help="share of documents set aside where --valid is not given", above=0, below=1)
    preset: str | None = arg(None, help="size of a new model in parameters, such as 5m, 15m, 60m, 135m")
    architecture: str = arg("decoder", help="of a new model: a transformer, or a recurrent net", choices=("decoder", "gru", "lstm"))
    embeddings: str = arg("random", help="first token table of a new model; word2vec learns it from the text (needs gensim)",
                          choices=("random", "word2vec"))
    tokenizer: Path | None = arg(None, help="tokenizer folder of a new model (see models.tokenizer)")
    checkpoint: Path | None = arg(None, help="checkpoint to continue, in place of --preset and --tokenizer")
    context: int = arg(256, help="tokens of a block, and the context of a new model", least=1)
    boundaries: str = arg("eos", help="documents follow each other after EOS, or each starts a block of its own",
                          choices=("eos", "block"))

    def __post_init__(self):
        super().__post_init__()
        if (self.checkpoint is None) == (self.preset is None) or (self.checkpoint or self.tokenizer) is None:
            raise UserError("give either --preset and --tokenizer for a new model, or --checkpoint to continue one")
        if self.checkpoint and self.architecture != "decoder":
            raise UserError(f"--architecture {self.architecture}: is of a new model; --checkpoint brings its own")
        if self.checkpoint and self.embeddings != "random":
            raise UserError(f"--embeddings {self.embeddings}: is of a new model; --checkpoint brings its own")


def main(argv=None) -> int:
    return run(TrainOptions, "train", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from models.checkpoint import check_output, load_decoder, open_checkpoint, fill_checkpoint
from models.network.decoder import Decoder
from models.training.memory import memory_line, rows_at_once, training_bytes
from models.training.placement import process_state
from models.training.trainer import Trainer

TOKENS_PER_PARAMETER = 20
LOGIT_FLOATS = 1 << 25           # a micro-batch's logits, by default on a CPU


def train(options: TrainOptions) -> None:
    """Read the data, build or open the model, train it. Raises UserError, or CheckFailed at a loss not finite."""
    folder = options.checkpoint or options.tokenizer
    if options.embeddings == "word2vec":
        from models.training.word2vec import begin_with             # the only part that gensim is for
    tokenizer = tokenizer_file(folder)
    check_output(options.out / "last", options.checkpoint)
    torch.manual_seed(options.seed)
    state = process_state(options.device)
    model, options, eos = _model_and_options(options, folder, state)
    with state.main_process_first():
        train_corpus, valid_corpus = _corpora(options, tokenizer, eos)
    if options.embeddings == "word2vec" and not (options.resume and (options.out / "last").exists()):
        begin_with(model.model.embed_tokens.weight, train_corpus, options.seed)
    train_rows, valid_rows = (Blocks(c, options.context, options.boundaries) for c in (train_corpus, valid_corpus))
    inputs = {"data": train_corpus.digest, "valid": valid_corpus.digest, "tokenizer": source_digest(str(tokenizer))}
    if options.checkpoint:
        inputs["checkpoint"] = open_checkpoint(options.checkpoint).sha256()
    trainer = Trainer(model, options, train_rows, valid_rows, partial(_save, folder, options, inputs), inputs)
    if state.is_main_process:
        print(f"{_parameters(model) / 1e6:.2f}M parameters; {len(train_corpus.tokens):,} training and "
              f"{len(valid_corpus.tokens):,} validation tokens; {options.steps} steps of {options.batch} x {options.context} tokens")
        print(memory_line(training_bytes(model, model.config, options.micro_batch, options.context, options.context,
                                         options.checkpointing), state.device))
    metrics = trainer.fit()
    if state.is_main_process:
        bits = metrics["valid_loss"] / math.log(2) * len(valid_corpus.tokens) / valid_corpus.text_bytes
        print(f"{options.out / 'last'}: step {trainer.step}, validation loss {metrics['valid_loss']:.4f} nats a token "
              f"({bits:.3f} bits a byte); lowest {trainer.best:.4f} in {options.out / 'best'}")


def _model_and_options(options: TrainOptions, folder: Path, state):
    """(module, options with every default filled in, EOS id)."""
    if options.checkpoint is not None:
        checkpoint = open_checkpoint(options.checkpoint)
        if not checkpoint.config.eos_token_ids:
            raise UserError(f"{options.checkpoint}/config.json has no eos_token_id to end documents with; add one")
        eos, vocab = checkpoint.config.eos_token_ids[0], checkpoint.config.vocab_size
        if checkpoint.quantization:
            raise UserError(f"{options.checkpoint} is quantized; continue from the checkpoint it was made of")
        if options.context > checkpoint.config.context_length:
            raise UserError(f"--context {options.context}: the model's context is {checkpoint.config.context_length}")
        model, rate, tokens = load_decoder(options.checkpoint), 1e-4, 8192
    else:
        eos, vocab = tokenizer_facts(folder)
        shape = preset(options.preset, vocab, options.context, eos)
        rate, tokens = shape.learning_rate, shape.batch_tokens
        model = Decoder(shape.config if options.architecture == "decoder" else gated_config(options.architecture, options.preset, shape.config))
    batch = max(1, tokens // options.context) if options.batch is None else options.batch
    steps = options.steps
    if steps is None:
        steps = -(-TOKENS_PER_PARAMETER * _parameters(model) // (batch * options.context))
    share, micro = max(1, batch // state.num_processes), max(1, LOGIT_FLOATS // (vocab * options.context))
    micro = rows_at_once(model, model.config, share, options.context, options.context, options.checkpointing, state.device, micro)
    return model, options.filled(batch=batch, steps=steps, micro_batch=min(batch, micro), learning_rate=rate, warmup=steps // 20), eos


def _parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def _corpora(options: TrainOptions, tokenizer: Path, eos: int) -> tuple[Corpus, Corpus]:
    if options.valid:
        return tuple(build_corpus(options, names, tokenizer, eos) for names in (options.data, options.valid))
    return tuple(build_corpus(options, options.data, tokenizer, eos, Split(part, options.valid_share, options.seed))
                 for part in ("train", "valid"))


def _save(source: Path, options: TrainOptions, inputs: dict, model, folder: Path, metrics: dict) -> None:
    stage = lineage.stage("train", options, inputs, metrics, options.seed)
    hf_config = open_checkpoint(source).hf_config if options.checkpoint else model.config.to_hf()
    fill_checkpoint(folder, hf_config, model.state_dict().items(), source, stage)
