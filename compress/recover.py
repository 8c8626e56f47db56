"""Quantization-aware distillation: train a quantized model until it says what the model it was made from says.

    python -m compress.recover QUANTIZED --teacher ORIGINAL --data FILES -o OUT                      # scales and norm gains
    python -m compress.recover QUANTIZED --teacher ORIGINAL --data FILES -o OUT --train weights      # codes and zero points too

Scales (as factors of the ones they were) and norm gains are trained against the teacher's cached top-k predictions
(compress/teacher.py); codes stay. With --train weights every weight of the linears has a latent value whose rounding is what the
forward pass uses (recovering/coded.py), and there are two phases: first every layer by itself against the original layer
(recovering/blocks.py, --block-steps), whose memory is that of one layer and which costs no teacher's predictions, then all of them
against the teacher. What is written has rounded scales and frozen codes: a quantized checkpoint of the same formats and size.

Small steps matter: a learning rate of 1e-4 moves a scale by at most one part in a hundred over a hundred steps, and a weight whose
latent moves by less than half a step of its codes over the run may not move at all. The coarser the codes, the more there is to win.
Nor may latents move far: Adam moves each by about its rate whatever its gradient, so the noise of batches carries all of them some
rate * sqrt(0.4 steps) away, and many begin a tenth of a step from where their code ends. Where noise reaches that tenth, codes that
were chosen with care are drawn by lot (SmolLM2 in 60 MB, 8e-3: KL 0.124, after 15 steps less, after 25 steps 0.170). So the rate falls
with the root of the steps by default, to a quarter of a tenth: many steps at a low rate find what few at a high one cannot tell from noise.
The embedding and the head keep their codes and scales.

OUT is a run's folder as in models.train: last/ and best/ are checkpoints, --resume goes on where it stopped and ends with the same
bytes. Layers that were finished by themselves wait in a hidden folder beside OUT until the run is over: the same command goes on
after the last of them. Windows set aside (--eval-rows) show KL(teacher || student), "valid_loss"; of a layer, its error.

Sources: Liu et al. 2023, "LLM-QAT" (distillation of a quantized model); Chen et al. 2024, "EfficientQAT" (blocks first, then all).
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from compress.options import TEACHER_CACHE
from models.data.corpus import DataOptions
from models.device import has_bf16
from models.formats import lineage
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import clear_work, lock, restored, work_folder

MOST, WALK = 6e-3, 0.036          # steps of codes: the rate of weights, and what it is by the root of the updates, see above
EXAMPLES = """examples:
  python -m compress.recover build/mixed --teacher build/smollm2-135m --data corpus.txt -o build/mixed-recovered
  python -m compress.recover build/mixed --teacher build/smollm2-135m --data corpus.txt --train weights --steps 400 -o build/mixed-trained
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, TrainerOptions):
    """Train a quantized checkpoint against the model it was made from."""

    checkpoint: Path = arg(positional=True, help="quantized checkpoint folder")
    teacher: Path = arg(help="the checkpoint it was made from")
    train: str = arg("scales", help="what is trained beside norm gains: scales, or weights (codes, scales and zero points): layer by layer, "
                                    "then all", choices=("scales", "weights"))
    windows: int = arg(320, help="windows of the text to learn from, spread evenly", least=1)
    length: int = arg(512, help="tokens in a window", least=1)
    top: int = arg(64, help="teacher's log-probabilities kept for each token", least=1)
    teacher_cache: Path = arg(TEACHER_CACHE, help="where the teacher's predictions are kept")
    steps: int = arg(80, help="updates of the whole network", least=1, group="training")
    batch: int = arg(4, help="windows that one update learns from", least=1, group="training")
    learning_rate: float = arg(1e-4, help="peak learning rate of scales (as factors) and norm gains", above=0, below=1,
                               group="training")
    weight_rate: float | None = arg(None, help=f"the same of weights, in steps of their codes (by default {MOST}, of more than 36 --steps "
                                               f"{WALK} by their root)",
                                    above=0, below=1, group="training")
    block_steps: int = arg(40, help="updates of each layer by itself, before; 0: none", least=0, group="training")
    block_rate: float = arg(1e-2, help="peak learning rate of weights in them, in steps of their codes", above=0, below=1, group="training")
    weight_decay: float = arg(0.0, help="decay of the factors towards the scales they were", least=0, group="training")
    precision: str = arg("auto", help="auto: bf16 where the GPU or the CPU computes in it, else fp32",
                         choices=("auto", "fp32", "bf16", "fp16"), group="training")
    eval_every: int = arg(20, help="steps between evaluations; each also saves last/", least=1, group="training")
    eval_rows: int = arg(8, help="windows to judge on", least=1, group="training")


def main(argv=None) -> int:
    return run(Options, "recover", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
from torch import Tensor, nn

from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import kl
from compress.distilling.taught import Windows, check_tokenizers, fit, set_apart, spread, taught, trainer_of, with_defaults
from compress.recovering.blocks import train_layers
from compress.recovering.coded import CodedLinear, coded, rates
from compress.text import corpus_windows
from models.checkpoint import Checkpoint, check_output, fill_checkpoint, load_decoder, open_checkpoint
from models.formats.teacher_cache import shared_vocabulary
from models.network.decoder import Decoder, tensor_shapes
from models.training.placement import process_state


def recover(options: Options) -> None:
    """Run the stage. Raises UserError for input that cannot be used, CheckFailed at a loss not finite."""
    checkpoint, teacher = open_checkpoint(options.checkpoint), open_checkpoint(options.teacher)
    if checkpoint.quantization is None:
        raise UserError(f"{options.checkpoint} is not quantized: give the result of compress.quantize")
    check_tokenizers(teacher, checkpoint)
    check_output(options.out / "last", options.checkpoint)
    state, moved = process_state(options.device), options.train == "weights"
    if moved:
        _check_layers(checkpoint, teacher)
    if options.precision == "auto" and has_bf16(state.device):
        options = replace(options, precision="bf16")
    length = min(options.length, checkpoint.config.context_length)
    wanted = min(options.windows, options.batch * options.steps)         # no more than the steps will look at
    windows = Windows(corpus_windows(teacher, options, wanted + options.eval_rows, length))
    left, held = set_apart(len(windows), options.eval_rows)
    if not len(left):
        raise UserError(f"{options.data[0]}: too few tokens to learn from and to judge on in windows of {length}: give more, or a "
                        f"shorter --length")
    shared = shared_vocabulary(options.teacher, teacher.config.vocab_size, checkpoint.config.vocab_size)
    train, valid = (taught(windows, chosen, options, shared) for chosen in (left, held))
    inputs = {"checkpoint": checkpoint.sha256(), "teacher": teacher.sha256(), "predictions": train.cache.folder.name}
    learned: dict[str, Tensor] = {}
    if moved and options.block_steps and not restored(options.out / "last").exists():
        work = work_folder(options.out, [inputs, windows.ids.tolist(), options.batch, options.seed, options.precision])
        options = replace(options, resume=options.resume and not work.exists())
        with lock(options.out) if state.is_main_process else nullcontext():
            learned = train_layers(checkpoint, teacher, windows, spread(left, options.block_steps * options.batch), held, options, state, work)
    student = load_decoder(checkpoint.path)
    coded(student, checkpoint, "", teacher if moved else None)
    student.load_state_dict(learned, strict=False)
    quantized = sum(module.tensor.codes.numel() for module in student.modules() if isinstance(module, CodedLinear))
    options = with_defaults(options, length, student, state, beside=5 * quantized)       # a code, and the weight made of it
    fit(trainer_of(Distiller(student, None, Losses(kl), shared), options, train, valid, partial(_save, checkpoint, options, inputs),
                   inputs, rates=rates(options.learning_rate, options.weight_rate or default_rate(options.steps))))
    if state.is_main_process:
        clear_work(options.out)


def default_rate(steps: int) -> float:
    """Peak learning rate of weights, in steps of their codes, of a run of so many updates."""
    return min(MOST, WALK / math.sqrt(steps))


def _check_layers(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Raises UserError where the two have not the same linears."""
    ours, theirs = tensor_shapes(checkpoint.config), tensor_shapes(teacher.config)
    for name in checkpoint.quantization.tensors:
        if name.startswith("model.layers.") and theirs.get(f"{name}.weight") != ours[f"{name}.weight"]:
            raise UserError(f"--train weights starts from the original weights, and {teacher.path} has other ones in {name}: give the "
                            f"checkpoint that {checkpoint.path} was made from, or --train scales")


def _save(checkpoint: Checkpoint, options: Options, inputs: dict, distiller: Distiller, folder: Path, metrics: dict) -> None:
    stage = lineage.stage("compress.recover", options, inputs, metrics, options.seed)
    fill_checkpoint(folder, checkpoint.hf_config, _tensors(checkpoint, distiller.student), checkpoint.path, stage)


def _tensors(checkpoint: Checkpoint, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.names():
        place, suffix = name.rsplit(".", 1)
        module = decoder.get_submodule(place)
        if not isinstance(module, CodedLinear) or suffix not in module.tensor.format.stored_shapes(*module.tensor.codes.shape):
            trained = isinstance(module, (nn.RMSNorm, nn.LayerNorm))
            yield name, getattr(module, suffix).detach() if trained else checkpoint.read(name)
        elif suffix == "codes":
            yield from module.frozen().tensors(place).items()
