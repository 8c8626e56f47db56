"""Compile an ONNX model to TensorRT engines, on a machine with or without a GPU: `python -m export.trt MODEL`.

MODEL is a bundle, a decoder's or an encoder's, a graph of a bundle, or any ONNX file. The files of
`tensorrt/` are its steps: `model.py` reads it (`--fix` turns inputs into constants, and branches that are then decided
go), `lint.py` looks for faults, `profiles.py` sets the shapes, `build.py` parses, checks and builds, `record.py` keeps
the result: a bundle's engine in the bundle (of a decoder one for each capacity), any other beside the model. Nothing is written before
an engine is complete. The command runs in a process of its own, so that a crash inside a library ends in a sentence.

The backend `rtx` (TensorRT for RTX) builds for a list of compute capabilities with no GPU. A Jetson Orin (SM87) and
data-centre GPUs are none of its targets: for them the one command to run on the device is printed, and kept in the
bundle's manifest as "on_device". It has not been shown here that an engine runs: that takes a GPU.
"""

import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from export.tensorrt.child import in_a_child
from runtime.bundle import MANIFEST, AnyBundle, Bundle, open_bundle
from runtime.cli import Checked, arg, run, table
from runtime.encoder_bundle import EncoderBundle, is_encoder_bundle, open_encoder
from runtime.errors import UserError
from runtime.files import adding_to
from runtime.layout import GATED
from runtime.machine import available_memory

DEFAULT_SM, DEFAULT_CAPACITY, DECODER_ROWS, ENCODER_ROWS = "86,89,120", 1024, 4, 16
EXAMPLES = """examples:
  python -m export.trt build/smollm2-135m-int4                                   an RTX engine, into the bundle
  python -m export.trt build/minilm --rows 32                                    the same of an encoder
  python -m export.trt build/smollm2-135m-int4 --sm 89 --capacity 1024,4096
  python -m export.trt encoder.onnx --shapes input_ids:1x1,1x64,8x512 attention_mask:1x1,1x64,8x512
  python -m export.trt silero_vad.onnx --fix sr=16000 --shapes input:1x512 state:2x1x128
  python -m export.trt build/smollm2-135m-int4 --backend trt                     on a Jetson or a data-centre GPU
  python -m export.trt --list
  python -m export.trt inspect encoder.engine
"""


@dataclass(frozen=True)
class Options(Checked):
    """Compile an ONNX model to TensorRT engines. No GPU is needed for RTX targets."""
    model: Path | None = arg(None, positional=True, help="bundle, a bundle's graph, or any ONNX model")
    out: Path | None = arg(None, short="-o", help="engine file (.gz: compressed) or folder (default: into the bundle, "
                                                  "or beside the model)")
    sm: str = arg("", help=f"compute capabilities, rtx only (default: {DEFAULT_SM})", metavar="86,89,120")
    backend: str | None = arg(None, choices=("rtx", "trt"), help="rtx: ahead of time; trt: for the GPU of this machine "
                                                                 "(default: trt where it and a GPU are, else rtx)")
    capacity: str = arg("", help=f"slots of the KV cache, one engine each (default: {DEFAULT_CAPACITY}, or the model's "
                                 "context where that is less)", metavar="1024,4096", group="decoders")
    rows: int | None = arg(None, help=f"sequences an engine of a bundle runs at once (default: {DECODER_ROWS}, of an "
                                      f"encoder {ENCODER_ROWS})", least=1)
    chunk: int = arg(512, help="prompt tokens of a row in one step, decoders only", least=1, group="decoders")
    one_profile: bool = arg(False, help="decoders: no kernels of their own for decode steps, an engine a sixth smaller "
                                        "that builds in a third of the time", group="decoders")
    shapes: tuple[str, ...] = arg((), help="profile of other models: name:min,opt,max, shapes written as 1x128")
    fix: tuple[str, ...] = arg((), help="inputs of other models to make constant: name=value, as in sr=16000")
    workspace_mb: int | None = arg(None, help="limit of the GPU memory a layer may use while running", least=1)
    timing_cache: Path | None = arg(None, help="file of timings to read and extend, trt only", group="plain TensorRT")
    hardware_compatibility: str | None = arg(None, choices=("ampere_plus", "same_compute_capability"),
                                             help="let the engine run on other GPUs than this one, trt only",
                                             group="plain TensorRT")
    list: bool = arg(False, help="print the targets and dtypes the installed backend builds")
    verbose: bool = arg(False, help="print TensorRT's own log")


@dataclass(frozen=True)
class InspectOptions(Checked):
    """Print the record of an engine, and its layers where a GPU can load it."""
    engine: Path = arg(positional=True, help="engine that export.trt wrote")


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["inspect"]:
        return run(InspectOptions, "inspect", argv[1:])
    return run(Options, "compile", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    given = any(Path(word).exists() for word in sys.argv[1:])            # without a model nothing can crash
    raise SystemExit(in_a_child(main, "export.trt") if given else main())

import onnx

from export.bundle import write_manifest
from export.tensorrt import lint, profiles, record
from export.tensorrt.build import Settings, build, load_backend, predicted_bytes, targets, usual_shapes
from export.tensorrt.model import fix_inputs, load, simplify
from export.tensorrt.sample import Sample

ON_DEVICE = {72: "Jetson Xavier", 87: "Jetson Orin", 90: "H100, H200", 100: "B200", 103: "B300", 110: "Jetson Thor"}
RTX_GPUS = {75: "RTX 20, T4", 80: "A100", 86: "RTX 30, A10", 89: "RTX 40, L4", 120: "RTX 50", 121: "DGX Spark"}


def compile(options: Options) -> None:
    """Build the engines asked for. Raises UserError for input that cannot be used, CheckFailed for a wrong network."""
    backend = options.backend or _present_backend()
    if options.list:
        return print(_listing(backend))
    if options.model is None:
        raise UserError("give a bundle or an ONNX model (or --list)")
    path, bundle = _find(options.model, bool(options.shapes or options.fix))
    wanted, on_device = _targets(backend, options)
    if on_device:
        names = ", ".join(f"SM{t} ({ON_DEVICE[t]})" for t in on_device)
        print(f"{names}: built on the device only, by: {_device_command(options)}")
    if not wanted:
        if bundle:
            with adding_to(bundle.folder):
                write_manifest(bundle.folder, _again(bundle).manifest | {"on_device": _device_command(options, ".")})
        return
    settings = Settings(backend, wanted, options.workspace_mb, options.timing_cache, options.hardware_compatibility,
                        options.verbose)
    model = _read(path, options)[0]
    _refuse_faults(model, path, settings)
    needed, free = predicted_bytes(model, path.parent), available_memory()
    if free is not None and needed > free:
        raise UserError(f"{path}: building it will take about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
                        "free; close other programs, or build on a larger machine")
    for capacity in _capacities(options, model, bundle):
        with adding_to(bundle.folder) if bundle else nullcontext():
            bundle = _again(bundle) if bundle else None
            _one(options, settings, path, bundle, capacity)


def inspect(options: InspectOptions) -> None:
    print(record.inspect(options.engine))


def _one(options: Options, settings: Settings, path: Path, bundle: AnyBundle | None, capacity: int | None) -> None:
    """Build and write the engine of one capacity (None: no decoder's)."""
    model, original = _read(path, options)
    rows = options.rows or (DECODER_ROWS if capacity else ENCODER_ROWS)
    encoder = isinstance(bundle, EncoderBundle)
    if capacity is None:
        shapes = profiles.encoder_profile(model, rows, bundle.max_tokens, path) if encoder else profiles.given_profiles(
            model, options.shapes, path)
        if model is not original and Sample(original, path).agrees(Sample(model, path), usual_shapes(shapes)) is False:
            model = original                    # what the simplification got wrong is not built
    else:
        profiles.fix_dimension(model, "capacity", capacity)
        shapes = profiles.decoder_profiles(model, rows, min(options.chunk, capacity), options.one_profile)
    name = (f"engines/{settings.backend}-sm{'-'.join(map(str, settings.targets))}" if bundle else path.stem) + (
        f"-c{capacity}" if capacity else "") + (".engine.gz" if bundle else ".engine")
    inside = bundle is not None and options.out is None
    out = bundle.folder / name if inside else options.out or path.with_name(name)
    if options.out is not None and out.is_dir():
        out = out / Path(name).name
    record.check_writable(out)
    plan, built = build(model, path, shapes, settings)
    facts = record.record(plan, built, settings, model, path, shapes, capacity)
    facts |= {"fixed": list(options.fix)} if options.fix else {}
    facts |= {"rows": rows, "tokens": bundle.max_tokens} if encoder else {}
    if inside:
        manifest = record.add_to_bundle(bundle, name, plan, facts)
        write_manifest(bundle.folder, manifest | {"on_device": _device_command(options, ".")})
    else:
        record.write(out, plan, facts)
    size, whole = out.stat().st_size, facts["bytes"]
    print(f"{out}: {settings.backend} {facts['version']}, SM {','.join(facts['compute_capabilities'])}, {size / 1e6:.3g} MB"
          f"{f' ({whole / 1e6:.3g} unpacked)' if size != whole else ''}, {facts['build_s']} s, "
          f"peak {facts['peak_rss_mb']} MB; native layers {facts['native_layers'] or 'none'}")
    if bundle and settings.backend == "rtx":
        print(f"on a Jetson or a data-centre GPU: {_device_command(options)}")


def _find(model: Path, given: bool) -> tuple[Path, AnyBundle | None]:
    """The ONNX file meant, and the bundle it belongs to. given: whether shapes or fixed inputs are, of an encoder's as of any model's."""
    if not model.exists():
        raise UserError(f"{model}: no such file or folder; give a bundle or an ONNX model")
    folder = model if model.is_dir() else model.parent
    encoder = (folder / MANIFEST).is_file() and is_encoder_bundle(folder)
    if encoder and not given and model.is_dir():
        bundle = open_encoder(folder)
        return bundle.path(bundle.graph("portable")["file"]), bundle
    if encoder or not (folder / MANIFEST).is_file():
        return _only_graph(model) if model.is_dir() else model, None
    bundle = open_bundle(folder)
    if kinds := GATED.keys() & {layer.get("mixer") for layer in bundle.model["config"]["layers"]}:
        raise UserError(f"{model}: has {kinds.pop().upper()} layers, for which no engine is built: run it on ONNX Runtime, as it is")
    if model.is_file():
        return model, bundle if model.name in bundle.manifest["files"] else None
    graph = bundle.graph("portable")
    if graph is None:
        raise UserError(f"{model}: no portable graph in this bundle; export it with `python -m export.onnx`")
    return bundle.path(graph["file"]), bundle


def _again(bundle: AnyBundle) -> AnyBundle:
    """The bundle as it is now."""
    return (open_encoder if isinstance(bundle, EncoderBundle) else open_bundle)(bundle.folder)


def _only_graph(folder: Path) -> Path:
    """The ONNX model of a folder that is no decoder's bundle: model.onnx, as encoders are exported, or the only one."""
    found = sorted((*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")))
    named = [path for path in found if path.name == "model.onnx"]
    if len(named or found) == 1:
        return (named or found)[0]
    if found:
        raise UserError(f"{folder}: {len(found)} ONNX models in it and no {MANIFEST}; give one of them, for example {found[0]}")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: a checkpoint, which has no graph yet; export it first with `python -m export.onnx {folder} "
                        "-o FOLDER` (an encoder with --task) and give that FOLDER")
    raise UserError(f"{folder}: no {MANIFEST} and no .onnx file in it; give a bundle, an exported encoder's folder or an ONNX model")


def _read(path: Path, options: Options) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The model to build and the one it was before it was simplified: the same where neither options nor it ask for that."""
    model = load(path)
    fix_inputs(model, options.fix)
    branches = any(node.op_type in ("If", "Loop", "Scan") for node in model.graph.node)
    return simplify(model) if options.fix or branches else model, model


def _targets(backend: str, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compute capabilities to build for now, and those left to the device."""
    for name, flag in (("timing_cache", "--timing-cache"), ("hardware_compatibility", "--hardware-compatibility")):
        if backend == "rtx" and getattr(options, name):
            raise UserError(f"{flag} is for --backend trt: TensorRT-RTX times nothing while building and compiles on the "
                            "device")
    known = targets(load_backend(backend))
    if backend == "trt":
        from runtime.cuda_device import present_gpu
        own = present_gpu().compute_capability
        if options.sm and options.sm != str(own):
            raise UserError(f"--sm {options.sm}: --backend trt builds for the GPU of this machine, SM{own}")
        return (own,), ()
    try:
        asked = tuple(dict.fromkeys(int(text.strip().upper().removeprefix("SM").replace(".", ""))
                                    for text in (options.sm or DEFAULT_SM).split(",")))
    except ValueError:
        raise UserError(f"--sm {options.sm}: give compute capabilities with commas between, as in 86,89") from None
    unknown = [t for t in asked if t not in known and t not in ON_DEVICE]
    if unknown:
        raise UserError(f"--sm {unknown[0]}: no such target; TensorRT-RTX builds for {', '.join(map(str, known))}, and "
                        f"{', '.join(map(str, ON_DEVICE))} are built on the device with --backend trt")
    return tuple(t for t in asked if t in known), tuple(t for t in asked if t not in known)


def _refuse_faults(model, path, settings) -> None:
    tensorrt = load_backend(settings.backend)
    log = tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR)
    builder = tensorrt.Builder(log)
    parser = tensorrt.OnnxParser(builder.create_network(0), log)
    faults = lint.lint(model, settings.targets, parser.supports_operator)
    doubts = [] if faults else list(lint.invalid(model, shapes=True))
    if doubts and Sample(model, path).refused:
        faults = doubts
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(f"{path}: TensorRT cannot build this model{more}:\n  " + "\n  ".join(map(str, faults[:5])))
    doubles = [name for name, dtype in lint.types(model).items() if dtype == "DOUBLE"]
    if doubles:
        print(f"note: TensorRT computes in float32 what the model computes in float64 ({doubles[0]})", file=sys.stderr)


def _capacities(options: Options, model: onnx.ModelProto, bundle: Bundle | None) -> list[int | None]:
    """Cache capacities to build for; [None] for a model without a cache."""
    if not profiles.is_decoder(model):
        if options.capacity:
            raise UserError("--capacity is for the decoder of a bundle; this model has no KV cache of ours")
        return [None]
    if options.shapes or options.fix:
        raise UserError(f"{'--shapes' if options.shapes else '--fix'} is for other models: a decoder's shapes follow from "
                        "--capacity, --rows and --chunk")
    context = bundle.max_context if bundle else None
    if not options.capacity:
        return [min(DEFAULT_CAPACITY, context or DEFAULT_CAPACITY)]
    try:
        sizes = [int(text) for text in options.capacity.split(",")]
    except ValueError:
        raise UserError(f"--capacity {options.capacity}: give numbers with commas between, as in 1024,4096") from None
    for size in sizes:
        if size < 1 or context and size > context:
            raise UserError(f"--capacity {size}: the cache must have 1 to {context or 'the context of the model'} slots")
    return sizes


def _device_command(options: Options, model: str | None = None) -> str:
    words = ["python", "-m", "export.trt", model or str(options.model), "--backend", "trt"]
    words += ["--capacity", options.capacity] if options.capacity else []
    words += ["--rows", str(options.rows)] if options.rows else []
    words += ["--one-profile"] if options.one_profile else []
    words += ["--shapes", *options.shapes] if options.shapes else []
    words += ["--fix", *options.fix] if options.fix else []
    return shlex.join(words)


def _present_backend() -> str:
    """trt where plain TensorRT and a GPU are, else rtx."""
    try:
        load_backend("trt")
        return "trt"
    except UserError:
        return "rtx"


def _listing(backend: str) -> str:
    tensorrt = load_backend(backend)
    known = targets(tensorrt)
    if not known:
        return f"{backend} {tensorrt.__version__}: builds for the GPU of this machine only"
    rows = [{"target": f"SM{t}", "GPUs": RTX_GPUS.get(t, ""), "dtypes": ", ".join(lint.dtypes_of(t))} for t in known]
    return table(rows, title=f"{backend} {tensorrt.__version__}, ahead of time, no GPU needed; weights int4 and int8 are "
                             "symmetric")
