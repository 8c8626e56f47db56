"""Build a TensorRT engine from an ONNX model, checking after parsing that the network is the model.

One builder serves two libraries with nearly one Python API: `rtx` (tensorrt_rtx) compiles ahead of time for a list of
compute capabilities and needs no GPU; `trt` (tensorrt) compiles for the GPU it runs on, as on a Jetson or in a data
centre. Networks are strongly typed: the dtypes of the ONNX model decide, there are no precision flags.

The checks fail the build (CheckFailed) where the network differs from the model: an input that nothing reads, an input
or output of another name, dtype or shape, a RotaryEmbedding, TensorScatter or Attention that did not become its native
layer. Models declare wrong outputs, so where a declaration differs from the network, ONNX's inference and a run on ONNX
Runtime say which of the two is wrong; a wrong declaration is a note.
"""

import collections
import contextlib
import functools
import importlib
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from export.tensorrt.model import external_files, inferred, inputs, shape_of, tensors
from export.tensorrt.sample import Sample
from export.tensorrt.words import sentence
from models.progress import progress
from runtime.errors import CheckFailed, UserError, pip_line
from runtime.files import write

MODULES = {"rtx": ("tensorrt_rtx", pip_line("rtx")),
           "trt": ("tensorrt", f"{pip_line('gpu')}, on the machine that has the GPU")}
NATIVE_LAYERS = {"RotaryEmbedding": "ROTARY_EMBEDDING", "TensorScatter": "KV_CACHE_UPDATE",
                 "Attention": "ATTENTION_INPUT"}
DTYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT8": "INT8", "INT32": "INT32", "INT64": "INT64",
          "BOOL": "BOOL", "UINT8": "UINT8", "FLOAT8E4M3FN": "FP8", "INT4": "INT4", "FLOAT4E2M1": "FP4"}
# Peak resident memory of a build, above what was measured by 15 to 40% on dense networks of 134 to 537 MB (three times
# the weights), all-MiniLM-L6-v2 and SmolLM2 (whose kernels are many: 1.2 GB for 90 MB of weights).
BASE_BYTES, BYTES_PER_NODE, BYTES_PER_WEIGHT_BYTE = 400 << 20, 700_000, 3.3

Shape = tuple[int, ...]
Profiles = dict[str, dict[str, tuple[Shape, Shape, Shape]]]        # of an engine, by name: least, usual and largest shape of each input


@dataclass(frozen=True)
class Settings:
    """Builder settings; `targets` are compute capabilities (86 for 8.6), for `trt` the GPU's own."""

    backend: str = "rtx"
    targets: tuple[int, ...] = (86, 89, 120)
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: str | None = None
    verbose: bool = False


def load_backend(name: str):
    """The TensorRT module of a backend. Raises UserError where it is not installed or finds no GPU it needs."""
    module, install = MODULES[name]
    try:
        tensorrt = importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"--backend {name}: {module} cannot be loaded ({error}); {install}") from None
    if name == "trt":
        try:
            tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR))
        except Exception as error:
            raise UserError(f"--backend trt: TensorRT found no NVIDIA GPU or driver here ({error}); run this on the "
                            "device, or build for RTX GPUs with --backend rtx") from None
    return tensorrt


def targets(tensorrt) -> tuple[int, ...]:
    """Compute capabilities that the library builds for ahead of time; () where it builds for the present GPU only."""
    members = getattr(tensorrt, "ComputeCapability", None)
    return tuple(sorted(int(n[2:]) for n in members.__members__ if n.startswith("SM"))) if members else ()


def predicted_bytes(model: onnx.ModelProto, folder: Path) -> int:
    """Peak memory a build of `model` will take, rounded up."""
    inside = sum(t.ByteSize() for t in tensors(model.graph))
    outside = sum((folder / name).stat().st_size for name in external_files(model))
    return int(BASE_BYTES + BYTES_PER_NODE * len(model.graph.node) + BYTES_PER_WEIGHT_BYTE * (inside + outside))


def usual_shapes(profiles: Profiles) -> dict[str, Shape]:
    return {name: usual for shapes in profiles.values() for name, (_, usual, _) in shapes.items()}


def build(model: onnx.ModelProto, path: Path, profiles: Profiles, settings: Settings) -> tuple[bytes, dict]:
    """Parse `model` (external data beside `path`), check it, and build an engine for `settings.targets`.

    Returns the engine, and for its record: seconds, layers of the parsed network by type, ONNX operators that became native
    layers. Raises UserError (TensorRT refuses the model, with its words), CheckFailed (the network differs from the model) and
    KeyboardInterrupt (Ctrl-C stops the builder at its next step).
    """
    tensorrt = load_backend(settings.backend)
    log = _logger(tensorrt, settings.verbose)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(path)):
        error = parser.get_error(0) if parser.num_errors else None          # those behind it follow from it
        operator = error and (error.node_operator() or error.func().removeprefix("import"))
        raise UserError(f"{path}: " + (sentence(error.desc(), model, error.node_name(), operator) if error else
                                       "TensorRT cannot read it and gives no reason; try a simplified export"))
    layers = collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    native = check_network(model, network, path, usual_shapes(profiles))
    for tensor in map(network.get_input, range(network.num_inputs)):
        if tensor.is_shape_tensor:
            raise UserError(f"{path}: {tensor.name}: the values of this input decide shapes, and an engine is built for "
                            f"given ones; fix it with --fix {tensor.name}=VALUE")
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == tensorrt.LayerType.ATTENTION_INPUT:     # where no fused kernel fits (fp32): several kernels
            layer.__class__ = tensorrt.IAttentionInputLayer
            layer.attention.decomposable = True
    config = _config(tensorrt, builder, network, profiles, settings)
    started = time.perf_counter()
    with _interruptible(tensorrt) as config.progress_monitor:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{path}: {sentence(log.errors[-1], model)}")
    if settings.timing_cache:
        write(settings.timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan), {"build_s": round(time.perf_counter() - started, 2), "layers": dict(sorted(layers.items())),
                         "native_layers": native}


def check_network(model: onnx.ModelProto, network, path: Path, shapes: dict[str, Shape]) -> dict[str, int]:
    """Hold a parsed network against its model; returns how many operators became native layers.

    path: of the model. shapes: the shapes to run it with, of inputs that are not fixed. Raises CheckFailed naming every
    difference; outputs that the model itself declares wrongly are printed, and corrected in `model`.
    """
    sample = functools.cache(lambda: Sample(model, path))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    got_inputs = [network.get_input(i) for i in range(network.num_inputs)]
    got_outputs = [network.get_output(i) for i in range(network.num_outputs)]
    read = {x.name for layer in layers for x in map(layer.get_input, range(layer.num_inputs)) if x is not None}
    read |= {x.name for x in got_outputs}
    faults = [f"nothing reads the input {x.name}" for x in got_inputs
              if x.name not in read and not sample().ignores(x.name, shapes)]
    for kind, expected, got in (("input", inputs(model).values(), got_inputs), ("output", model.graph.output, got_outputs)):
        if [e.name for e in expected] != [g.name for g in got]:
            faults.append(f"the {kind}s are {[g.name for g in got]}, not {[e.name for e in expected]}")
            continue
        for e, g in zip(expected, got):
            differs = _difference(e, g)
            if differs and kind == "output" and _is_true(g, model, sample, shapes):
                print(f"note: {path} declares its output {e.name} wrongly: it is {differs}", file=sys.stderr)
                declared = next(onnx_name for onnx_name, name in DTYPES.items() if name == g.dtype.name)
                e.CopyFrom(onnx.helper.make_tensor_value_info(e.name, getattr(TensorProto, declared),
                                                              [None if d < 0 else d for d in g.shape]))
            elif differs:
                maker = next((f" from {n.name} ({n.op_type})" for n in model.graph.node if e.name in n.output), "")
                faults.append(f"the {kind} {e.name}{maker} is {differs}")
    operators = collections.Counter(node.op_type for node in model.graph.node)
    types = collections.Counter(layer.type.name for layer in layers)
    for operator, layer in NATIVE_LAYERS.items():
        if operators[operator] != types[layer]:
            faults.append(f"{types[layer]} of {operators[operator]} {operator} became {layer} layers")
    if faults:
        raise CheckFailed(f"{path}: the parsed network is not the model: " + "; ".join(faults))
    return {operator: types[layer] for operator, layer in NATIVE_LAYERS.items() if operators[operator]}


def _difference(info: onnx.ValueInfoProto, tensor) -> str:
    """How a network's tensor differs from what the model says of it: "FLOAT, not HALF"; "" where it does not."""
    dtype = DTYPES.get(TensorProto.DataType.Name(info.type.tensor_type.elem_type))
    shape, found = shape_of(info), [] if tensor.dtype.name == dtype else [f"{tensor.dtype.name}, not {dtype}"]
    if shape is not None and (len(shape) != len(tensor.shape) or any(
            isinstance(a, int) and b not in (a, -1) for a, b in zip(shape, tensor.shape))):
        found.append(f"{tuple(tensor.shape)}, not {shape}")
    return "; ".join(found)


def _is_true(tensor, model, sample, shapes) -> bool:
    """Whether a network's output is what the model computes, whatever the model declares."""
    output = (sample().run(shapes) or {}).get(tensor.name)
    if output is None:
        info = next(o for o in inferred(model).graph.output if o.name == tensor.name)
        return shape_of(info) is not None and not _difference(info, tensor)
    return not _difference(onnx.helper.make_tensor_value_info(
        tensor.name, onnx.helper.np_dtype_to_tensor_dtype(output.dtype), output.shape), tensor)


def _config(tensorrt, builder, network, profiles, settings):
    config = builder.create_builder_config()
    if settings.backend == "rtx":
        config.num_compute_capabilities = len(settings.targets)
        for i, target in enumerate(settings.targets):
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, f"SM{target}"), i)
    if settings.workspace_mb:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, settings.workspace_mb << 20)
    if settings.hardware_compatibility:
        level = getattr(tensorrt.HardwareCompatibilityLevel, settings.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    if settings.timing_cache:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    for title, shapes in profiles.items():
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in shapes.items():
            profile.set_shape(name, least, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"TensorRT refuses the profile {title}: {shapes}")
    return config


def _logger(tensorrt, verbose: bool):
    """A logger that keeps errors for the message and prints only when asked."""
    class Logger(tensorrt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = ["it gave no reason"]

        def log(self, severity, text):
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors.append(text)
            if verbose:
                print(f"[{severity.name}] {text}", file=sys.stderr)
    return Logger()


@contextlib.contextmanager
def _interruptible(tensorrt):
    """A monitor through which TensorRT feeds a progress bar, and a Ctrl-C asks the builder to stop at its next step.

    Python handles signals between its own instructions, and the builder runs none for seconds; its progress reports
    are where a signal is seen.
    """
    stop, bar = threading.Event(), progress(label="building", unit="step", leave=False)

    class Monitor(tensorrt.IProgressMonitor):
        def __init__(self):
            super().__init__()

        def phase_start(self, phase, parent, steps):
            if parent is None:
                bar.total = (bar.total or 0) + steps
                bar.set_description_str(phase[:40])

        def step_complete(self, phase, step):
            bar.update()
            return not stop.is_set()

        def phase_finish(self, phase):
            pass

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set()) if main else None
    try:
        yield Monitor()
    finally:
        bar.close()
        if main:
            signal.signal(signal.SIGINT, previous)
    if stop.is_set():
        raise KeyboardInterrupt
