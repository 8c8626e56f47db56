"""Choose the backend that runs a bundle: a TensorRT engine that fits the GPU and the library, else CUDA, else the CPU:
the native core, or ONNX Runtime ("cpu") where the core was not built or lacks what the bundle needs.

A backend is passed over where something it needs is not there (`errors.Unavailable`); a user's mistake is raised instead.
Each step down is logged once, in one line with its reason; `Engine.explain()` repeats them. One that fails while running
(no memory on the device, or a request beyond an engine's capacity) is stepped down from in the same way, for good: an
engine does not climb again. A named provider is insisted on instead: its reason is raised.
"""

import logging
from collections.abc import Callable

from .backend import Backend
from .bundle import Bundle
from .errors import Unavailable, UserError
from .machine import cpu_threads
from .native.backend import NativeBackend, check_cache_dtype

PROVIDERS = ("tensorrt", "cuda", "native", "cpu")           # best first
_log = logging.getLogger(__name__)


def open_backend(bundle: Bundle, provider: str | None, threads: int | None, below: str | None = None,
                 native: dict | None = None, cpu: dict | None = None) -> tuple[Backend, list[str]]:
    """The best backend that can be had, and the lines that explain it.

    provider: one of PROVIDERS to insist on, or None. threads: of the CPU; None: all that are available. below: consider
    only what comes after this provider, which has failed while running. native, cpu: more options of NativeBackend, and of
    OrtBackend on the CPU.
    Raises UserError for a mistake, whichever backend finds it or would have run: an unknown provider, a number of threads or an option
    that is none, a damaged bundle. Raises Unavailable where `provider`, or every one of them, cannot be had.
    """
    if provider is not None and provider not in PROVIDERS:
        raise UserError(f"provider is {provider!r}; known: {', '.join(PROVIDERS)}")
    threads, native, cpu = cpu_threads(threads), native or {}, cpu or {}
    check_cache_dtype(native.get("cache_dtype"))
    given = " and ".join(name for name, value in native.items() if value and name != "meanwhile")
    if given and provider not in (None, "native"):
        raise UserError(f"{given}: the native core's alone, and provider={provider!r} is asked for; leave out one of them")
    explanation = []
    for name in [provider] if provider else PROVIDERS[PROVIDERS.index(below) + 1 if below else 0:]:
        try:
            backend = _OPEN[name](bundle, threads, **{"native": native, "cpu": cpu}.get(name, {}))
        except Unavailable as error:
            if provider:
                raise
            explanation.append(step_down(name, error))
            continue
        if given and name != "native":
            explanation.append(f"{given}: without effect here, since {name} has none")
            _log.info(explanation[-1])
        how = getattr(backend, "how", None) or f"{getattr(backend, 'threads', threads)} CPU threads"
        return backend, [f"{backend.name} runs {backend.graph} ({how})", *explanation]
    raise Unavailable("; ".join(explanation[::-1]) or f"there is no backend below {below}")


def provider_of(backend: Backend) -> str:
    """The provider that a backend was opened as."""
    return backend.name.removeprefix("onnxruntime-")


def step_down(provider: str, error: Unavailable) -> str:
    """Log that `provider` is passed over; returns the line."""
    line = f"no {provider}: {error}"
    _log.info(line)
    return line


def _open_tensorrt(bundle: Bundle, threads: int) -> Backend:
    from .trt_backend import TrtBackend
    return TrtBackend(bundle)


def _open_cuda(bundle: Bundle, threads: int) -> Backend:
    from .cuda_opening import find_driver
    find_driver()                     # most machines have none: before anything is read
    from .cuda_backend import CudaBackend
    return CudaBackend(bundle, threads=threads)


def _open_onnxruntime(bundle: Bundle, threads: int, **options) -> Backend:
    from .ort_backend import OrtBackend
    return OrtBackend(bundle, threads=threads, **options)


_OPEN: dict[str, Callable[..., Backend]] = {
    "tensorrt": _open_tensorrt, "cuda": _open_cuda,
    "native": lambda bundle, threads, **options: NativeBackend(bundle, threads=threads, **options),
    "cpu": _open_onnxruntime}
