"""Where a stage computes: `--device`, what is free there, and a device's failures as sentences.

    with computing_on(options.device) as device:            # "auto", "cpu", "cuda" or "cuda:1"
        ...

auto is the first GPU that PyTorch can use, else the CPU. Memory that does not suffice is told with the bytes that were asked
for, a device that is lost with what to do: what a stage has finished by then stays, and the same command goes on from there.
"""

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from runtime.cli import Checked, arg
from runtime.errors import DeviceError, UserError
from runtime.machine import available_memory

DRIVER_TOO_OLD = re.compile(r"driver on your system is too old \(found version (\d+)\)")
# Memory that does not suffice as CUDA and its libraries say it, which allocate beside PyTorch.
NO_MEMORY = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CU(SOLVER|DNN)_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Checked):
    device: str = arg("auto", help="where to compute: auto (a GPU where there is one), cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"--device is {self.device!r}, which should be auto, cpu, cuda or cuda:N")


def find_device(asked: str = "auto"):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N". Raises UserError where there is no such one, with the reason."""
    import torch
    if asked == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as told:           # PyTorch only warns of a driver it cannot use
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if asked == "auto":
            return torch.device("cpu")
        raise UserError(f"--device {asked}: {_why_no_gpu(torch, ' '.join(str(warning.message) for warning in told))}")
    number = int(asked.partition(":")[2] or 0)
    if number >= count:
        raise UserError(f"--device {asked}: this machine has {count} GPU{'s' * (count > 1)}, from cuda:0 on")
    return torch.device("cuda", number)


def _why_no_gpu(torch, warned: str) -> str:
    if torch.version.cuda is None:
        return (f"the installed PyTorch {torch.__version__} is built without CUDA: install the build for your CUDA version, or leave "
                "--device out")
    if found := DRIVER_TOO_OLD.search(warned):
        version = int(found[1])
        return (f"the NVIDIA driver is too old: it serves CUDA {version // 1000}.{version % 1000 // 10}, and PyTorch {torch.__version__} "
                f"needs {torch.version.cuda}: update the driver, or install PyTorch for the older CUDA")
    reason = " ".join(warned.split()) or "no NVIDIA GPU or driver"
    return f"PyTorch {torch.__version__} finds no GPU here ({reason}): leave --device out to compute on the CPU"


@contextmanager
def computing_on(asked: str = "auto") -> Iterator:
    """The device, with its failures inside the block told as UserError (too little memory) or DeviceError (lost)."""
    device = find_device(asked)
    with told_of_the_device(device), _current(device):
        yield device


def _current(device):
    """Makes it the device that PyTorch takes where none is named: else page-locked memory would have a context on the first GPU."""
    import torch
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def told_of_the_device(device) -> Iterator[None]:
    """Turns what PyTorch raises of a device into sentences."""
    import torch
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.AcceleratorError) and not short_of_memory(error):
            raise
        if not short_of_memory(error):
            reason = str(error).strip().splitlines()[0]
            raise DeviceError(f"{device} failed ({reason}): what was finished is kept, run the same command again (of a training run with "
                              "--resume)") from None
        try:
            free = free_bytes(device)
        except RuntimeError:                    # of a device that answers nothing any more
            free = None
        asked = re.search(r"Tried to allocate ([\d.]+ [KMGT]i?B)", str(error))
        raise UserError(f"{device} has too little memory: {asked[1] if asked else 'more'} asked for"
                        + (f" with {free / 1e9:.2f} GB free" if free is not None else "")
                        + ": free memory there, choose a smaller batch or fewer windows, or --device cpu") from None


def short_of_memory(error: RuntimeError) -> bool:
    """Whether that is what PyTorch's error says of a device, its own or one of CUDA's libraries."""
    import torch
    return isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)) is not None


def free_bytes(device) -> int | None:
    """Bytes that can still be allocated on a device, PyTorch's own reserve counted; None: unknown."""
    import torch
    if device.type == "cpu":
        return available_memory()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def has_bf16(device) -> bool:
    """Whether a CPU or a GPU multiplies in bfloat16."""
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def prefers_bf16(device) -> bool:
    """Whether bfloat16 is worth choosing unasked: on a GPU that has it, and a CPU with AMX tiles (AVX-512's instructions alone may be
    slower than float32)."""
    import torch
    return has_bf16(device) and (device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16")))


def smaller(rows: int, work: Callable[[int], object]):
    """(work(n), n) for the largest n of rows, rows/2, .., 1 whose memory suffices. Raises the last error where 1 does not."""
    import torch
    while True:
        try:
            return work(rows), rows
        except RuntimeError as error:
            if rows == 1 or not short_of_memory(error):
                raise
        gc.collect()                            # outside of the except: there the frames still hold tensors
        torch.cuda.empty_cache()
        rows //= 2
