"""The part of CUDA that the backends of a GPU need, through cuda-python or cudart.py: one stream, buffers, copies, graphs.

Addresses are ints, sizes bytes. Copies and launches are queued on the one stream, in order, and finish at
`synchronize`. Every failure is a `DeviceError` with CUDA's own name for it. Pinned host memory is what a queued copy
from or to numpy needs. The stream does not wait for the default one, on which a library may work while a graph is recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import threading
from dataclasses import dataclass

import numpy as np

from .errors import DeviceError

_ALIGNMENT = 256                  # bytes that libraries want addresses to be a multiple of


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: int           # 86 for 8.6


class Device:
    """The first CUDA device and one stream on it. Raises DeviceError where there is none."""

    def __init__(self, cuda=None):
        self.cuda = cuda or _import_cuda()
        try:
            self._call(self.cuda.cudaSetDevice, 0)
        except DeviceError as error:
            raise DeviceError(f"no NVIDIA GPU or driver that CUDA can use is here ({error})") from None
        attributes = self.cuda.cudaDeviceAttr
        major, minor = (self._call(self.cuda.cudaDeviceGetAttribute, a, 0) for a in (
            attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor))
        name = self._call(self.cuda.cudaGetDeviceProperties, 0).name
        self.gpu = Gpu(name.decode() if isinstance(name, bytes) else str(name), 10 * int(major) + int(minor))
        self.stream = self._call(self.cuda.cudaStreamCreateWithFlags, self.cuda.cudaStreamNonBlocking)
        self.turn = threading.RLock()             # of whoever queues what belongs together

    def free_memory(self) -> int:
        """Bytes of the device that nobody has."""
        return int(self._call(self.cuda.cudaMemGetInfo, many=True)[0])

    def allocate(self, size: int) -> int:
        try:
            return int(self._call(self.cuda.cudaMalloc, size))
        except DeviceError as error:
            raise DeviceError(f"{error}, {size / 1e6:.1f} MB") from None

    def free(self, address: int) -> None:
        self._call(self.cuda.cudaFree, address)

    def pinned(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array in page-locked memory; give it to `unpin` when done."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self._call(self.cuda.cudaMallocHost, size))
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def unpin(self, array: np.ndarray) -> None:
        address, _ = array.__array_interface__["data"]        # `array.ctypes` would import, which the interpreter's end forbids
        self._call(self.cuda.cudaFreeHost, address)

    def zero(self, address: int, size: int) -> None:
        self._call(self.cuda.cudaMemsetAsync, address, 0, size, self.stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of a pinned array to the device."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self.cuda.cudaMemcpyAsync, address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue a copy from the device to a pinned array."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self.cuda.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy_blocks(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, count: int) -> None:
        """Queue copies of `count` blocks of `width` bytes on the device, each a pitch after the last."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self.cuda.cudaMemcpy2DAsync, target, target_pitch, source, source_pitch, width, count, kind, self.stream)

    def synchronize(self) -> None:
        self._call(self.cuda.cudaStreamSynchronize, self.stream)

    def capture(self, work) -> Graph:
        """Record what `work()` queues, without running it."""
        self._call(self.cuda.cudaStreamBeginCapture, self.stream,
                   self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            self.cuda.cudaStreamEndCapture(self.stream)      # a failed capture must be ended too
            raise
        graph = self._call(self.cuda.cudaStreamEndCapture, self.stream)
        try:
            return Graph(self, self._call(self.cuda.cudaGraphInstantiate, graph, 0))
        finally:
            self._call(self.cuda.cudaGraphDestroy, graph)

    def close(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            self._call(self.cuda.cudaStreamDestroy, stream)

    def __del__(self):
        with contextlib.suppress(DeviceError, AttributeError):       # the device is gone, or there was none
            self.close()

    def _call(self, function, *args, many: bool = False):
        """Call CUDA; its functions return (error, *results)."""
        error, *results = function(*args)
        if error != self.cuda.cudaError_t.cudaSuccess:
            raise DeviceError(f"the GPU failed: {error.name} in {function.__name__}")
        return results if many else results[0] if results else None


class Graph:
    """A CUDA graph ready to launch, freed with the last reference."""

    def __init__(self, device: Device, handle):
        self._device, self._handle = device, handle

    def launch(self) -> None:
        self._device._call(self._device.cuda.cudaGraphLaunch, self._handle, self._device.stream)

    def __del__(self):
        with contextlib.suppress(DeviceError):    # the device is gone, and what was on it
            self._device._call(self._device.cuda.cudaGraphExecDestroy, self._handle)


class Block:
    """Arrays side by side on the device, and their images side by side in pinned memory: one copy moves them all.

    arrays: name -> (shape, dtype). host: the images, unless `image` is False; addresses: of the arrays on the device. Freed with the
    last reference.
    """

    def __init__(self, device: Device, arrays: dict[str, tuple[tuple[int, ...], object]], image: bool = True):
        offsets, end = {}, 0
        for name, (shape, dtype) in arrays.items():
            offsets[name], end = end, end + -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self.arrays, self._device, self._address = arrays, device, device.allocate(end)
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        if image:
            self._flat = device.pinned((end,), np.uint8)
            self.host = {name: self._flat[offsets[name]:][:math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
                         for name, (shape, dtype) in arrays.items()}

    def upload(self) -> None:
        """Queue the copy of all images to the device."""
        self._device.upload(self._address, self._flat)

    def download(self) -> None:
        """Queue the copy of all arrays from there."""
        self._device.download(self._flat, self._address)

    def __del__(self):
        for free, part in (("free", "_address"), ("unpin", "_flat")):
            with contextlib.suppress(DeviceError, AttributeError):   # the device is gone, or had no memory for both
                getattr(self._device, free)(getattr(self, part))


def present_gpu() -> Gpu:
    """The GPU of this machine. Raises DeviceError where there is none."""
    device = Device()
    device.close()
    return device.gpu


def _import_cuda():
    """cuda-python's bindings, or what does the same with the library that onnxruntime-gpu brings."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        from .cudart import CudaRuntime
        try:
            return CudaRuntime()
        except OSError:
            raise DeviceError(f"cuda-python cannot be loaded ({error}); pip install cuda-python") from None
