"""CUDA's runtime through ctypes, for machines without cuda-python: onnxruntime-gpu brings libcudart, and no bindings of it.

    cuda = CudaRuntime()                 # in the place of the module cuda.bindings.runtime
    error, address = cuda.cudaMalloc(1 << 20)

Only what cuda_device.py calls, called alike: each function takes what goes in and gives (error, *what comes out). Tested against the
bindings' own names and numbers and a double of the library; it has never run on a GPU.
"""

import ctypes
from types import SimpleNamespace

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12")
_int, _size, _pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_OUT = {                             # of each function, what comes out; CUDA takes pointers to it, first of all but for one function
    "cudaSetDevice": (), "cudaDeviceGetAttribute": (_int,), "cudaMemGetInfo": (_size, _size), "cudaStreamCreateWithFlags": (_pointer,),
    "cudaStreamDestroy": (), "cudaStreamSynchronize": (), "cudaMalloc": (_pointer,), "cudaFree": (), "cudaMallocHost": (_pointer,),
    "cudaFreeHost": (), "cudaMemsetAsync": (), "cudaMemcpyAsync": (), "cudaMemcpy2DAsync": (), "cudaStreamBeginCapture": (),
    "cudaStreamEndCapture": (_pointer,), "cudaGraphInstantiate": (_pointer,), "cudaGraphDestroy": (), "cudaGraphExecDestroy": (),
    "cudaGraphLaunch": ()}
_IN = {"cudaSetDevice": (_int,), "cudaDeviceGetAttribute": (_int, _int), "cudaMemGetInfo": (), "cudaStreamCreateWithFlags": (_int,),
       "cudaMalloc": (_size,), "cudaMallocHost": (_size,), "cudaMemsetAsync": (_pointer, _int, _size, _pointer),
       "cudaMemcpyAsync": (_pointer, _pointer, _size, _int, _pointer),
       "cudaMemcpy2DAsync": (_pointer, _size, _pointer, _size, _size, _size, _int, _pointer), "cudaStreamBeginCapture": (_pointer, _int),
       "cudaGraphInstantiate": (_pointer, ctypes.c_ulonglong), "cudaGraphLaunch": (_pointer, _pointer)}     # of others, one pointer
_PROPERTIES = 4096                   # bytes, four times what the structure has; it begins with the name


class CudaRuntime:
    """See above. Raises OSError where there is no such library."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self):
        self._library = _load()
        self._library.cudaGetErrorName.restype = ctypes.c_char_p
        for name, out in _OUT.items():
            setattr(self, name, self._function(name, out, _IN.get(name, (_pointer,))))

    def _function(self, name: str, out: tuple, into: tuple):
        function, pointers = getattr(self._library, name), tuple(map(ctypes.POINTER, out))
        last = name == "cudaStreamEndCapture"
        function.restype, function.argtypes = _int, [*into, *pointers] if last else [*pointers, *into]

        def call(*args):
            found = [kind() for kind in out]
            places = [ctypes.byref(value) for value in found]
            error = function(*args, *places) if last else function(*places, *args)
            return self._error(error), *(value.value for value in found)
        call.__name__ = name
        return call

    def cudaGetDeviceProperties(self, device: int):
        """(error, an object with the GPU's name)."""
        structure = ctypes.create_string_buffer(_PROPERTIES)
        error = self._library.cudaGetDeviceProperties(structure, device)
        return self._error(error), SimpleNamespace(name=structure.value)

    def _error(self, number: int) -> int:
        return number if number == 0 else _Error(number, self._library.cudaGetErrorName(number).decode())


class _Error(int):
    def __new__(cls, number: int, name: str):
        made = super().__new__(cls, number)
        made.name = name
        return made


def _load() -> ctypes.CDLL:
    """The first library that is there: onnxruntime has loaded one, or the loader finds it."""
    for name in _LIBRARIES[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(_LIBRARIES[-1])
