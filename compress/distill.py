"""Distill: train a student to predict what its teacher predicts.

    python -m compress.distill --teacher A --student B -o OUT --data FILES

The student is any full-precision checkpoint with the teacher's tokenizer (a pruned teacher, usually), every k-th layer of
one (--layers), or a new model (--preset). The loss is in compress/distilling/.

With --task the text is a task's examples, a row each, asked as models.finetune asks, and learned are the answers: the data's, or with
--on-policy those that the student writes to the same prompts.

The teacher's top-k predictions are cached on disk first (compress/teacher.py), so that several runs, and several passes
over the text, ask it once. A live teacher (--live) gives whole distributions, and is needed where the cache cannot say: a
temperature, hidden states, attention, the student's own text. With --label-share 1 the teacher only judges.

A run learns from steps x batch blocks, spread evenly over the text, again and again where the text has fewer. Held-out
blocks (--valid, or --eval-rows blocks of the text set aside) show KL(teacher || student), "valid_loss", counted on the
cached events, and top-1 agreement. OUT is a run's folder as in models.train: last/ and best/ are checkpoints, --resume
goes on after kill -9. Encoders (BERT and its kin) learn by compress/encoders/distill.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from compress.options import TEACHER_CACHE
from models.formats import lineage
from models.data.corpus import Blocks, DataOptions, task_rows
from models.data.records import find_sources
from models.training.presets import preset
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.text import Tokenizer

EXAMPLES = """recipes:
  a model that lost layers learns them back:
    python -m compress.prune build/smollm2-135m -o build/pruned --what depth --keep 0.7 --order influence \\
        --data ../shared/data/text/sotu-train.txt
    python -m compress.distill --teacher build/smollm2-135m --student build/pruned \\
        --data ../shared/data/text/sotu-train.txt -o build/distilled
  a draft of six layers, for speculative decoding, which now and then reads what it writes itself:
    python -m compress.distill --teacher build/smollm2-135m --layers 6 --loss skew --on-policy 0.25 \\
        --data ../shared/data/text/sotu-train.txt -o build/draft
  a new, smaller model from nothing, helped by hidden states and attention:
    python -m compress.distill --teacher build/smollm2-135m --preset 15m --label-share 0.3 --hidden-weight 1 \\
        --attention-weight 1 --data ../shared/data/text/sotu-train.txt -o build/small
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, TrainerOptions):
    """Train a student to predict what its teacher predicts."""
    teacher: Path = arg(help="checkpoint folder of the teacher")
    student: Path | None = arg(None, help="checkpoint folder of the student (with --layers, by default the teacher)")
    layers: int | None = arg(None, help="take so many of its layers, spread evenly, the first and the last among them", least=1)
    preset: str | None = arg(None, help="a new student of about this many parameters, such as 5m, in place of --student")
    valid: tuple[str, ...] = arg((), help="text to judge on (default: blocks of --data are set aside)")
    loss: str = arg("forward", help="divergence from the teacher's distribution (divergence.py)", choices=("forward", "reverse", "js", "skew"),
                    group="what is learned")
    mix: float | None = arg(None, help="js: weight of the teacher in the mean (0.5); skew: of the teacher in the student (0.1)",
                            above=0, below=1, group="what is learned")
    temperature: float = arg(1.0, help="divides the logits of both (other than 1: with a live teacher)",
                             above=0, group="what is learned")
    label_share: float = arg(0.0, help="share of the label loss; 1: the labels alone, without the teacher",
                             least=0, most=1, group="what is learned")
    hidden_weight: float = arg(0.0, help="weight of matching hidden states (with a live teacher)", least=0, group="what is learned")
    attention_weight: float = arg(0.0, help="weight of matching attention (with a live teacher)", least=0, group="what is learned")
    on_policy: float = arg(0.0, help="probability that the student writes the text (with a live teacher)",
                           least=0, most=1, group="what is learned")
    prompt: int = arg(32, help="on policy: tokens of a block that are kept", least=1, group="what is learned")
    live: bool = arg(False, help="run the teacher beside the student, in place of its cache", group="the teacher")
    top: int = arg(64, help="teacher's log-probabilities cached for each token", least=1, group="the teacher")
    teacher_cache: Path = arg(TEACHER_CACHE, help="where the teacher's predictions are kept", group="the teacher")
    context: int = arg(256, help="tokens of a block", least=1, group="training")
    steps: int = arg(500, help="updates of the weights", least=1, group="training")
    batch: int = arg(8, help="blocks that one update learns from", least=1, group="training")
    learning_rate: float | None = arg(None, help="peak learning rate (default: 5e-4, a preset's own)", above=0, group="training")
    eval_rows: int = arg(32, help="blocks to judge on", least=1, group="training")

    def __post_init__(self):
        super().__post_init__()
        if self.preset is not None and (self.student is not None or self.layers is not None):
            raise UserError("--preset makes a new student: leave out --student and --layers")
        if self.preset is None and self.student is None and self.layers is None:
            raise UserError("give a student: --student FOLDER, --layers N or --preset SIZE")
        if self.on_policy and self.label_share:
            raise UserError("--on-policy learns from what the student writes, which has no labels: leave out --label-share")
        if self.on_policy and not self.task and not 1 <= self.prompt < self.context:
            raise UserError(f"--prompt is {self.prompt}, which should be from 1 to one less than --context {self.context}")


def main(argv=None) -> int:
    return run(Options, "distill", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from compress.encoders.distill import distill_encoder
from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import divergence
from compress.distilling.taught import (OnPolicy, Padded, Taught, check_tokenizers, fit, set_apart, spread, taught, trainer_of,
                                         with_defaults)
from compress.pruning.depth import kept_config, kept_tensors
from compress.teacher import frozen_decoder
from compress.text import read_corpus
from models.checkpoint import Checkpoint, check_output, fill_checkpoint, load_decoder, open_checkpoint
from models.formats.chat import special_ids
from models.encoders.network import is_encoder
from models.formats.teacher_cache import shared_vocabulary
from models.network.decoder import Decoder, tensor_shapes
from models.training.memory import training_bytes
from models.training.placement import mixed_precision, process_state


def distill(options: Options) -> None:
    """Read, train, report. Raises UserError for input that cannot be used, CheckFailed at a loss not finite."""
    if is_encoder(options.teacher):
        return distill_encoder(options)
    teacher = open_checkpoint(options.teacher)
    if not 1 <= options.context <= teacher.config.context_length:
        raise UserError(f"--context {options.context}: the teacher's context is {teacher.config.context_length}")
    state = process_state(options.device)
    check_output(options.out / "last", options.student)
    torch.manual_seed(options.seed)
    student, source, options = _student(options, teacher)
    losses = Losses(divergence(options.loss, options.mix), options.temperature, options.label_share, options.hidden_weight,
                    options.attention_weight)
    matched = options.hidden_weight > 0 or options.attention_weight > 0
    learned = options.label_share < 1 or matched
    live = learned and (options.live or options.temperature != 1 or options.on_policy > 0 or matched)
    shared = shared_vocabulary(options.teacher, teacher.config.vocab_size, student.config.vocab_size)
    train, valid, inputs = _rows(options, teacher, shared, cached=learned and not live)
    inputs |= {"teacher": teacher.sha256(), "student": source.sha256()}
    low = mixed_precision(options.precision, state.device) == "bf16"
    stored = (2 if low else 4) * sum(map(prod, tensor_shapes(teacher.config).values())) if live else 0
    options = with_defaults(options, options.context, student, state, stored)
    needed = training_bytes(student, student.config, options.micro_batch, options.context, 0, options.checkpointing)
    asked = frozen_decoder(options.teacher, low, state.device, spare=sum(needed.values())) if live else None
    distiller = Distiller(student, asked, losses, shared)
    if options.on_policy:
        train = OnPolicy(train, student, options.on_policy, None if options.task else options.prompt, options.seed, lambda: trainer, shared)
    trainer = trainer_of(distiller, options, train, valid, partial(_save, source, options, inputs), inputs)
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"student: {parameters:.1f}M parameters in {len(student.config.layers)} layers; {len(train)} blocks to learn from, "
          f"{len(valid)} to judge on; {options.steps} steps of {options.batch} x {options.context} tokens")
    fit(trainer)


def _student(options: Options, teacher: Checkpoint) -> tuple[Decoder, Checkpoint, Options]:
    """(student in float32, the checkpoint whose tokenizer and lineage it takes, options with their learning rate)."""
    rate = options.learning_rate
    if options.preset is not None:
        config = teacher.config
        shape = preset(options.preset, config.vocab_size, config.context_length, eos=0)
        new = replace(shape.config, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids,
                      pad_token_id=config.pad_token_id)
        return Decoder(new), teacher, replace(options, learning_rate=shape.learning_rate if rate is None else rate)
    source = teacher if options.student is None else open_checkpoint(options.student)
    if source.quantization is not None:
        raise UserError(f"{source.path} is quantized: distill the checkpoint it was made from, or train its scales with "
                        f"python -m compress.recover")
    check_tokenizers(teacher, source)
    if options.context > source.config.context_length:
        raise UserError(f"--context {options.context}: the student's context is {source.config.context_length}")
    decoder = load_decoder(source.path)
    decoder = decoder if options.layers is None else every_kth_layer(decoder, options.layers)
    return decoder, source, replace(options, learning_rate=5e-4 if rate is None else rate)


def every_kth_layer(decoder: Decoder, count: int) -> Decoder:
    """The decoder with `count` of its layers, spread evenly. Raises UserError for a count it cannot have."""
    layers = decoder.config.layers
    if not 1 <= count <= len(layers):
        raise UserError(f"--layers is {count}, which should be from 1 to {len(layers)}")
    kept = np.linspace(0, len(layers) - 1, count).round().astype(int).tolist()
    with torch.device("meta"):
        student = Decoder(kept_config(decoder.config, kept))
    state = dict(kept_tensors(decoder.config, kept, decoder.state_dict().items()))
    student.load_state_dict(state, assign=True)
    return student


def _rows(options: Options, teacher: Checkpoint, shared: int | None, cached: bool) -> tuple[Taught, Taught, dict[str, str]]:
    """Blocks to learn from and to judge on, the second always with the teacher's cache, and the digests of their text."""
    blocks, digest = _blocks(options, teacher, options.data)
    inputs = {"data": digest}
    if options.valid:
        valid_blocks, inputs["valid"] = _blocks(options, teacher, options.valid)
        left = np.arange(len(blocks))
        held = spread(np.arange(len(valid_blocks)), options.eval_rows)
    else:
        valid_blocks, (left, held) = blocks, set_apart(len(blocks), options.eval_rows)
    if not len(left):
        raise UserError(f"{options.data[0]}: {len(blocks)} rows are too few to learn from and to judge on, in blocks of {options.context} tokens: give more, --valid FILES, or a shorter --context")
    chosen = spread(left, options.steps * options.batch)
    train = taught(blocks, chosen, options, shared) if cached else Taught(blocks, chosen)
    return train, taught(valid_blocks, held, options, shared), inputs


def _blocks(options: Options, teacher: Checkpoint, names: tuple[str, ...]) -> tuple[Blocks | Padded, str]:
    """Text in blocks, or of a task an example a row, whose answer alone has labels; and the digest of either."""
    corpus = read_corpus(teacher, options, names)
    if not options.task:
        return Blocks(corpus, options.context), corpus.digest
    encoded = task_rows(options, find_sources(names), Tokenizer(teacher.path / "tokenizer.json"), teacher.path,
                        end=next(iter(special_ids(teacher.config, teacher.path)["eos_token_ids"]), None))
    rows = Padded(encoded, options.context, teacher.config.pad_token_id or 0)
    if not len(rows):
        raise UserError(f"{names[0]}: no example of task {options.task} has an answer within --context {options.context} tokens; raise it")
    return rows, corpus.digest


def _save(source: Checkpoint, options: Options, inputs: dict, distiller: Distiller, folder: Path, metrics: dict) -> None:
    student = distiller.student
    stage = lineage.stage("compress.distill", options, inputs, metrics, options.seed)
    hf_config = source.hf_config if student.config == source.config else student.config.to_hf()
    fill_checkpoint(folder, hf_config, student.state_dict().items(), source.path, stage)
