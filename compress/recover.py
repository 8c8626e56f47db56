"""Quantization-aware distillation: train what surrounds the codes until the student says what its teacher says.

    python -m compress.recover QUANTIZED --teacher ORIGINAL --data FILES -o OUT

Scales (as factors of the ones they were) and norm gains are trained against the teacher's cached top-k predictions
(compress/teacher.py); codes stay. With --codes they are trained too, straight through: every weight has a latent value
in units of its scale, starting at its code, whose rounding is what the forward pass uses and to which the gradient goes
as if it had not been rounded. That pays after a run without: recover OUT/last once more. What is written has scales
rounded to fp16 and frozen codes: a quantized checkpoint of the same formats and size.

Small steps matter: a learning rate of 1e-4 moves a scale by at most one part in a hundred over a hundred steps. The
coarser the codes, the more there is to win. The embedding and the head keep their codes and scales.

OUT is a run's folder as in models.train: last/ and best/ are checkpoints, --resume goes on where it stopped and ends
with the same bytes. Windows set aside (--eval-rows) show KL(teacher || student), "valid_loss".

Sources: Liu et al. 2023, "LLM-QAT" (distillation of a quantized model); Chen et al. 2024, "EfficientQAT" (training the
scales alone, end to end); Bengio et al. 2013 (straight-through estimator).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from compress.options import TEACHER_CACHE
from models.data.corpus import DataOptions
from models.formats import lineage
from models.training.options import TrainerOptions
from runtime.cli import arg, run
from runtime.errors import UserError

EXAMPLES = """examples:
  python -m compress.recover build/mixed --teacher build/smollm2-135m --data corpus.txt -o build/mixed-recovered
  python -m compress.recover build/mixed-recovered/last --teacher build/smollm2-135m --data corpus.txt --codes -o build/codes-too
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, TrainerOptions):
    """Train a quantized checkpoint's scales and norms against the model it was made from."""

    checkpoint: Path = arg(positional=True, help="quantized checkpoint folder")
    teacher: Path = arg(help="the checkpoint it was made from")
    codes: bool = arg(False, help="train the codes too")
    code_rate: float = arg(5e-3, help="peak learning rate of the codes' latent values, in units of a code", above=0, below=1)
    windows: int = arg(320, help="windows of the text to learn from, spread evenly", least=1)
    length: int = arg(512, help="tokens in a window", least=1)
    top: int = arg(64, help="teacher's log-probabilities kept for each token", least=1)
    teacher_cache: Path = arg(TEACHER_CACHE, help="where the teacher's predictions are kept")
    steps: int = arg(80, help="updates of scales and norm gains", least=1, group="training")
    batch: int = arg(4, help="windows that one update learns from", least=1, group="training")
    learning_rate: float = arg(1e-4, help="peak learning rate of scales (as factors) and norm gains", above=0, below=1,
                               group="training")
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
import torch.nn.functional as F
from torch import Tensor, nn

from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import kl
from compress.distilling.taught import Windows, check_tokenizers, fit, set_apart, taught, trainer_of, with_defaults
from compress.quantizing.grid import fp16
from compress.text import corpus_windows
from models.checkpoint import Checkpoint, check_output, fill_checkpoint, load_decoder, open_checkpoint
from models.formats.teacher_cache import shared_vocabulary
from models.network.decoder import Decoder, for_products
from models.network.quantized import QuantizedTensor
from models.training.trainer import has_bf16


class _Scaled(torch.autograd.Function):
    """(codes - zeros) * scales, remembering codes as bytes instead of floats. codes [N, G, K/G]; scales, zeros [N, G]."""

    @staticmethod
    def forward(context, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        context.save_for_backward(codes, zeros)
        return for_products((codes.float() - zeros[:, :, None]).mul_(scales[:, :, None]).flatten(1))

    @staticmethod
    def backward(context, gradient: Tensor):
        codes, zeros = context.saved_tensors
        grouped = gradient.float().view(codes.shape)
        return None, None, (grouped * codes).sum(-1) - zeros * grouped.sum(-1)


class _Rounded(torch.autograd.Function):
    """round(latent) within 0 .. top; the gradient passes where the latent is within the range."""

    @staticmethod
    def forward(context, latent: Tensor, top: int) -> Tensor:
        context.save_for_backward((latent > -0.5) & (latent < top + 0.5))
        return latent.round().clamp_(0, top)

    @staticmethod
    def backward(context, gradient: Tensor):
        return gradient * context.saved_tensors[0], None


class CodedLinear(nn.Module):
    """A linear whose weight is made of codes; `log_factor` [N, G] changes its scales, `latent` its codes."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None):
        super().__init__()
        self.tensor, self.bias, self.top = tensor, bias, 2**tensor.bits - 1
        scales = tensor.scales.float()
        zeros = torch.full_like(scales, 2.0 ** (tensor.bits - 1)) if tensor.zeros is None else tensor.zeros.float()
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("codes", tensor.codes.unflatten(1, (scales.shape[1], -1)), persistent=False)
        self.log_factor = nn.Parameter(torch.zeros_like(scales))
        self.latent: nn.Parameter | None = None

    def free_codes(self) -> None:
        self.latent = nn.Parameter(self.codes.float())

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales * self.log_factor.exp()
        if self.latent is None:
            return F.linear(x, _Scaled.apply(self.codes, self.zeros, scales), self.bias)
        codes = _Rounded.apply(self.latent, self.top)
        return F.linear(x, ((codes - self.zeros[:, :, None]) * scales[:, :, None]).flatten(1), self.bias)

    def frozen(self) -> QuantizedTensor:
        codes = self.codes if self.latent is None else self.latent.detach().round().clamp(0, self.top).to(torch.uint8)
        scales = fp16(self.scales * self.log_factor.detach().exp()).half()
        return replace(self.tensor, codes=codes.flatten(1).cpu(), scales=scales.cpu())


def student_of(checkpoint: Checkpoint) -> Decoder:
    """The decoder with every quantized linear of its layers a CodedLinear; nothing else is trained but norms."""
    decoder = load_decoder(checkpoint.path).requires_grad_(False)
    for module, form in checkpoint.quantization.tensors.items():
        if module.startswith("model.layers.") and form.kind == "int":
            parent, name = module.rsplit(".", 1)
            linear = CodedLinear(checkpoint.quantized(module), decoder.get_submodule(module).bias)
            setattr(decoder.get_submodule(parent), name, linear)
    for module in decoder.modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            module.requires_grad_(True)
    return decoder


def recover(options: Options) -> None:
    """Run the stage. Raises UserError for input that cannot be used, CheckFailed at a loss not finite."""
    checkpoint, teacher = open_checkpoint(options.checkpoint), open_checkpoint(options.teacher)
    if checkpoint.quantization is None:
        raise UserError(f"{options.checkpoint} is not quantized: give the result of compress.quantize")
    check_tokenizers(teacher, checkpoint)
    check_output(options.out / "last", options.checkpoint)
    if options.precision == "auto" and has_bf16():
        options = replace(options, precision="bf16")
    length = min(options.length, checkpoint.config.context_length)
    options = with_defaults(options, length)
    wanted = min(options.windows, options.batch * options.steps)         # no more than the steps will look at
    windows = Windows(corpus_windows(teacher, options, wanted + options.eval_rows, length))
    left, held = set_apart(len(windows), options.eval_rows)
    if not len(left):
        raise UserError(f"{options.data[0]}: too few tokens to learn from and to judge on in windows of {length}: give more, or a "
                        f"shorter --length")
    shared = shared_vocabulary(options.teacher, teacher.config.vocab_size, checkpoint.config.vocab_size)
    train, valid = (taught(windows, chosen, options, shared) for chosen in (left, held))
    inputs = {"checkpoint": checkpoint.sha256(), "teacher": teacher.sha256(), "predictions": train.cache.folder.name}
    student = student_of(checkpoint)
    for module in student.modules() if options.codes else ():
        if isinstance(module, CodedLinear):
            module.free_codes()
    rates = {"latent": options.code_rate / options.learning_rate}
    fit(trainer_of(Distiller(student, None, Losses(kl), shared), options, train, valid, partial(_save, checkpoint, options, inputs),
                   inputs, rates=lambda name: rates.get(name.rpartition(".")[2], 1.0)))


def _save(checkpoint: Checkpoint, options: Options, inputs: dict, distiller: Distiller, folder: Path, metrics: dict) -> None:
    stage = lineage.stage("compress.recover", options, inputs, metrics, options.seed)
    fill_checkpoint(folder, checkpoint.hf_config, _tensors(checkpoint, distiller.student), checkpoint.path, stage)


def _tensors(checkpoint: Checkpoint, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.names():
        place, suffix = name.rsplit(".", 1)
        module = decoder.get_submodule(place)
        if not isinstance(module, CodedLinear) or suffix not in ("codes", "scales", "zeros"):
            trained = isinstance(module, (nn.RMSNorm, nn.LayerNorm))
            yield name, getattr(module, suffix).detach() if trained else checkpoint.read(name)
        elif suffix == "codes":
            yield from module.frozen().tensors(place).items()
