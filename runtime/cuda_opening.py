"""What ONNX Runtime needs on a machine with an NVIDIA GPU, and what is missing of it: each a sentence with its mend.

    onnxruntime = usable_onnxruntime()           # the module, its CUDA libraries loaded; raises Unavailable
    options, provider = settings(...)            # of a session

Where a library is missing, ONNX Runtime logs a line and goes to the CPU; so everything is looked at before a session is made. The
libraries come as wheels, in whose folders the loader does not look: `onnxruntime.preload_dlls` loads them from there, and prints what
it does not find. One of CUDA 13 runs on every driver for 13.x, and on none before.
"""

import contextlib
import ctypes
import importlib
import io
import re

from .errors import Unavailable

PROVIDER = "CUDAExecutionProvider"
_MISSING = re.compile(r"Failed to load (\S+?\.so[.\d]*)")


def find_driver() -> ctypes.CDLL:
    """The NVIDIA driver's library. Raises Unavailable where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Unavailable("this machine has no NVIDIA driver (libcuda.so.1 cannot be loaded)") from None


def usable_onnxruntime():
    """The module onnxruntime, of onnxruntime-gpu, with the libraries of CUDA that it needs. Raises Unavailable with what is missing."""
    driver = find_driver()            # before onnxruntime, whose import takes 20 MB
    installed = {name: found for name in ("onnxruntime", "onnxruntime-gpu") if (found := _installed(name))}
    if len(installed) == 2 and len({folder for _, folder in installed.values()}) == 1:      # the files of the last on top
        both = " and ".join(f"{name} {version}" for name, (version, _) in installed.items())
        raise Unavailable(f"{both} are both installed, and overwrite each other; pip uninstall -y onnxruntime onnxruntime-gpu, then "
                          "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except (ImportError, OSError) as error:
        raise Unavailable(f"onnxruntime cannot be imported ({error}); pip install 'onnxruntime-gpu[cuda,cudnn]'") from None
    if PROVIDER not in onnxruntime.get_available_providers():
        raise Unavailable(f"the installed onnxruntime {onnxruntime.__version__} has no CUDA provider; install onnxruntime-gpu in place of "
                          "onnxruntime: pip uninstall -y onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'")
    built_for = getattr(onnxruntime, "cuda_version", "")
    check_driver(driver, built_for, f"onnxruntime-gpu {onnxruntime.__version__}")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        onnxruntime.preload_dlls(directory="")    # the wheels' folders, then where the loader looks
    if missing := dict.fromkeys(_MISSING.findall(told.getvalue())):
        raise Unavailable(f"onnxruntime-gpu {onnxruntime.__version__} lacks {', '.join(missing)} of CUDA {built_for or 'and cuDNN'}; "
                          f"pip install 'onnxruntime-gpu[cuda,cudnn]=={onnxruntime.__version__}' brings what is missing")
    return onnxruntime


def check_driver(driver: ctypes.CDLL, built_for: str, whose: str) -> None:
    """Raises Unavailable where the driver is older than the CUDA that `whose` was built for ("13.0"; "": nobody knows)."""
    version = ctypes.c_int(0)
    if not built_for or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return
    major, minor = version.value // 1000, version.value % 1000 // 10
    if major < int(built_for.split(".")[0]):
        raise Unavailable(f"the NVIDIA driver is too old: it runs CUDA {major}.{minor} at most, and {whose} was built for CUDA {built_for}; "
                          "update the driver, or install a build for its CUDA")


def settings(onnxruntime, threads: int, stream: int, record: bool):
    """(SessionOptions, provider) of a session on `stream`. record: its runs may be recorded as CUDA graphs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Weights go to memory of their own, not into an arena that has grown for them by powers of two.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    provider = {"device_id": "0", "user_compute_stream": str(int(stream)), "arena_extend_strategy": "kSameAsRequested",
                "enable_cuda_graph": str(int(record))}
    return options, (PROVIDER, provider)


def _installed(package: str) -> tuple[str, str] | None:
    """(version, folder) of an installed package; None: it is not."""
    from importlib import metadata
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    return found.version, str(found.locate_file(""))
