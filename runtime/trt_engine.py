"""Choose, load and run the TensorRT engines of a bundle: those made for this GPU by the library version installed here.

Every reason why an engine does not fit is an Unavailable with that reason, so that the runtime can step down and say why.
"""

import gzip
import importlib
import zlib
from pathlib import Path

from .bundle import AnyBundle
from .cuda_device import Device, Gpu
from .errors import DeviceError, Unavailable, UserError, pip_line

MOST_PACKED = 64                  # times that a compressed engine grows at most; weights do not shrink, text does
NO_ENGINE = "the bundle has no TensorRT engine; `python -m export.trt` adds one"
MODULES, EXTRAS = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}, {"rtx": "rtx", "trt": "gpu"}


def fitting_engines(bundle: AnyBundle, gpu: Gpu, modules: dict | None = None) -> tuple[object, list[dict]]:
    """The TensorRT module, and manifest entries of engines it can load on `gpu`, smallest capacity first
    (of an encoder's, which have none: as the manifest has them).

    modules: backend -> module, in place of those installed. Raises Unavailable with the reason of every engine refused.
    """
    reasons, fitting = [], {}
    for entry in bundle.manifest["engines"]:
        backend, capabilities = entry["backend"], entry["compute_capabilities"]
        try:
            module = modules[backend] if modules else _import(backend)
        except Unavailable as error:
            reasons.append(f"{entry['file']}: {error}")
            continue
        if str(gpu.compute_capability) not in capabilities:
            reasons.append(f"{entry['file']} is for SM {', '.join(capabilities)}, {gpu.name} is SM "
                           f"{gpu.compute_capability}")
        elif entry["version"] != module.__version__:
            reasons.append(f"{entry['file']} was built by {MODULES[backend]} {entry['version']}, installed is "
                           f"{module.__version__}")
        else:
            fitting.setdefault(backend, (module, []))[1].append(entry)
    if not fitting:
        raise Unavailable("; ".join(dict.fromkeys(reasons)) or NO_ENGINE)
    module, entries = next(iter(fitting.values()))
    return module, sorted(entries, key=lambda entry: entry.get("capacity", 0))


def read_plan(path: Path, unpacked_bytes: int | None = None) -> bytes:
    """The serialized engine of a file, decompressed where its name ends in .gz.

    unpacked_bytes: its size as the manifest says; None: unknown. No more than that is unpacked, nor than any engine needs.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        most = path.stat().st_size * MOST_PACKED
        limit = most if unpacked_bytes is None else min(unpacked_bytes, most)
        with gzip.open(path) as file:
            data = file.read(max(0, limit) + 1)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"{path}: the engine cannot be read ({error}); build it again with `python -m export.trt`") from None
    if len(data) > limit or unpacked_bytes not in (None, len(data)):
        raise UserError(f"{path}: the engine does not unpack to the {limit} bytes that it should have; build it again with "
                        "`python -m export.trt`")
    return data


def load_plan(tensorrt, plan: bytes, path: Path):
    """An engine ready for execution contexts. Raises DeviceError with what TensorRT says against it."""
    try:
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR))
    except Exception as error:                    # pybind11 raises TypeError where the library finds no driver
        raise DeviceError(f"TensorRT finds no usable GPU or driver ({error})") from None
    if hasattr(runtime, "get_engine_validity"):   # TensorRT for RTX
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == tensorrt.EngineValidity.INVALID:
            found = [name for name, flag in tensorrt.EngineInvalidityDiagnostics.__members__.items()
                     if int(diagnostics) & int(flag.value)]
            raise DeviceError(f"{path}: TensorRT refuses the engine: {', '.join(found) or 'invalid'}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DeviceError(f"{path}: TensorRT could not load the engine (corrupt, of another version, or too little GPU "
                          "memory)")
    return engine


def new_context(engine, device: Device, path: Path, index: int, name: str):
    """An execution context of one profile, its number and name. Raises DeviceError."""
    context = engine.create_execution_context()
    if context is None:
        raise DeviceError(f"{path}: the GPU has too little memory to run the engine")
    if not context.set_optimization_profile_async(index, int(device.stream)):
        raise DeviceError(f"{path}: the profile {name} cannot be set")
    return context


def bind(context, path: Path, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    """The inputs' shapes, and where inputs and outputs are on the device. Raises DeviceError."""
    if not all([context.set_input_shape(name, shape) for name, shape in shapes.items()]
               + [context.set_tensor_address(name, address) for name, address in addresses.items()]):
        raise DeviceError(f"{path}: TensorRT refused a shape or an address")


def queue_step(context, device: Device, path: Path) -> None:
    """Queue a run of what is bound. Raises DeviceError."""
    if not context.execute_async_v3(int(device.stream)):
        raise DeviceError(f"{path}: TensorRT could not run a step")


def _import(backend: str):
    try:
        return importlib.import_module(MODULES[backend])
    except KeyError:
        raise Unavailable(f"unknown engine backend {backend!r}") from None
    except (ImportError, OSError) as error:
        raise Unavailable(f"{MODULES[backend]} cannot be loaded ({error}); {pip_line(EXTRAS[backend])}") from None
