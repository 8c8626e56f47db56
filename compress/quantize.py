"""Quantize a checkpoint's weights: linears, embedding and head become integer codes with fp16 scales.

Norms, biases and learned positions stay as they are; activations (--activations) and the KV cache (--kv-cache) are
rounded where asked, when the model runs. The codes are decided here once, stored (models/network/quantized.py), and
used as they are by PyTorch and by every export. The token embedding and the head have bits of their own, since both
read or write the vocabulary: 8 bits, symmetric, one scale a row, costs nothing measurable; fewer bits take the linears'
group.

Methods: "rtn" rounds to nearest (compress/quantizing/rtn.py) and needs no data, nor does "hqq", neural-compressor's
(compress/quantizing/neural_compressor.py): one tensor is in memory at a time. "clip" (compress/quantizing/clipping.py)
and "gptq" (compress/quantizing/gptq.py) are calibrated on text (--data), layer by layer
(compress/quantizing/calibrated.py), and resume where they were stopped; "autoround", neural-compressor's too, is
calibrated and does not resume. With --target-size or --target-bpw every module gets its own format
(compress/quantizing/mixed.py). ONNX and TensorRT bundles take 4 and 8 bits, TensorRT symmetric only; other widths run
in PyTorch and the native core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

from compress.options import TEACHER_CACHE
from models.formats import lineage
from models.data.corpus import DataOptions
from models.data.records import as_text, find_sources, read_records, source_digest
from models.progress import progress
from runtime.capabilities import BACKENDS
from runtime.cli import arg, run, table
from runtime.errors import UserError
from runtime.files import clear_work, lock, work_folder
from runtime.machine import peak_rss_mb
from runtime.text import Tokenizer

CALIBRATED = ("clip", "gptq")           # methods that look at text
FOLD_NAMES = ("awq", "smooth", "values")
EXAMPLES = """examples:
  python -m compress.quantize build/smollm2-135m -o build/smollm2-135m-int4-checkpoint --bits 4 --group 32
  python -m compress.quantize CKPT -o OUT --bits 8 --group 0 --eval-text TEXT
  python -m compress.quantize CKPT -o OUT --skip "model.layers.0.*" "*.down_proj"
  python -m compress.quantize CKPT -o OUT --method gptq --data corpus.txt
  python -m compress.quantize CKPT -o OUT --method gptq --data corpus.txt --target-size 92MB --backend onnx
  python -m compress.quantize CKPT -o OUT --method gptq --data corpus.txt --target-size 70MB --recover 40
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Quantize a checkpoint's weights."""

    checkpoint: Path = arg(positional=True, help="checkpoint folder to read")
    out: Path = arg(help="checkpoint folder to write", short="-o")
    bits: int = arg(4, help="bits of the linears' weights", choices=(2, 3, 4, 5, 6, 8))
    group: int = arg(32, help="inputs that share a scale; 0: one scale for each output", choices=(0, 32, 64, 128))
    symmetric: bool = arg(True, help="no zero points (TensorRT takes nothing else); the vocabulary is always symmetric")
    embedding_bits: int = arg(8, help="bits of the embedding and the head; 0: leave them alone",
                              choices=(0, 2, 3, 4, 5, 6, 8))
    skip: tuple[str, ...] = arg((), help="patterns of modules to leave alone, such as '*.down_proj'", metavar="PATTERN")
    method: str = arg("rtn", help="how codes are chosen", choices=("rtn", "hqq", "clip", "gptq", "autoround"))
    fold: tuple[str, ...] = arg((), help="rewrite layers before rounding: " + ", ".join(FOLD_NAMES), metavar="FOLD", group="calibration")
    kind: str = arg("int", help="e4m3: the linears' weights as 8-bit floats", choices=("int", "e4m3"))
    activations: int = arg(0, help="8: linears also round their inputs to int8; 0: they do not", choices=(0, 8),
                           group="activations and KV cache")
    activation_scales: str = arg("row", help="of these: one for each token's row as it comes, or static: one for each "
                                 "linear, from the calibration text, and none for down_proj", choices=("row", "static"),
                                 group="activations and KV cache")
    kv_cache: str = arg("float", help="int8 keys and values, scales from the calibration text: one, or one a channel",
                        choices=("float", "tensor", "channel"), group="activations and KV cache")
    data: tuple[str, ...] = arg((), help="calibration text: files, folders, globs or hf:NAME@SPLIT", group="calibration")
    windows: int = arg(128, help="windows of calibration text, spread evenly over it", least=1, group="calibration")
    length: int = arg(512, help="tokens in a window", least=1, group="calibration")
    iterations: int = arg(200, help="steps of learning for each layer, of --method autoround", least=1, group="calibration")
    target_size: str | None = arg(None, help="bytes of the bundle's weights, such as 92MB: formats are chosen for each module",
                                  size=True, group="a target size")
    target_bpw: float | None = arg(None, help="the same as bits per weight", above=0, most=32, group="a target size")
    backend: str = arg("native", help="formats to choose from: ONNX and TensorRT run 4 and 8 bits", choices=tuple(BACKENDS),
                       group="a target size")
    sensitivity: Path | None = arg(None, help="file that keeps the measured sensitivity; read where it is there",
                                   group="a target size")
    sensitivity_windows: int = arg(24, help="windows the sensitivity is measured on", least=1, group="a target size")
    recover: int = arg(0, help="then train scales and norm gains for so many steps (compress.recover)", metavar="STEPS",
                       least=0, group="recovery")
    recover_rate: float = arg(1e-4, help="the learning rate of that; coarse codes take more", above=0, below=1, group="recovery")
    teacher_cache: Path = arg(TEACHER_CACHE, help="where the teacher's predictions for that are kept", group="recovery")
    eval_text: Path | None = arg(None, help="text to measure perplexity on, before and after", group="measuring")
    eval_windows: int = arg(32, help="windows of 512 tokens of it to use; 0: all", least=0, group="measuring")

    def __post_init__(self):
        super().__post_init__()
        if self.target_size is not None and self.target_bpw is not None:
            raise UserError("--target-size and --target-bpw say the same thing twice: give one of them")
        if self.mixed and not self.data:
            raise UserError("--target-size and --target-bpw measure sensitivity on text: give --data FILES")
        if self.method in (*CALIBRATED, "autoround") and not self.data:
            raise UserError(f"--method {self.method} is calibrated on text: give --data FILES")
        for name in self.fold:
            if name not in FOLD_NAMES:
                raise UserError(f"--fold {name!r} is unknown: choose from {', '.join(FOLD_NAMES)}")
        calibrates = {"--fold": self.fold, "--activation-scales static": self.activation_scales == "static",
                      "--kv-cache": self.kv_cache != "float"}
        for name, asked in calibrates.items():
            if asked and self.method not in CALIBRATED:
                raise UserError(f"{name} looks at calibration text, which --method {self.method} does not: choose --method "
                                f"clip or gptq")
        if self.activation_scales == "static" and not self.activations:
            raise UserError("--activation-scales is about int8 activations: give --activations 8")
        if self.kind == "e4m3" and (self.method != "rtn" or self.bits != 8 or not self.symmetric):
            raise UserError("--kind e4m3 is rounded to nearest in 8 bits: give --method rtn --bits 8, without --no-symmetric")
        if self.method == "autoround" and (self.mixed or not BACKENDS[self.backend].negative_scales):
            raise UserError("--method autoround has one format for all linears, and negative scales, which TensorRT does not "
                            "run: choose --method gptq for --target-size, --target-bpw or --backend tensorrt")
        if self.recover and not self.data:
            raise UserError("--recover needs --data FILES to train on")

    @property
    def mixed(self) -> bool:
        """Whether every module gets a format of its own, for a target size."""
        return self.target_size is not None or self.target_bpw is not None


def main(argv=None) -> int:
    return run(Options, "quantize", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from compress.quantizing.awq import awq
from compress.quantizing.calibrated import calibrated
from compress.calibration_text import corpus_windows
from compress.quantizing.memory import calibration_bytes, gradient_bytes
from compress.quantizing.mixed import budget, candidates, check_backend, check_target, mixed_formats
from compress.quantizing.neural_compressor import autoround, hqq
from compress.recover import Options as RecoverOptions, recover
from compress.quantizing.rotation import rotate_values
from compress.quantizing.rtn import round_to_nearest
from compress.quantizing.sensitivity import Sensitivity, measure_sensitivity, stored_bytes
from compress.quantizing.smoothquant import smooth
from models.formats.checkpoint import Checkpoint, check_output, load_decoder, open_checkpoint, write_checkpoint
from models.judging.fidelity import Window, cut_windows, measure
from models.training.memory import memory_line
from models.network.quantized import Quantization, QuantizedTensor, TensorFormat
from models.network.torch_backend import TorchBackend

FOLDS = dict(zip(FOLD_NAMES, (awq, smooth, lambda layer, walk, formats: rotate_values(layer))))
VOCABULARY = ("model.embed_tokens", "lm_head")


def quantize(options: Options) -> None:
    """Run the stage. Raises UserError for input that cannot be used; then nothing is written."""
    if not options.recover:
        return _write_codes(options)
    check_output(options.out, options.checkpoint)
    # What is trained afterwards waits beside the result, so that an interrupted run has its codes already.
    plan = asdict(options) | {"out": None, "recover": None, "recover_rate": None}
    sources = [source_digest(source) for source in find_sources(options.data)]
    with lock(options.out):
        _quantize_and_recover(options, work_folder(options.out, [plan, open_checkpoint(options.checkpoint).sha256(), sources], "coded"))


def _quantize_and_recover(options: Options, coded: Path) -> None:
    if not coded.exists():
        _write_codes(replace(options, out=coded, recover=0))
    reading = {field.name: getattr(options, field.name) for field in fields(DataOptions)}
    recover(RecoverOptions(**reading, checkpoint=coded, teacher=options.checkpoint, out=options.out, steps=options.recover,
                           learning_rate=options.recover_rate, length=options.length, teacher_cache=options.teacher_cache))
    if options.eval_text:
        perplexity = _perplexity(options.out, _windows(open_checkpoint(options.out), options), "recovered")
        lineage.add_metrics(options.out, {"perplexity": perplexity})
        print(f"perplexity after recovery: {perplexity:.3f}")


def _write_codes(options: Options) -> None:
    """The stage without --recover."""
    checkpoint = open_checkpoint(options.checkpoint)
    if checkpoint.quantization is not None:
        raise UserError(f"{options.checkpoint} is quantized already, and codes cannot be decided twice: quantize the "
                        f"checkpoint it was made from")
    check_output(options.out, options.checkpoint)
    mixed = options.mixed
    plan = Quantization({} if mixed else choose_formats(checkpoint, options), _activations(options),
                        None if options.kv_cache == "float" else {"bits": 8, "per": options.kv_cache})
    check_backend(plan, options.backend)
    skip = _skipped(checkpoint.modules(), options.skip)
    if mixed:
        size = budget(checkpoint, options.target_size, options.target_bpw)
        check_target(checkpoint, size, options.backend, skip)
    length = min(options.length, checkpoint.config.context_length)
    ids = corpus_windows(checkpoint, options, options.windows, length) if options.data else None
    windows = _windows(checkpoint, options) if options.eval_text else None
    before = {"bytes": sum(checkpoint.nbytes(name) for name in checkpoint.names())}
    if windows:
        before["perplexity"] = _perplexity(options.checkpoint, windows, "before")

    if options.method in CALIBRATED:
        print(f"layer by layer, {memory_line(calibration_bytes(checkpoint.config, options.windows, options.length))}")
    inputs, found = {"checkpoint": checkpoint.sha256()}, None
    if ids is not None:
        inputs["calibration"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if mixed or (options.method == "gptq" and options.embedding_bits):
        found = _sensitivity(checkpoint, options, ids)
    if mixed:
        formats, damage = mixed_formats(checkpoint, found, size, options.backend, skip)
        plan = replace(plan, tensors=formats)
        print(f"predicted divergence: {damage:.4f} nats a token")
    stage = lineage.stage("compress.quantize", options, inputs)
    config = checkpoint.hf_config | {"quantization_config": plan.to_dict()}
    if options.method not in CALIBRATED:
        linears = {name: form for name, form in plan.tensors.items() if name not in VOCABULARY}
        found = autoround(checkpoint.path, ids, linears, options.iterations) if options.method == "autoround" else {}
        tensors, work = _quantized(checkpoint, plan.tensors, options.method, found), None
    else:
        work = _work_folder(options, inputs, plan)
        tensors = calibrated(checkpoint, ids, plan, options.method, work, tuple(FOLDS[name] for name in options.fold),
                             found and found.vocabulary, BACKENDS[options.backend].negative_scales)
    with lock(options.out):
        write_checkpoint(options.out, config, tensors, options.checkpoint, stage)
        clear_work(options.out)

    result = open_checkpoint(options.out)
    after = {"bytes": sum(result.nbytes(name) for name in result.names())}
    if windows:
        after["perplexity"] = _perplexity(options.out, windows, "after")
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())
    after["peak_rss_mb"] = peak_rss_mb()
    for figures in (before, after):
        figures["bits_per_weight"] = 8 * figures["bytes"] / weights
    lineage.add_metrics(options.out, {"before": before, "after": after})
    print(_report(plan.tensors, before, after))


def _sensitivity(checkpoint: Checkpoint, options: Options, ids: torch.Tensor) -> Sensitivity:
    """Read from --sensitivity, or measured and kept there."""
    if options.sensitivity is not None and options.sensitivity.exists():
        return Sensitivity.load(options.sensitivity, checkpoint.sha256())
    print(f"sensitivity, {memory_line(gradient_bytes(checkpoint.config, options.length, stored_bytes(checkpoint)))}")
    rows = torch.linspace(0, len(ids) - 1, min(options.sensitivity_windows, len(ids))).round().long()
    found = measure_sensitivity(checkpoint, ids[rows], candidates("native"))
    if options.sensitivity is not None:
        found.save(options.sensitivity)
    return found


def _work_folder(options: Options, inputs: dict, plan: Quantization) -> Path:
    """Where finished layers of exactly this work wait, beside the result."""
    negative = BACKENDS[options.backend].negative_scales
    return work_folder(options.out, [inputs, options.method, options.fold, negative, plan.to_dict()])


def _activations(options: Options) -> dict:
    """A static scale for what down_proj reads would be that of its few outliers, with 1 or 2 steps left for all the rest."""
    if not options.activations:
        return {}
    return {"bits": 8} | ({"per": "row"} if options.activation_scales == "row" else {"per": "tensor", "except": ["down_proj"]})


def _skipped(modules: list[str], patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Modules that match a pattern. Raises UserError for a pattern that matches nothing."""
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise UserError(f"--skip {pattern!r} matches no module: they are named like {modules[1]} and {modules[-1]}")
    return tuple(module for module in modules if any(fnmatchcase(module, pattern) for pattern in patterns))


def choose_formats(checkpoint: Checkpoint, options: Options) -> dict[str, TensorFormat]:
    """Module -> format. Raises UserError for a group that does not divide, or a pattern that matches nothing."""
    modules = checkpoint.modules()
    skip = _skipped(modules, options.skip)
    formats = {}
    for module in modules:
        vocabulary = module in VOCABULARY
        bits = options.embedding_bits if vocabulary else options.bits
        if bits == 0 or module in skip:
            continue
        group = 0 if vocabulary and bits == 8 else options.group
        formats[module] = TensorFormat(bits, group, options.symmetric or vocabulary, "int" if vocabulary else options.kind)
        try:
            formats[module].groups(checkpoint.shape(f"{module}.weight")[1])
        except UserError as error:
            raise UserError(f"{module}: {error}; choose another --group, 0 for one scale a row, or --skip it") from None
    if not formats:
        raise UserError("--skip and --embedding-bits leave nothing to quantize")
    return formats


def _quantized(checkpoint: Checkpoint, formats: dict[str, TensorFormat], method: str,
               done: dict[str, QuantizedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result; `done`: modules whose codes are decided already."""
    for name in progress(checkpoint.names(), label="quantizing", unit="tensor"):
        module = name.removesuffix(".weight")
        if module in done:
            yield from done[module].tensors(module).items()
        elif module in formats:
            yield from _tensors(checkpoint, module, formats[module], method).items()
        else:
            yield name, checkpoint.read(name)


def _tensors(checkpoint: Checkpoint, module: str, form: TensorFormat, method: str) -> dict[str, torch.Tensor]:
    weight = checkpoint.weight(module)
    found = hqq(weight, form) if method == "hqq" and module not in VOCABULARY else round_to_nearest(weight, form)
    return found.tensors(module)


def _windows(checkpoint: Checkpoint, options: Options) -> list[Window]:
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{checkpoint.path} has no tokenizer.json, which --eval-text needs")
    text = "\n".join(as_text(record) for record in read_records(find_sources([options.eval_text])))
    window = min(512, checkpoint.config.context_length)
    return cut_windows(Tokenizer(file), text, window, window // 2, options.eval_windows or None)


def _perplexity(folder: Path, windows: list[Window], label: str) -> float:
    return measure(TorchBackend(load_decoder(folder)), windows, label=f"perplexity {label}").metrics()["perplexity"]


def _report(formats: dict[str, TensorFormat], before: dict, after: dict) -> str:
    rows = [{"": "weights, MB", "before": f"{before['bytes'] / 1e6:.1f}", "after": f"{after['bytes'] / 1e6:.1f}"},
            {"": "bits per weight", "before": f"{before['bits_per_weight']:.2f}",
             "after": f"{after['bits_per_weight']:.2f}"}]
    rows.append({"": "peak memory, MB", "before": "", "after": f"{after['peak_rss_mb']:.0f}"})
    if "perplexity" in before:
        rows.append({"": "perplexity", "before": f"{before['perplexity']:.3f}", "after": f"{after['perplexity']:.3f}"})
    kinds = {}
    for form in formats.values():
        kinds[form] = kinds.get(form, 0) + 1
    lines = [f"{count} matrices at {form.bits} bits{'' if form.kind == 'int' else f' ({form.kind})'}, "
             + (f"groups of {form.group}" if form.group else "one scale a row")
             + ("" if form.symmetric else ", with zero points") for form, count in kinds.items()]
    return "\n".join([*lines, "", table(rows)])
