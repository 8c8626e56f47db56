"""Quantization-aware distillation: train what surrounds the codes until the student says what its teacher says.

    python -m compress.recover QUANTIZED --teacher ORIGINAL --data FILES -o OUT

Scales (as factors of the ones they were) and norm gains are trained with Adam against the teacher's cached top-k
predictions (compress/teacher.py); codes stay. With --weights the codes are trained too, afterwards, straight through:
every weight has a latent value in units of its scale, starting at its code, whose rounding is what the forward pass
uses and to which the gradient goes as if it had not been rounded. At the end scales are rounded to fp16 and codes are
frozen: OUT is an ordinary quantized checkpoint of the same formats and size.

Small steps matter: a learning rate of 1e-4 moves a scale by at most one part in a hundred over a hundred steps. The
coarser the codes, the more there is to win. The embedding and the head keep their codes and scales.

Matrix products run in bfloat16 where the CPU has such units; scales, gains and the residual stream are float32. Every
`SAVED` steps, and at Ctrl-C and SIGTERM, the state is kept beside OUT, so an interrupted run goes on from there and ends
with the same bytes; with more --steps (before --weights began) or --weights than before it goes on as the longer run.

Sources: Liu et al. 2023, "LLM-QAT" (distillation of a quantized model); Chen et al. 2024, "EfficientQAT" (training the
scales alone, end to end); Bengio et al. 2013 (straight-through estimator).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.options import TEACHER_CACHE
from models.formats import lineage
from models.data.corpus import DataOptions
from models.progress import progress
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import clear_work, lock, new_file, parse_json, work_folder

EXAMPLES = """examples:
  python -m compress.recover build/mixed --teacher build/smollm2-135m --data corpus.txt -o build/mixed-recovered
  python -m compress.recover build/int3 --teacher build/smollm2-135m --data corpus.txt --weights 40 -o build/int3-recovered
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Train a quantized checkpoint's scales and norms against the model it was made from."""

    checkpoint: Path = arg(positional=True, help="quantized checkpoint folder")
    teacher: Path = arg(help="the checkpoint it was made from")
    out: Path = arg(help="checkpoint folder to write", short="-o")
    steps: int = arg(80, help="steps that train scales and norm gains", least=1)
    weights: int = arg(0, help="further steps that train the codes too", metavar="STEPS", least=0)
    batch: int = arg(4, help="windows in a step", least=1)
    windows: int = arg(320, help="windows of the text to learn from, spread evenly", least=1)
    length: int = arg(512, help="tokens in a window", least=1)
    learning_rate: float = arg(1e-4, help="of scales (as factors) and norm gains", above=0, below=1)
    code_rate: float = arg(5e-3, help="of the codes' latent values, in units of a code", above=0, below=1)
    top: int = arg(64, help="teacher's log-probabilities kept for each token", least=1)
    seed: int = arg(0, help="order of the windows", least=0, most=2**63 - 1)
    teacher_cache: Path = arg(TEACHER_CACHE, help="where the teacher's predictions are kept")


def main(argv=None) -> int:
    return run(Options, "recover", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from compress.calibration_text import corpus_windows
from compress.distilling.divergence import mass_beyond
from compress.quantizing.grid import fp16
from compress.layerwise import fast_forward, fast_matmul
from compress.teacher import build_cache
from models.formats.checkpoint import Checkpoint, check_output, load_decoder, open_checkpoint, write_checkpoint
from models.network.decoder import Decoder
from models.network.quantized import QuantizedTensor
from models.training.optimizer import learning_rate
from models.formats.safetensors_file import save_tensors
from models.formats.teacher_cache import TeacherCache, shared_vocabulary, tokenizer_digest, tokenizer_size
from models.training.state import noticed

SAVED = 10                # steps from one saved state to the next


class _Scaled(torch.autograd.Function):
    """(codes - zeros) * scales, remembering codes as bytes instead of floats. codes [N, G, K/G]; scales, zeros [N, G]."""

    @staticmethod
    def forward(context, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
        context.save_for_backward(codes, zeros)
        values = (codes.float() - zeros[:, :, None]).mul_(scales[:, :, None]).flatten(1)
        return values.bfloat16() if torch.is_autocast_enabled("cpu") else values

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
        self.tensor, self.bias = tensor, bias
        self.scales = tensor.scales.float()
        half = 2.0 ** (tensor.bits - 1)
        self.zeros = torch.full_like(self.scales, half) if tensor.zeros is None else tensor.zeros.float()
        self.codes = tensor.codes.unflatten(1, (self.scales.shape[1], -1))
        self.log_factor = nn.Parameter(torch.zeros_like(self.scales))
        self.latent: nn.Parameter | None = None

    def free_codes(self) -> None:
        self.latent = nn.Parameter(self.codes.float())

    def forward(self, x: Tensor) -> Tensor:
        scales = self.scales * self.log_factor.exp()
        if self.latent is None:
            return F.linear(x, _Scaled.apply(self.codes, self.zeros, scales), self.bias)
        codes = _Rounded.apply(self.latent, 2**self.tensor.bits - 1)
        return F.linear(x, ((codes - self.zeros[:, :, None]) * scales[:, :, None]).flatten(1), self.bias)

    def frozen(self) -> QuantizedTensor:
        codes = self.codes if self.latent is None else self.latent.detach().round().clamp(0, 2**self.tensor.bits - 1).to(torch.uint8)
        scales = fp16(self.scales * self.log_factor.detach().exp()).half()
        old = self.tensor
        return QuantizedTensor(codes.flatten(1), scales, old.zeros, old.bits, old.group, old.symmetric)


def student_of(checkpoint: Checkpoint) -> tuple[Decoder, dict[str, CodedLinear]]:
    """The decoder with every quantized linear of its layers replaced by a CodedLinear, and those by module name."""
    decoder = load_decoder(checkpoint.path).requires_grad_(False)
    coded = {}
    for module, form in checkpoint.quantization.tensors.items():
        if module.startswith("model.layers.") and form.kind == "int":
            parent, name = module.rsplit(".", 1)
            linear = decoder.get_submodule(module)
            coded[module] = CodedLinear(checkpoint.quantized(module), linear.bias)
            setattr(decoder.get_submodule(parent), name, coded[module])
    return decoder, coded


def train(decoder: Decoder, groups: list[dict], cache: TeacherCache, steps: int, batch: int, seed: int, label: str,
          work: Path) -> list[float]:
    """Adam over parameter groups [{"params", "peak"}]; returns the divergence of each step, nats a token.

    The state is kept in work/LABEL.safetensors, and read from there. Raises UserError where the divergence stops being
    finite, and KeyboardInterrupt or SystemExit after the step in which Ctrl-C or SIGTERM came.
    """
    parameters = [parameter.requires_grad_(True) for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    file = work / f"{label}.safetensors"
    losses = _load(file, optimizer, parameters, steps) if file.exists() else []
    with noticed() as stop, fast_matmul(), progress(total=steps, initial=len(losses), label=label, unit="step") as bar:
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps=steps, warmup=min(8, steps // 4), peak=group["peak"],
                                            schedule="cosine", floor=0.05, decay_share=0.0)
            losses.append(_step(decoder, cache, _windows(len(cache.ids), batch, step, seed)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(kl=f"{sum(losses[-10:]) / len(losses[-10:]):.4f}", refresh=False)
            bar.update()
            if (step + 1) % SAVED == 0 or step + 1 == steps or stop.signal is not None:
                _save(file, optimizer, parameters, losses)
            if stop.signal is not None:
                print(f"stopped after step {step + 1} of {steps}: the same command continues", file=sys.stderr)
                stop.leave()
    return losses


def _windows(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The windows of one step: every epoch goes through all of them in an order of its own."""
    rounds = max(1, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + step // rounds))
    start = step % rounds * batch
    return order[start:start + batch].tolist()


def _save(file: Path, optimizer: torch.optim.Adam, parameters: list[Tensor], losses: list[float]) -> None:
    tensors = {}
    for number, parameter in enumerate(parameters):
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in optimizer.state[parameter].items()}
        tensors[f"{number}.value"] = parameter.detach().contiguous()
    with new_file(file) as partial:
        save_tensors(partial, tensors, {"losses": json.dumps(losses)})


def _load(file: Path, optimizer: torch.optim.Adam, parameters: list[Tensor], steps: int) -> list[float]:
    """Put the state back; returns its losses. A state of more than `steps` belongs to a longer run, and is passed over."""
    with safe_open(file, "pt") as saved:
        losses = parse_json(saved.metadata()["losses"])
        if len(losses) > steps:
            return []
        for number, parameter in enumerate(parameters):
            parameter.data.copy_(saved.get_tensor(f"{number}.value"))
            optimizer.state[parameter] = {name: saved.get_tensor(f"{number}.{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
        return losses


def _step(decoder: Decoder, cache: TeacherCache, rows: list[int]) -> float:
    """Gradients of the mean divergence over some windows; logits of one window at a time."""
    with fast_forward():
        hidden = decoder.model(torch.from_numpy(cache.ids[rows].astype("int64")))
    outer, total = torch.empty_like(hidden), 0.0
    for place, row in enumerate(rows):
        inner = hidden[place].detach().requires_grad_(True)
        logits = decoder.head(inner)
        loss = cache.divergence(row, logits).mean() / len(rows)
        if (taught := cache.state["vocabulary"]) < logits.shape[-1]:
            loss = loss + mass_beyond(logits, taught).mean() / len(rows)
        loss.backward()
        outer[place], total = inner.grad, total + loss.item()
    if not total < float("inf"):
        raise UserError("the divergence from the teacher is no longer finite: lower --learning-rate")
    hidden.backward(outer)
    return total


def recover(options: Options) -> None:
    """Run the stage. Raises UserError for input that cannot be used; then nothing is written."""
    checkpoint, teacher = open_checkpoint(options.checkpoint), open_checkpoint(options.teacher)
    if checkpoint.quantization is None:
        raise UserError(f"{options.checkpoint} is not quantized: give the result of compress.quantize")
    if tokenizer_digest(options.teacher) != tokenizer_digest(options.checkpoint):
        raise UserError(f"teacher and student vocabularies differ ({tokenizer_size(options.teacher)} and "
                        f"{tokenizer_size(options.checkpoint)} tokens): give the checkpoint the student was made from")
    check_output(options.out, options.checkpoint)
    length = min(options.length, checkpoint.config.context_length)
    seen = options.batch * (options.steps + options.weights)             # no more than the steps will look at
    ids = corpus_windows(teacher, options, min(options.windows, seen), length)
    shared = shared_vocabulary(options.teacher, teacher.config.vocab_size, checkpoint.config.vocab_size)
    cache = build_cache(options.teacher, ids, options.teacher_cache.expanduser(), options.top, vocabulary=shared)
    with lock(options.out):
        _train(options, checkpoint, teacher, cache)


def _train(options: Options, checkpoint: Checkpoint, teacher: Checkpoint, cache: TeacherCache) -> None:
    decoder, coded = student_of(checkpoint)
    gains = [p for name, p in decoder.named_parameters() if p.ndim == 1 and "norm" in name]
    factors = [module.log_factor for module in coded.values()]
    groups = [{"params": factors, "peak": options.learning_rate}, {"params": gains, "peak": options.learning_rate}]
    work = _work_folder(options, checkpoint, cache)
    work.mkdir(parents=True, exist_ok=True)
    losses = train(decoder, groups, cache, options.steps, options.batch, options.seed, "scales", work)
    if options.weights:
        for module in coded.values():
            module.free_codes()
        latents = [module.latent for module in coded.values()]
        losses += train(decoder, groups + [{"params": latents, "peak": options.code_rate}], cache, options.weights,
                        options.batch, options.seed + 1, f"codes-after-{options.steps}", work)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    stage = lineage.stage("compress.recover", options, {"checkpoint": checkpoint.sha256(), "teacher": teacher.sha256(),
                          "predictions": cache.folder.name}, {"kl_first_steps": first, "kl_last_steps": last}, options.seed)
    write_checkpoint(options.out, checkpoint.hf_config, _tensors(checkpoint, decoder, coded), options.checkpoint, stage)
    clear_work(options.out)
    print(f"divergence from the teacher on the text learned from: {first:.4f} nats a token at first, {last:.4f} at last")


def _work_folder(options: Options, checkpoint: Checkpoint, cache: TeacherCache) -> Path:
    """Where the state of this training, of whatever length, waits beside the result."""
    plan = {name: value for name, value in asdict(options).items()
            if isinstance(value, int | float) and name not in ("steps", "weights")}
    return work_folder(options.out, [plan, checkpoint.sha256(), cache.folder.name])


def _tensors(checkpoint: Checkpoint, decoder: Decoder, coded: dict[str, CodedLinear]):
    done = {}
    for name in checkpoint.names():
        module, suffix = name.rsplit(".", 1)
        if module in coded and suffix in ("codes", "scales", "zeros"):
            if suffix == "codes":
                done = coded[module].frozen().tensors(module)
            yield name, done[name]
        elif suffix == "weight" and "norm" in module.rsplit(".", 1)[-1]:
            yield name, decoder.get_submodule(module).weight.detach()
        else:
            yield name, checkpoint.read(name)
