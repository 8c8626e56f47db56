"""Choose the backend that runs a bundle: a TensorRT engine that fits the GPU and the library, else CUDA, else the CPU:
the native core, or ONNX Runtime ("cpu") where the core was not built or lacks what the bundle needs.

Each step down is logged once, in one line with its reason; `Engine.explain()` repeats them. One that fails while running
(no memory on the device, or a request beyond an engine's capacity) is stepped down from in the same way, for good: an
engine does not climb again. A named provider is insisted on instead: its reason is raised.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

from runtime.backend import Backend
from runtime.bundle import Bundle
from runtime.errors import UserError

PROVIDERS = ("tensorrt", "cuda", "native", "cpu")           # best first
_log = logging.getLogger(__name__)


def open_backend(bundle: Bundle, provider: str | None, threads: int,
                 below: str | None = None, native: dict | None = None) -> tuple[Backend, list[str]]:
    """The best backend that can be had, and the lines that explain it.

    provider: one of PROVIDERS to insist on, or None. below: consider only what comes after this provider, which has
    failed while running. native: more options of NativeBackend. Raises UserError where `provider`, or every one of them, cannot be had.
    """
    if provider is not None and provider not in PROVIDERS:
        raise UserError(f"provider is {provider!r}; known: {', '.join(PROVIDERS)}")
    options = {"native": native or {}}
    if provider is not None:
        backend = _OPEN[provider](bundle, threads, **options.get(provider, {}))
        return backend, [f"{backend.name} runs {backend.graph} ({threads} CPU threads)"]
    explanation = []
    for name in PROVIDERS[PROVIDERS.index(below) + 1 if below else 0:]:
        try:
            backend = _OPEN[name](bundle, threads, **options.get(name, {}))
            return backend, [f"{backend.name} runs {backend.graph} ({threads} CPU threads)", *explanation]
        except UserError as error:
            if name == PROVIDERS[-1]:
                raise
            explanation.append(step_down(name, error))
    raise UserError(f"there is no backend below {below}")


def provider_of(backend: Backend) -> str:
    """The provider that a backend was opened as."""
    return backend.name.removeprefix("onnxruntime-")


def step_down(provider: str, error: UserError) -> str:
    """Log that `provider` is passed over; returns the line."""
    line = f"no {provider}: {error}"
    _log.info(line)
    return line


def _open_tensorrt(bundle: Bundle, threads: int) -> Backend:
    from runtime.trt_backend import TrtBackend
    return TrtBackend(bundle)


def _open_cuda(bundle: Bundle, threads: int) -> Backend:
    try:                              # before onnxruntime, whose import takes 20 MB
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError("this machine has no NVIDIA driver (libcuda.so.1 cannot be loaded)") from None
    from runtime.ort_backend import OrtBackend
    return OrtBackend(bundle, provider="cuda", threads=threads)


def _open_native(bundle: Bundle, threads: int, **options) -> Backend:
    from runtime.native.backend import NativeBackend
    return NativeBackend(bundle, threads=threads, **options)


def _open_cpu(bundle: Bundle, threads: int) -> Backend:
    from runtime.ort_backend import OrtBackend
    return OrtBackend(bundle, provider="cpu", threads=threads)


_OPEN: dict[str, Callable[..., Backend]] = {
    "tensorrt": _open_tensorrt, "cuda": _open_cuda, "native": _open_native, "cpu": _open_cpu}
