"""Quantize a checkpoint's weights: linears, embedding and head become integer codes with fp16 scales.

Norms, biases and learned positions stay as they are; activations (--activations) and the KV cache (--kv-cache) are
rounded where asked, when the model runs. The codes are decided here once, stored (models/network/quantized.py), and
used as they are by PyTorch and by every export. The token embedding and the head have bits of their own, since both
read or write the vocabulary: 8 bits, symmetric, one scale a row, costs nothing measurable; fewer bits take the linears'
group. What decides how fast a recurrent layer's state decays and is written (one row a head) has 8 bits at least: it is small,
and its errors add up from token to token. Routers and convolutions stay as they are.

METHODS has how codes are chosen. Calibrated methods go layer by layer over text and resume where they were stopped
(compress/quantizing/calibrated.py); of the others only autoround has more than one tensor in memory. With --target-size
or --target-bpw every module gets its own format (compress/quantizing/mixed.py). ONNX and TensorRT bundles take 4 and 8
bits, TensorRT symmetric only; other widths run in PyTorch and the native core. An encoder (BERT and its kin) is quantized by
compress/encoders/quantize.py.
"""

import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from compress.cluster import ClusterOptions, cluster
from models.data.corpus import DataOptions
from models.device import DeviceOptions
from models.formats import lineage
from models.progress import progress
from runtime.capabilities import BACKENDS
from runtime.cli import arg, parse_size, run, table
from runtime.errors import UserError
from runtime.files import clear_work, lock, work_folder
from runtime.machine import peak_rss_mb


@dataclass(frozen=True)
class Method:
    """How codes are chosen, and what that takes."""

    function: str                        # in compress/quantizing; what it is given follows from `sees`
    sees: str                            # "weight", "layer" (a weight with the Hessian of its inputs) or "model" (all linears)
    data: bool = False                   # whether it is calibrated on text
    mixed: bool = True                   # whether modules may have formats of their own
    negative_scales: bool = False        # whether it cannot do without
    corrected: bool = False              # whether it corrects for the errors of earlier layers, which takes the text through both models
    vocabulary: bool = False             # whether the embedding and the head are fitted too, to what sensitivity.py measures


METHODS = {"rtn": Method("rtn.round_to_nearest", "weight"),
           "hqq": Method("neural_compressor.hqq", "weight"),
           "clip": Method("calibrated.clip", "layer", data=True),
           "gptq": Method("calibrated.gptq_descended", "layer", data=True, corrected=True, vocabulary=True),
           "autoround": Method("neural_compressor.autoround", "model", data=True, mixed=False, negative_scales=True)}
FOLDS = {"awq": "folds.awq", "smooth": "folds.smooth", "values": "folds.rotate_values"}
VOCABULARY = ("model.embed_tokens", "lm_head", "model.per_layer_embed")
EXAMPLES = """examples:
  python -m compress.quantize build/smollm2-135m -o build/smollm2-135m-int4-checkpoint --bits 4 --group 32
  python -m compress.quantize CKPT -o OUT --bits 8 --group 0
  python -m compress.quantize CKPT -o OUT --skip "model.layers.0.*" "*.down_proj"
  python -m compress.quantize CKPT -o OUT --method gptq --data corpus.txt
  python -m compress.quantize CKPT -o OUT --method gptq --data corpus.txt --target-size 92MB --backend onnx
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, DeviceOptions, ClusterOptions):
    """Quantize a checkpoint's weights."""

    checkpoint: Path = arg(positional=True, help="checkpoint folder to read")
    out: Path = arg(help="checkpoint folder to write", short="-o")
    bits: int = arg(4, help="bits of the linears' weights", choices=(2, 3, 4, 5, 6, 8))
    group: int = arg(32, help="inputs that share a scale; 0: one scale for each output", choices=(0, 32, 64, 128))
    symmetric: bool = arg(True, help="no zero points (TensorRT takes nothing else); the vocabulary is always symmetric")
    embedding_bits: int = arg(8, help="bits of the embedding and the head; 0: leave them alone",
                              choices=(0, 2, 3, 4, 5, 6, 8))
    skip: tuple[str, ...] = arg((), help="patterns of modules to leave alone, such as '*.down_proj'", metavar="PATTERN")
    method: str = arg("rtn", help="how codes are chosen", choices=tuple(METHODS))
    fold: tuple[str, ...] = arg((), help="rewrite layers before rounding: " + ", ".join(FOLDS), metavar="FOLD",
                                 group="calibration")
    kind: str = arg("int", help="levels: values of 2 to 4 bits by a table of each matrix's own; e4m3: the linears' weights as 8-bit floats",
                    choices=("int", "levels", "e4m3"))
    scale_bits: int = arg(16, help="8: scales of groups in a byte each, and one fp16 a row", choices=(8, 16))
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

    def __post_init__(self):
        super().__post_init__()
        method = METHODS[self.method]
        looks = {"--fold": self.fold, "--activation-scales static": self.activation_scales == "static",
                 "--kv-cache": self.kv_cache != "float"}
        unlooked = next((name for name, asked in looks.items() if asked and not self.calibrated), None)
        unknown = next((name for name in self.fold if name not in FOLDS), None)
        for wrong, words in (
                (self.target_size is not None and self.target_bpw is not None,
                 "--target-size and --target-bpw say the same thing twice: give one of them"),
                (self.mixed and not self.data, "--target-size and --target-bpw measure sensitivity on text: give --data FILES"),
                (method.data and not self.data, f"--method {self.method} is calibrated on text: give --data FILES"),
                (self.ray and not self.measured, f"--ray shares out the measuring of sensitivity, which --method {self.method} does without: "
                 "choose gptq, --target-size or --target-bpw"),
                (unknown, f"--fold {unknown!r} is unknown: choose from {', '.join(FOLDS)}"),
                (unlooked, f"{unlooked} looks at calibration text, which --method {self.method} does not: choose --method clip or gptq"),
                (self.activation_scales == "static" and not self.activations,
                 "--activation-scales is about int8 activations: give --activations 8"),
                (self.kind == "e4m3" and (self.method != "rtn" or self.bits != 8 or not self.symmetric),
                 "--kind e4m3 is rounded to nearest in 8 bits: give --method rtn --bits 8, without --no-symmetric"),
                (self.kind == "levels" and (self.bits > 4 or not self.symmetric),
                 "--kind levels has 2 to 4 bits and no zero points: give --bits 4, without --no-symmetric"),
                (self.scale_bits == 8 and (self.group == 0 or self.kind == "e4m3"),
                 "--scale-bits 8 is about the scales of groups: give --group 32, and --kind int or levels"),
                ((self.kind == "levels" or self.scale_bits == 8) and self.method in ("hqq", "autoround"),
                 f"--method {self.method} has even steps and fp16 scales: choose --method gptq for --kind levels or --scale-bits 8"),
                (self.mixed and not method.mixed or method.negative_scales and not self.negative_scales,
                 f"--method {self.method} has one format for all linears, and negative scales, which TensorRT does not run: choose "
                 f"--method gptq for --target-size, --target-bpw or --backend tensorrt")):
            if wrong:
                raise UserError(words)

    @property
    def mixed(self) -> bool:
        """Whether every module gets a format of its own, for a target size."""
        return self.target_size is not None or self.target_bpw is not None

    @property
    def measured(self) -> bool:
        """Whether sensitivity is measured."""
        return self.mixed or METHODS[self.method].vocabulary and self.embedding_bits > 0

    @property
    def calibrated(self) -> bool:
        return METHODS[self.method].sees == "layer"

    @property
    def negative_scales(self) -> bool:
        return BACKENDS[self.backend].negative_scales


def main(argv=None) -> int:
    return run(Options, "quantize", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from compress.encoders.quantize import quantize_encoder
from compress.quantizing.calibrated import calibrated, calibration_bytes, device_bytes
from compress.quantizing.grid import TABLE, by_rows
from compress.quantizing.fisher import gradient_bytes, stored_bytes
from compress.quantizing.mixed import check_backend, check_target, measured, mixed_formats
from compress.quantizing.rtn import round_to_nearest
from compress.quantizing.sensitivity import Sensitivity, measure_sensitivity
from compress.options import check_compresses
from compress.text import corpus_windows
from models.checkpoint import CPU, Checkpoint, check_output, open_checkpoint, write_checkpoint
from models.device import computing_on
from models.encoders.network import is_encoder
from models.families import FAMILIES
from models.formats.weight_names import Naming
from models.network.decoder import named_groups
from models.network.quantized import Quantization, TensorFormat
from models.training.memory import memory_line


def quantize(options: Options) -> None:
    """Run the stage. Raises UserError for input that cannot be used; then nothing is written."""
    if is_encoder(options.checkpoint):
        return quantize_encoder(options)
    with computing_on(options.device) as device:
        _quantize(open_checkpoint(options.checkpoint).on(device), options)


def _quantize(checkpoint: Checkpoint, options: Options) -> None:
    method = METHODS[options.method]
    check_compresses(checkpoint)
    if checkpoint.quantization is not None:
        raise UserError(f"{options.checkpoint} is quantized already, and codes cannot be decided twice: quantize the "
                        f"checkpoint it was made from")
    check_output(options.out, options.checkpoint)
    plan = Quantization({} if options.mixed else choose_formats(checkpoint, options), _activations(options),
                        None if options.kv_cache == "float" else {"bits": 8, "per": options.kv_cache})
    check_backend(plan, options.backend)
    if method.sees == "model" and FAMILIES[checkpoint.config.family].naming != Naming():
        raise UserError(f"--method {options.method} works on the model as transformers has it, whose linears in a {checkpoint.config.family} "
                        f"are other ones: choose --method gptq")
    skip = _skipped(checkpoint.modules(), options.skip)
    if options.mixed:
        size = parse_size(options.target_size) if options.target_size else int(options.target_bpw * _weights(checkpoint) / 8)
        check_target(checkpoint, size, options.backend, skip)
    length = min(options.length, checkpoint.config.context_length)
    ids = corpus_windows(checkpoint, options, options.windows, length) if options.data else None
    if options.calibrated:
        print(f"layer by layer, {_memory(checkpoint, options)}")
    inputs, found = {"checkpoint": checkpoint.sha256()}, None
    if ids is not None:
        inputs["calibration"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if options.measured:
        found = _sensitivity(checkpoint, options, ids)
    if options.mixed:
        formats, damage = mixed_formats(checkpoint, found, size, options.backend, skip)
        plan = replace(plan, tensors=formats)
        print(f"predicted divergence: {damage:.4f} nats a token")
    if options.calibrated:
        work = work_folder(options.out, [inputs, options.method, options.fold, options.negative_scales, plan.to_dict()])
        folds = tuple(_function(FOLDS[name]) for name in options.fold)
        tensors = calibrated(checkpoint, ids, plan, _function(method.function), work, folds, found and found.vocabulary,
                             options.negative_scales, method.corrected)
    else:
        tensors = _quantized(checkpoint, ids, plan.tensors, options)
    config = checkpoint.hf_config | {"quantization_config": plan.to_dict()}
    with lock(options.out):
        write_checkpoint(options.out, config, tensors, options.checkpoint, lineage.stage("compress.quantize", options, inputs))
        clear_work(options.out)
    _report(checkpoint, open_checkpoint(options.out))


def _memory(checkpoint: Checkpoint, options: Options) -> str:
    """The prediction. Raises UserError where the device has no room for one layer."""
    config, device, streams = checkpoint.config, checkpoint.device, 1 + METHODS[options.method].corrected
    if device == CPU:
        return memory_line(calibration_bytes(config, options.windows, options.length, streams))
    there, host = device_bytes(config, options.windows, options.length, device, streams)
    return f"on {device} {memory_line(there, device)}; on the host {memory_line(host)}"


def _weights(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def _function(name: str):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"compress.quantizing.{module}"), function)


def _sensitivity(checkpoint: Checkpoint, options: Options, ids: torch.Tensor) -> Sensitivity:
    """Read from --sensitivity, or measured and kept there."""
    if options.sensitivity is not None and options.sensitivity.exists():
        return Sensitivity.load(options.sensitivity, checkpoint.sha256())
    print(f"sensitivity, {memory_line(gradient_bytes(checkpoint.config, options.length, stored_bytes(checkpoint)), checkpoint.device)}")
    rows = torch.linspace(0, len(ids) - 1, min(options.sensitivity_windows, len(ids))).round().long()
    formats = measured()
    work = work_folder(options.out, [checkpoint.sha256(), ids[rows].tolist(), list(map(str, formats))], "sensitivity")
    with cluster(options.ray, options.device) as joined:
        found = measure_sensitivity(checkpoint, ids[rows], formats, work=work, cluster=joined)
    if options.sensitivity is not None:
        found.save(options.sensitivity)
    return found


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
    layers = zip(checkpoint.config.layers, named_groups(checkpoint.config))
    rates = {reader for layer, (mixer, *_) in layers if layer.state_dim for reader in mixer[0].readers
             if checkpoint.shape(f"{reader}.weight")[0] == layer.heads}
    formats = {}
    for module in modules:
        vocabulary = module in VOCABULARY
        bits = options.embedding_bits if vocabulary else options.bits
        if bits == 0 or module in skip:
            continue
        if module in rates and bits < 8:
            formats[module] = TensorFormat(8, 0)
            continue
        group = 0 if vocabulary and bits == 8 else options.group
        kind = "int" if vocabulary and (bits > 4 or options.kind == "e4m3") else options.kind
        formats[module] = TensorFormat(bits, group, options.symmetric or vocabulary, kind, options.scale_bits if group else 16)
        try:
            formats[module].groups(checkpoint.shape(f"{module}.weight")[1])
        except UserError as error:
            raise UserError(f"{module}: {error}; choose another --group, 0 for one scale a row, or --skip it") from None
    if not formats:
        raise UserError("--skip and --embedding-bits leave nothing to quantize")
    return formats


def _quantized(checkpoint: Checkpoint, ids: torch.Tensor | None, formats: dict[str, TensorFormat],
               options: Options) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result, by a method that sees a weight or the whole model."""
    method = METHODS[options.method]
    choose, done = _function(method.function), {}
    if method.sees == "model":
        linears = {name: form for name, form in formats.items() if name not in VOCABULARY}
        done = choose(checkpoint.path, ids, linears, options.iterations, checkpoint.device)
    for name in progress(checkpoint.names(), label="quantizing", unit="tensor"):
        module = name.removesuffix(".weight")
        if module in done:
            yield from done[module].tensors(module).items()
        elif module in VOCABULARY and module in formats:
            table = checkpoint.on(CPU).read(name)
            yield from by_rows(table, lambda rows: round_to_nearest(rows, formats[module]), TABLE, checkpoint.device).tensors(module).items()
        elif module in formats:
            yield from choose(checkpoint.weight(module), formats[module]).tensors(module).items()
        else:
            yield name, checkpoint.on(CPU).read(name)


def _report(before: Checkpoint, after: Checkpoint) -> None:
    """Print what became of the weights, and keep it in the lineage."""
    metrics = {}
    for label, checkpoint in (("before", before), ("after", after)):
        size = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        metrics[label] = {"bytes": size, "bits_per_weight": 8 * size / _weights(before)}
    metrics["after"]["peak_rss_mb"] = peak_rss_mb()
    lineage.add_metrics(after.path, metrics)
    for form, count in Counter(after.quantization.tensors.values()).items():
        print(f"{count} matrices at {form.bits} bits{'' if form.kind == 'int' else f' ({form.kind})'}, "
              + (f"groups of {form.group}" if form.group else "one scale a row") + ("" if form.scale_bits == 16 else ", 8-bit scales")
              + ("" if form.symmetric else ", with zero points"))
    rows = []
    for name, key, unit, form in (("weights, MB", "bytes", 1e-6, ".1f"), ("bits per weight", "bits_per_weight", 1, ".2f"),
                                  ("peak memory, MB", "peak_rss_mb", 1, ".0f")):
        rows.append({"": name} | {label: format(found[key] * unit, form) if key in found else "" for label, found in metrics.items()})
    print("\n" + table(rows))
