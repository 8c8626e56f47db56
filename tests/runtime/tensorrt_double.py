"""A double of TensorRT and of the CUDA runtime: records the calls, and computes what an engine would on the CPU.

"Device" memory is ordinary memory, so that every copy really happens; an engine is its ONNX file, run by ONNX Runtime
on the bytes at the addresses it was given. Names and parameters are the real modules': `test_trt_backend.py` holds
them against the installed `tensorrt_rtx` and `cuda.bindings`.
"""

import ctypes
import json

import numpy as np
import onnxruntime
import tensorrt_rtx as real
from cuda.bindings import runtime as real_cuda

VERSION = real.__version__
DTYPES = {"tensor(float)": (real.DataType.FLOAT, np.float32), "tensor(float16)": (real.DataType.HALF, np.float16),
          "tensor(int64)": (real.DataType.INT64, np.int64)}


def memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)


class Cuda:
    """cuda.bindings.runtime, as far as the runtime uses it. fail: names of functions that report `error`;
    allowed: how many cudaMalloc may still succeed (None: any number)."""

    cudaError_t, cudaDeviceAttr = real_cuda.cudaError_t, real_cuda.cudaDeviceAttr
    cudaMemcpyKind, cudaStreamCaptureMode = real_cuda.cudaMemcpyKind, real_cuda.cudaStreamCaptureMode
    cudaStreamNonBlocking = real_cuda.cudaStreamNonBlocking

    def __init__(self, compute_capability=89, fail=(), error="cudaErrorMemoryAllocation"):
        self.calls, self.blocks, self.pinned, self.recording = [], {}, {}, None
        self.capability, self.fail, self.error, self.allowed = compute_capability, set(fail), error, None
        for name in [n for n in dir(type(self)) if n.startswith("cuda") and callable(getattr(self, n))
                     and not isinstance(getattr(type(self), n), type)]:
            setattr(self, name, self._recorded(name, getattr(self, name)))

    def _recorded(self, name, function):
        def call(*args):
            self.calls.append((name, args))
            if name == "cudaMalloc" and self.allowed is not None:
                self.allowed -= 1
            if name in self.fail or name == "cudaMalloc" and self.allowed is not None and self.allowed < 0:
                return (getattr(self.cudaError_t, self.error),)
            return self.cudaError_t.cudaSuccess, *function(*args)
        call.__name__ = name
        return call

    def queue(self, work):
        """Do it now, or record it where a graph is being captured."""
        self.recording.append(work) if self.recording is not None else work()

    def cudaSetDevice(self, device):
        return ()

    def cudaDeviceGetAttribute(self, attr, device):
        major = attr == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return (self.capability // 10 if major else self.capability % 10,)

    def cudaGetDeviceProperties(self, device):
        return (type("Properties", (), {"name": b"Double"})(),)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        return (7,)

    def cudaMemGetInfo(self):
        return 8 << 30, 16 << 30

    def cudaStreamDestroy(self, stream):
        return ()

    def cudaStreamSynchronize(self, stream):
        return ()

    def _allocate(self, owner, size):
        buffer = ctypes.create_string_buffer(b"\xff" * (size + 255), size + 256)     # NaN, as fresh memory may be
        address = -(-ctypes.addressof(buffer) // 256) * 256
        owner[address] = buffer, size
        return (address,)

    def cudaMalloc(self, size):
        return self._allocate(self.blocks, size)

    def cudaFree(self, devPtr):
        del self.blocks[devPtr]
        return ()

    def cudaMallocHost(self, size):
        return self._allocate(self.pinned, size)

    def cudaFreeHost(self, ptr):
        del self.pinned[ptr]
        return ()

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        self.queue(lambda: memory(devPtr, count).fill(value))
        return ()

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        self.queue(lambda: ctypes.memmove(dst, src, count))
        return ()

    def cudaMemcpy2DAsync(self, dst, dpitch, src, spitch, width, height, kind, stream):
        assert width <= dpitch and width <= spitch
        self.queue(lambda: [ctypes.memmove(dst + i * dpitch, src + i * spitch, width) for i in range(height)])
        return ()

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return ()

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return (graph,)

    def cudaGraphInstantiate(self, graph, flags):
        return (graph,)

    def cudaGraphDestroy(self, graph):
        return ()

    def cudaGraphExecDestroy(self, graphExec):
        return ()

    def cudaGraphLaunch(self, graphExec, stream):
        for work in graphExec:
            work()
        return ()


class TensorRT:
    """The module. plan: JSON of {"onnx": path, "capacity": slots}, or of an encoder {"onnx": path, "largest": [rows, tokens]}."""

    EngineValidity, EngineInvalidityDiagnostics, Logger, TensorIOMode = (
        real.EngineValidity, real.EngineInvalidityDiagnostics, real.Logger, real.TensorIOMode)

    def __init__(self, cuda, version=VERSION, invalid=0, refuse=(), driver=True):
        self.__version__, self.cuda, self.invalid, self.refuse = version, cuda, invalid, set(refuse)
        module, self.calls = self, []

        class BoundRuntime(Runtime):
            def __init__(self, logger):
                if not driver:
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                super().__init__(module)
        self.Runtime = BoundRuntime


class Runtime:
    def __init__(self, module):
        self.module = module

    def get_engine_validity(self, buffer):
        bad = bool(self.module.invalid)
        return (real.EngineValidity.INVALID if bad else real.EngineValidity.VALID), self.module.invalid

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            return None if "deserialize" in self.module.refuse else Engine(self.module, json.loads(serialized_engine))
        except ValueError:
            return None


class Engine:
    def __init__(self, module, plan):
        self.module, self.capacity, self.largest = module, plan.get("capacity"), plan.get("largest")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.tensors = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return real.TensorIOMode.INPUT if name in {i.name for i in self.session.get_inputs()} else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DTYPES[self.tensors[name].type][0]

    def get_tensor_shape(self, name):
        return [self.capacity if d == "capacity" else d if isinstance(d, int) else -1 for d in self.tensors[name].shape]

    def create_execution_context(self):
        return None if "context" in self.module.refuse else Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.module, self.shapes, self.addresses, self.profile = engine, engine.module, {}, {}, None

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile = profile_index
        return "profile" not in self.module.refuse

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return self.engine.largest is None or all(1 <= size <= most for size, most in zip(shape, self.engine.largest))

    def get_tensor_shape(self, name):
        known = {}
        for i in self.engine.session.get_inputs():
            known |= dict(zip(i.shape, self.shapes[i.name]))
        return [known.get(d, d) for d in self.engine.tensors[name].shape]

    def set_tensor_address(self, name, memory):
        assert memory % 256 == 0, f"{name} at {memory}"
        self.addresses[name] = memory
        return True

    def is_stream_capturable(self, stream):
        return "capture" not in self.module.refuse

    def execute_async_v3(self, stream_handle):
        self.module.calls.append((self.profile, dict(self.shapes), dict(self.addresses), self.module.cuda.recording is not None))
        if "execute" in self.module.refuse:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.module.cuda.queue(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes, addresses):
        feeds = {i.name: _at(addresses[i.name], shapes[i.name], DTYPES[i.type][1])
                 for i in self.engine.session.get_inputs()}
        names = [o.name for o in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feeds)):
            if name.startswith(("present_key.", "present_value.")):       # an engine updates the cache in place only where both are one
                assert addresses[name] == addresses[name.replace("present_", "past_", 1)]
            _at(addresses[name], value.shape, value.dtype)[...] = value


def _at(address, shape, dtype):
    return memory(address, int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
