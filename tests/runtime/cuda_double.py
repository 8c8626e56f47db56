"""A double of a GPU with ONNX Runtime on it: the same graphs, run on the CPU, by the rules of the CUDA provider.

Addresses on the device are those of ordinary memory, moved by FAR: whoever reads or writes one without CUDA crashes, and whoever gives
CUDA the host's where the device's belongs is told. Copies between the two are counted (`uploads`, `downloads`).

A session records as ONNX Runtime does: for each thread and id, a call that is not recorded runs twice, then once more to be recorded;
from then on the call replays what was recorded: those addresses, those shapes, and the host's numbers as they were. What was bound since
is not looked at.
"""

import contextlib
import threading

import numpy as np
import onnxruntime as real
import pytest
from tensorrt_double import Cuda as NearCuda
from tensorrt_double import memory

FAR = 1 << 60
PROVIDER = "CUDAExecutionProvider"


class Cuda(NearCuda):
    """cuda.bindings.runtime of a device whose memory is far. lost: every call fails from now on."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.uploads, self.downloads, self.lost = [], [], False

    def _recorded(self, name, function):
        call = super()._recorded(name, function)

        def failing(*args):
            return (self.cudaError_t.cudaErrorDevicesUnavailable,) if self.lost else call(*args)
        failing.__name__ = name
        return failing

    def near(self, address, size):
        """Where the bytes of far memory really are."""
        assert address >= FAR, f"{address:#x} is not on the device"
        at = address - FAR
        blocks = self.blocks.copy()                           # other threads allocate and free meanwhile
        assert any(begin <= at and at + size <= begin + length for begin, (_, length) in blocks.items()), "outside of all buffers"
        return at

    def cudaMalloc(self, size):
        address, = super().cudaMalloc(size)
        return (address + FAR,)

    def cudaFree(self, devPtr):
        return super().cudaFree(devPtr - FAR)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        return super().cudaMemsetAsync(self.near(devPtr, count), value, count, stream)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.uploads.append(count)
            dst = self.near(dst, count)
        else:
            self.downloads.append(count)
            src = self.near(src, count)
        assert dst < FAR and src < FAR
        return super().cudaMemcpyAsync(dst, src, count, kind, stream)

    def cudaMemcpy2DAsync(self, dst, dpitch, src, spitch, width, height, kind, stream):
        dst, src = self.near(dst, dpitch * (height - 1) + width), self.near(src, spitch * (height - 1) + width)
        return super().cudaMemcpy2DAsync(dst, dpitch, src, spitch, width, height, kind, stream)


class OnnxRuntime:
    """The module. refuses: the session may not record; breaks: what fails while a step is recorded; on_cpu: it falls to the CPU."""

    SessionOptions, RunOptions, OrtValue, __version__ = real.SessionOptions, real.RunOptions, real.OrtValue, real.__version__

    def __init__(self, cuda, refuses=False, breaks=False, on_cpu=False):
        self.cuda, self.refuses, self.breaks, self.on_cpu = cuda, refuses, breaks, on_cpu
        self.sessions, self.runs, self.replays, self.recordings, self.fail = [], 0, 0, {}, None

    def InferenceSession(self, path, options, providers, enable_fallback):
        (provider, how), = providers
        assert provider == PROVIDER and enable_fallback == 0 and how["user_compute_stream"] == "7"
        if self.refuses and how["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user as all compute graph nodes have not "
                               f"been partitioned to the {PROVIDER}")
        self.sessions.append(_Session(self, real.InferenceSession(path, options, providers=["CPUExecutionProvider"]), how))
        return self.sessions[-1]


class _Session:
    def __init__(self, module, session, how):
        self.module, self.real, self.records = module, session, how["enable_cuda_graph"] == "1"
        self.get_inputs, self.get_outputs, self.counts = session.get_inputs, session.get_outputs, {}

    def get_providers(self):
        return ["CPUExecutionProvider"] if self.module.on_cpu else [PROVIDER, "CPUExecutionProvider"]

    def io_binding(self):
        return _Binding(self)

    def run_with_iobinding(self, binding, options):
        module = self.module
        assert binding.session is self
        if module.fail:
            raise RuntimeError(module.fail)
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        number = int(options.get_run_config_entry("gpu_graph_id"))
        if not self.records or number == -1:
            return self._run(binding.bound)
        key = threading.get_ident(), number
        recording = module.recordings.get(key)
        if recording is None:
            for _ in range(3):
                self._run(binding.bound)
            if module.breaks:
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            # the host's numbers as they are now
            recording = module.recordings[key] = [(*what, at.copy() if isinstance(at, np.ndarray) else at) for *what, at in binding.bound]
        else:
            module.replays += 1
            self._run(recording)

    def _run(self, bound):
        self.module.runs += 1
        io = self.real.io_binding()
        for kind, name, dtype, shape, at in bound:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            pointer = at.ctypes.data if isinstance(at, np.ndarray) else self.module.cuda.near(at, size)
            getattr(io, kind)(name, "cpu", 0, dtype, shape, pointer)
        self.real.run_with_iobinding(io)


class _Binding:
    """What is bound: (kind, name, dtype, shape, address on the device or array on the host)."""

    def __init__(self, session):
        self.session, self.bound = session, []

    def _bind(self, kind, name, device, number, dtype, shape, pointer):
        assert number == 0 and (device == "cuda") == (pointer >= FAR), f"{name} is bound to memory of the other side"
        at = pointer if device == "cuda" else memory(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
        self.bound.append((kind, name, dtype, shape, at))

    def bind_input(self, *args):
        self._bind("bind_input", *args)

    def bind_output(self, *args):
        self._bind("bind_output", *args)


def opened(bundle, cuda=None, **how):
    """(CudaBackend over the double, the double's module)."""
    from runtime.cuda_backend import CudaBackend
    cuda = cuda or Cuda()
    options = {name: how.pop(name) for name in ("threads", "role") if name in how}
    module = OnnxRuntime(cuda, **how)
    return CudaBackend(bundle, onnxruntime=module, cuda=cuda, **options), module




@contextlib.contextmanager
def cuda_is_there():
    """Engines with provider="cuda" have the double."""
    from runtime import backends
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._OPEN, "cuda", lambda bundle, threads: opened(bundle, threads=threads)[0])
        yield
