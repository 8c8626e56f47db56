"""The reference backend: a bundle's graph on ONNX Runtime, on the CPU or, with onnxruntime-gpu, on an NVIDIA GPU.

Which graph: "fast" (ONNX Runtime's fused attention and norms) where the bundle has it, else "portable". `exact=True`
takes the portable one and keeps ONNX Runtime from fusing quantized weights into its int8 kernels: slow, and equal to
PyTorch up to float32 rounding. It is what `export.verify` holds the graph's arithmetic against.

The cache is one buffer [rows, kv_heads, capacity, head_dim] per layer and key or value, ours, and bound as past and as
present at once, so that a step writes its slots in place. Rows are outermost: a view of some rows is a pointer into
the same buffer. Pages of a CPU cache that hold no token yet take no memory. A step copies nothing: inputs, caches and
logits are bound once for a view and a shape, and each call only writes the few numbers of its inputs. The states of recurrent
layers are in memory twice and bound in turn, one copy as past and the other as present: rows whose present copies differ are brought
to the same side first.

On a GPU, `fork`, `grow` and states pass through host memory; they are correct, not fast.

A session is freed with the last reference, and a call that runs and every binding hold one, so it cannot be closed
under them. A thread that is in a call when the interpreter ends would abort the process; so the end waits for it. ONNX
Runtime's threads do not live on in the child of a fork, where whatever waits for them waits for ever: there every call
is refused, no session is freed, and the process ends by C's `_exit`, without ONNX Runtime's own end (or any other C
library's).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import mmap
import os
import sys
import time
import weakref

import numpy as np

from .backend import Cache, States
from .bundle import Bundle
from .capabilities import BACKENDS, check_runs
from .errors import DeviceError, Unavailable, UserError, pip_line
from .layout import CHUNK
from .machine import cpu_threads, has_vnni
from .onnx_files import check_external_data
from .tensors import check_tensors

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_MOST_BINDINGS = 8                # shapes a view remembers; a decoding sequence uses one, or two with states
_NO_MEMORY = "no memory for a KV cache of {} on {}: {}; use fewer or shorter sequences"


class OrtBackend:
    """See `runtime.backend.Backend`. Raises Unavailable where onnxruntime, the device or the graph cannot be had.

    role: "portable" or "fast" insists on that graph. threads: of the CPU's pool; None: all CPUs available to the process.
    """

    def __init__(self, bundle: Bundle, *, provider: str = "cpu", threads: int | None = 1, exact: bool = False,
                 role: str | None = None):
        threads = cpu_threads(threads)
        check_runs("onnx", check_tensors(bundle), bundle.folder)
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable(f"onnxruntime cannot be imported ({error}); {pip_line('cpu')}, or [gpu] for an NVIDIA "
                              "GPU") from None
        if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
            raise Unavailable(f"the installed onnxruntime {onnxruntime.__version__} has no {provider.upper()} provider; "
                            "install onnxruntime-gpu in place of onnxruntime")
        graph = _choose_graph(bundle, exact, role)
        if provider == "cpu" and graph.get("dtype", "fp32") not in BACKENDS["onnx"].dtypes:
            raise Unavailable(f"ONNX Runtime's CPU lacks most operators of {graph['dtype']}")
        check_external_data(bundle, graph["file"])
        self.name = f"onnxruntime-{provider}"
        self.graph = graph["file"]
        self._device = provider
        self._onnxruntime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3            # errors; what ORT warns of here is by design
        # Neither an arena that grows by powers of two nor one block for a step's activations: 5 to 9 MB less at the peak.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if not has_vnni():                        # there, sums of uint8 x int8 saturate unless ONNX Runtime is told
            options.add_session_config_entry("session.x64quantprecision", "1")
        if exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(bundle.path(graph["file"])), options,
                                                         providers=[_PROVIDERS[provider]])
        except Exception as error:                # one class per ORT status, with no useful common one
            damaged = type(error).__name__ in ("InvalidProtobuf", "NoSuchFile")
            raise (UserError if damaged else Unavailable)(f"{bundle.path(graph['file'])}: ONNX Runtime cannot load it: {error}") from None
        if self._session.get_providers()[0] != _PROVIDERS[provider]:
            raise Unavailable(f"onnxruntime found no usable {provider.upper()} device (driver or libraries missing)")
        try:
            inputs = {i.name: i for i in self._session.get_inputs()}
            self._caches = [(name, name.replace("past_", "present_", 1), i.shape[1], i.shape[3], i.shape[2])
                            for name, i in inputs.items() if name.startswith(("past_key.", "past_value."))]
            self._states = [(name, name.replace("past_", "present_", 1), tuple(i.shape[1:]))
                            for name, i in inputs.items() if name.startswith(("past_conv.", "past_state."))]
            self._dtype = _DTYPES[inputs[self._caches[0][0]].type] if self._caches or not self._states else np.float32
            self._vocab = next(o.shape[2] for o in self._session.get_outputs() if o.name == "logits")
            sizes = [*(size for cache in self._caches for size in cache[2:4]), *(size for _, _, shape in self._states for size in shape)]
            bad = [size for size in sizes if not isinstance(size, int) or size < 1]
        except (IndexError, KeyError, StopIteration, UnicodeDecodeError):
            bad = True
        if bad or self._vocab != bundle.model["config"]["vocab_size"]:
            raise UserError(f"{bundle.path(graph['file'])}: its inputs and outputs are not those of this model; export the bundle again")
        self._token_inputs = [name for name in _Binding.TOKEN_INPUTS if name in inputs]
        self.max_chunk_rows = 1 if graph["role"] == "fast" else None
        self.chunk = CHUNK if self._states else None
        self._forks = _forks
        _sessions.add(self._session)

    @property
    def session(self):
        """The session, while it can run. Raises DeviceError where the backend was closed, UserError in the child of a fork."""
        session = self._session
        if session is None or _ending:
            raise DeviceError("this backend was closed; open the bundle again")
        if self._forks != _forks:
            raise UserError("the bundle was opened before this process was forked, and ONNX Runtime does not work in the child; "
                            "open it in the child, or use the native core")
        return session

    def cache_bytes(self, rows: int, capacity: int) -> int:
        slot = sum(heads * size for _, _, heads, size, _ in self._caches) * np.dtype(self._dtype).itemsize
        return rows * (capacity * slot + sum(2 * 4 * math.prod(shape) for _, _, shape in self._states))

    def new_cache(self, rows: int, capacity: int) -> OrtCache:
        fixed = self._caches[0][4] if self._caches else None
        if isinstance(fixed, int) and fixed != capacity:
            raise UserError(f"{self.graph} has a cache of {fixed} slots fixed in it; {capacity} cannot be had")
        buffers = [self.allocate(rows, heads, capacity, size) for _, _, heads, size, _ in self._caches]
        states = [_zeros((2, rows, *shape), np.float32) for _, _, shape in self._states]
        return OrtCache(self, buffers, capacity, np.zeros(rows, np.int64), 0, States(states) if states else None)

    def allocate(self, *shape: int) -> np.ndarray:
        """A zeroed cache buffer: numpy's on the CPU, an OrtValue on a device. Raises UserError or DeviceError out of memory."""
        zeros = _zeros(shape, self._dtype)
        try:
            return zeros if self._device == "cpu" else self._onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self._device, 0)
        except (MemoryError, RuntimeError) as error:
            raise DeviceError(_NO_MEMORY.format(shape, self._device, error)) from None

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: OrtCache, counts: np.ndarray | None = None) -> np.ndarray:
        tokens, states = input_ids.shape[1], cache.states
        if states and tokens > self.chunk:
            raise UserError(f"{self.graph} takes at most {self.chunk} tokens of a row in one call, not {tokens}")
        counts = np.full(cache.rows, tokens) if counts is None else counts
        binding = cache.binding(tokens, logits_positions.shape[1], states.on_one_side(write_index) if states else 0)
        for name, array in zip(_Binding.TOKEN_INPUTS, (input_ids, position_ids, write_index, logits_positions, counts)):
            getattr(binding, name)[...] = array
        if self._device != "cpu":
            binding.bind_inputs()                 # for a device, binding is what copies
        try:
            _running.add(binding)
            session = self.session
            with self.told():
                session.run_with_iobinding(binding.io)
                if self._device != "cpu":
                    binding.io.synchronize_outputs()
        finally:
            _running.discard(binding)
        if states:
            states.end(write_index, counts)
        return binding.logits

    @contextlib.contextmanager
    def told(self):
        """ONNX Runtime's errors as ours: a graph that cannot run is damaged, and what fails on a device may run elsewhere."""
        try:
            yield
        except Exception as error:                # one class per ORT status, with no useful common one
            reason = " ".join(str(error).split())
            if self._device == "cpu":
                raise UserError(f"{self.graph}: ONNX Runtime cannot run it: {reason}; export the bundle again, or ask for fewer or "
                                "shorter sequences where memory is short") from None
            raise DeviceError(f"ONNX Runtime failed on {self._device}: {reason}") from None

    def close(self) -> None:
        """Free the session with the last call that runs and the last cache that has run; no other call begins."""
        self._session = None


_forks = 0                        # of this process and those it comes from
_sessions = weakref.WeakSet()
_running: set[_Binding] = set()
_ending = False                   # the interpreter


def _after_fork() -> None:
    global _forks
    _forks += 1
    _running.clear()
    for session in _sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    libc = ctypes.CDLL(None)
    if "onnxruntime" in sys.modules and hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)            # called with the exit status, before what was registered earlier


def _at_exit() -> None:
    global _ending
    _ending = True
    until = time.monotonic() + 10                 # an exception of a signal may have left one there that does not run
    while _running and time.monotonic() < until:
        time.sleep(0.001)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


class OrtCache(Cache):
    """Its storage is a list of buffers, one for each of the backend's past inputs."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._bindings: dict[tuple[int, int, int], _Binding] = {}

    def _copy_slots(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for buffer in self.storage:
            array = _read(buffer)
            array[self.start + target, :, :length] = array[self.start + source, :, :length]
            _write(buffer, array)

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        parts = [np.ascontiguousarray(_read(buffer)[self.start + row, :, first:stop]).view(np.uint8).ravel() for buffer in self.storage]
        return np.concatenate(parts, out=out)

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        for buffer in self.storage:
            array = _read(buffer)
            part = array[self.start + row, :, first:stop]
            part[...] = data[:part.nbytes].view(array.dtype).reshape(part.shape)
            _write(buffer, array)
            data = data[part.nbytes:]

    def grow(self, capacity: int) -> None:
        for i, buffer in enumerate(self.storage):           # one at a time, so that only one exists twice
            rows, heads, old, size = _shape(buffer)
            larger = self.backend.allocate(rows, heads, capacity, size)
            array = _read(larger)
            array[:, :, :old] = _read(buffer)
            _write(larger, array)
            self.storage[i] = larger
        self.capacity = capacity
        self._bindings.clear()

    def binding(self, tokens: int, positions: int, side: int) -> _Binding:
        """The binding for inputs [rows, tokens] and logits of `positions` a row, made on first use. side: the copy of the states
        that is read."""
        key = tokens, positions, side
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) == _MOST_BINDINGS:
                self._bindings.clear()
            binding = self._bindings[key] = _Binding(self, *key)
        return binding


class _Binding:
    """Every input and output of the session, bound to memory for one view and one shape."""

    TOKEN_INPUTS = ("input_ids", "position_ids", "write_index", "logits_positions", "counts")

    def __init__(self, cache: OrtCache, tokens: int, positions: int, side: int):
        backend, rows = cache.backend, cache.rows
        self.input_ids = np.zeros((rows, tokens), np.int64)
        self.position_ids = np.zeros((rows, tokens), np.int64)
        self.write_index = np.zeros(rows, np.int64)
        self.logits_positions = np.zeros((rows, positions), np.int64)
        self.counts = np.zeros(rows, np.int64)
        self.logits = np.empty((rows, positions, backend._vocab), np.float32)
        self.session = backend.session            # which `io` points into
        arrays = cache.states.arrays if cache.states else []
        self._inputs = {name: getattr(self, name) for name in backend._token_inputs}
        self._inputs |= {past: array[side] for (past, _, _), array in zip(backend._states, arrays)}
        self._buffers = [*cache.storage, *arrays]           # the pointers' owners
        with backend.told():
            self.io = self.session.io_binding()
            self.bind_inputs()
            for (_, present, _), array in zip(backend._states, arrays):
                self.io.bind_output(present, "cpu", 0, np.float32, array.shape[1:], array[1 - side].ctypes.data)
            self.io.bind_output("logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)
            for (past, present, heads, size, _), buffer in zip(backend._caches, self._buffers):
                capacity = _shape(buffer)[2]
                pointer = _pointer(buffer) + cache.start * heads * capacity * size * np.dtype(backend._dtype).itemsize
                memory = backend._device, 0, backend._dtype, (rows, heads, capacity, size), pointer
                self.io.bind_input(past, *memory)
                self.io.bind_output(present, *memory)

    def bind_inputs(self) -> None:
        for name, array in self._inputs.items():
            self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros in a mapping of their own: unlike the heap's, its pages take memory only once they are written to."""
    try:
        return np.frombuffer(mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    except (OSError, MemoryError, OverflowError) as error:
        raise UserError(_NO_MEMORY.format(shape, "cpu", error)) from None


# A cache buffer is a numpy array, or an OrtValue on a device.

def _shape(buffer) -> tuple[int, ...]:
    return tuple(buffer.shape if isinstance(buffer, np.ndarray) else buffer.shape())


def _pointer(buffer) -> int:
    return buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data_ptr()


def _read(buffer) -> np.ndarray:
    return buffer if isinstance(buffer, np.ndarray) else buffer.numpy()


def _write(buffer, array: np.ndarray) -> None:
    if not isinstance(buffer, np.ndarray):
        buffer.update_inplace(array)


def _choose_graph(bundle: Bundle, exact: bool, role: str | None) -> dict:
    roles = [role] if role else ["portable", "fast"] if exact else ["fast", "portable"]
    for wanted in roles:
        if graph := bundle.graph(wanted):
            return graph
    raise Unavailable(f"{bundle.folder}: no {' or '.join(roles)} graph for ONNX Runtime in this bundle; "
                    f"`python -m export.{'ort' if role == 'fast' else 'onnx'}` adds it")
