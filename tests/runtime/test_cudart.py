"""CUDA's runtime through ctypes: the bindings' own numbers and parameters, and a device's work over a double of the library."""

import ctypes
import re

import numpy as np
import pytest
from cuda.bindings import runtime as real

from runtime import cuda_device, cudart
from runtime.cuda_device import Block, Device
from runtime.errors import DeviceError

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


class Function:
    """One of a library: it converts what it is given by `argtypes`, as ctypes does."""

    def __init__(self, work):
        self.work, self.argtypes, self.restype = work, None, None

    def __call__(self, *args):
        if self.argtypes is not None:
            assert len(args) == len(self.argtypes)
            args = [arg._obj if hasattr(arg, "_obj") else kind(arg).value for kind, arg in zip(self.argtypes, args)]
        return self.work(*args) or 0


class Library:
    """libcudart over ordinary memory. fail: a function that reports an error."""

    def __init__(self):
        self.fail, self.live = None, set()

    def __getattr__(self, name):
        work = getattr(type(self), f"do_{name}", lambda self, *args: 0)
        made = Function(lambda *args: 2 if self.fail == name else work(self, *args))
        setattr(self, name, made)
        return made

    def do_cudaGetErrorName(self, number):
        return {2: b"cudaErrorMemoryAllocation"}[number]

    def do_cudaDeviceGetAttribute(self, value, attribute, device):
        value.value = {75: 9, 76: 0}[attribute]

    def do_cudaGetDeviceProperties(self, structure, device):
        structure.value = b"Double"

    def do_cudaMemGetInfo(self, free, total):
        free.value, total.value = 5, 8

    def do_cudaStreamCreateWithFlags(self, stream, flags):
        assert flags == real.cudaStreamNonBlocking
        stream.value = 7

    def do_cudaMalloc(self, address, size):
        address.value = libc.malloc(size)
        self.live.add(address.value)
    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, address):
        self.live.remove(address)
        libc.free(address)
    do_cudaFreeHost = do_cudaFree

    def do_cudaMemsetAsync(self, address, value, count, stream):
        ctypes.memset(address, value, count)

    def do_cudaMemcpyAsync(self, target, source, count, kind, stream):
        assert stream == 7 and kind in (1, 2)
        ctypes.memmove(target, source, count)

    def do_cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(cudart, "_load", lambda: made)
    return made


@pytest.mark.parametrize("group", ["cudaDeviceAttr", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"])
def test_numbers_are_the_bindings(group):
    for name, value in vars(getattr(cudart.CudaRuntime, group)).items():
        assert value == int(getattr(getattr(real, group), name)), name
    assert cudart.CudaRuntime.cudaStreamNonBlocking == real.cudaStreamNonBlocking


@pytest.mark.parametrize("name", cudart._OUT)
def test_what_goes_in_is_what_the_bindings_take(name):
    signature = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__).group(1)
    given = [part for part in signature.split(",") if part.strip()]
    assert len(given) == len(cudart._IN.get(name, (ctypes.c_void_p,))), signature


def test_a_device_works_over_it(library, monkeypatch):
    monkeypatch.setattr(cuda_device.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no bindings")))
    device = Device()
    assert (device.gpu.name, device.gpu.compute_capability, device.free_memory(), device.stream) == ("Double", 90, 5, 7)
    block = Block(device, {"a": ((3, 4), np.int64), "b": ((5,), np.float16)})
    block.host["a"][:], block.host["b"][:] = np.arange(12).reshape(3, 4), 2
    block.upload()
    device.copy_blocks(block.addresses["a"], 32, block.addresses["a"] + 32, 32, 16, 2)         # the first halves of rows 1 and 2, a row up
    device.zero(block.addresses["b"], 4)
    block.host["a"][:] = block.host["b"][:] = -1
    block.download()
    assert block.host["a"].tolist() == [[4, 5, 2, 3], [8, 9, 6, 7], [8, 9, 10, 11]] and block.host["b"].tolist() == [0, 0, 2, 2, 2]
    library.fail = "cudaMalloc"
    with pytest.raises(DeviceError, match="cudaErrorMemoryAllocation in cudaMalloc, 1.0 MB"):
        device.allocate(1_000_000)
    library.fail = None
    del block
    assert not library.live


def test_the_real_library_says_what_the_bindings_say():
    try:
        cuda = cudart.CudaRuntime()
    except OSError as error:
        pytest.skip(str(error))
    error, = cuda.cudaSetDevice(0)
    assert error == 0 or error.name == real.cudaSetDevice(0)[0].name


def test_neither_bindings_nor_library(monkeypatch):
    monkeypatch.setattr(cudart.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: no such file")))
    monkeypatch.setattr(cuda_device.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no bindings")))
    with pytest.raises(DeviceError, match="cuda-python cannot be loaded .*; pip install cuda-python"):
        Device()
