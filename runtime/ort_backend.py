"""The reference backend: a bundle's graph on ONNX Runtime, on the CPU.

Which graph: "fast" (ONNX Runtime's fused attention and norms) where the bundle has it, else "portable". `exact=True`
takes the portable one and keeps ONNX Runtime from fusing quantized weights into its int8 kernels: slow, and equal to
PyTorch up to float32 rounding. It is what `export.verify` holds the graph's arithmetic against.

The cache is one buffer [rows, kv_heads, capacity, head_dim] per layer and key or value, ours, and bound as past and as
present at once, so that a step writes its slots in place. Rows are outermost: a view of some rows is a pointer into
the same buffer. Pages of a cache that hold no token yet take no memory. A step copies nothing: inputs, caches and
logits are bound once for a view and a shape, and each call only writes the few numbers of its inputs. The states of recurrent
layers are in memory twice and bound in turn, one copy as past and the other as present: rows whose present copies differ are brought
to the same side first. How a session ends is told in ort_session.py.
"""

from __future__ import annotations

import math
import mmap

import numpy as np

from .backend import Cache, States
from .bundle import Bundle
from .capabilities import BACKENDS, check_runs
from .errors import Unavailable, UserError, pip_line
from .layout import CHUNK
from .machine import cpu_threads, has_vnni
from .ort_session import OrtSession, choose_graph
from .tensors import check_tensors

_MOST_BINDINGS = 8                # shapes a view remembers; a decoding sequence uses one, or two with states


class OrtBackend:
    """See `runtime.backend.Backend`. Raises Unavailable where onnxruntime or the graph cannot be had.

    role: "portable" or "fast" insists on that graph. threads: of the CPU's pool; None: all CPUs available to the process.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, *, threads: int | None = 1, exact: bool = False, role: str | None = None):
        threads = cpu_threads(threads)
        check_runs("onnx", check_tensors(bundle), bundle.folder)
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable(f"onnxruntime cannot be imported ({error}); {pip_line('cpu')}, or [gpu] for an NVIDIA "
                              "GPU") from None
        graph = choose_graph(bundle, [role] if role else ["portable", "fast"] if exact else ["fast", "portable"])
        if graph.get("dtype", "fp32") not in BACKENDS["onnx"].dtypes:
            raise Unavailable(f"ONNX Runtime's CPU lacks most operators of {graph['dtype']}")
        self.graph = graph["file"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Neither an arena that grows by powers of two nor one block for a step's activations: 5 to 9 MB less at the peak.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if not has_vnni():                        # there, sums of uint8 x int8 saturate unless ONNX Runtime is told
            options.add_session_config_entry("session.x64quantprecision", "1")
        if exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.opened = OrtSession(bundle, graph, onnxruntime, options, ("CPUExecutionProvider", {}))
        self.max_chunk_rows = 1 if graph["role"] == "fast" else None
        self.chunk = CHUNK if self.opened.states else None

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return rows * (capacity * self.opened.slot_bytes() + self.opened.state_bytes())

    def new_cache(self, rows: int, capacity: int) -> OrtCache:
        opened = self.opened
        fixed = opened.caches[0][4] if opened.caches else None
        if isinstance(fixed, int) and fixed != capacity:
            raise UserError(f"{self.graph} has a cache of {fixed} slots fixed in it; {capacity} cannot be had")
        buffers = [_zeros((rows, heads, capacity, size), opened.dtype) for _, _, heads, size, _ in opened.caches]
        states = [_zeros((2, rows, *shape), np.float32) for _, _, shape in opened.states]
        return OrtCache(self, buffers, capacity, np.zeros(rows, np.int64), 0, States(states) if states else None)

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: OrtCache, counts: np.ndarray | None = None) -> np.ndarray:
        tokens, states = input_ids.shape[1], cache.states
        if states and tokens > self.chunk:
            raise UserError(f"{self.graph} takes at most {self.chunk} tokens of a row in one call, not {tokens}")
        counts = np.full(cache.rows, tokens) if counts is None else counts
        binding = cache.binding(tokens, logits_positions.shape[1], states.on_one_side(write_index) if states else 0)
        for name, array in zip(_Binding.TOKEN_INPUTS, (input_ids, position_ids, write_index, logits_positions, counts)):
            getattr(binding, name)[...] = array
        with self.opened.running(binding) as session:
            session.run_with_iobinding(binding.io)
        if states:
            states.end(write_index, counts)
        return binding.logits

    def close(self) -> None:
        """Free the session with the last call that runs and the last cache that has run; no other call begins."""
        self.opened.close()


class OrtCache(Cache):
    """Its storage is a list of buffers, one for each of the backend's past inputs."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._bindings: dict[tuple[int, int, int], _Binding] = {}

    def _copy_slots(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for array in self.storage:
            array[self.start + target, :, :length] = array[self.start + source, :, :length]

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        parts = [np.ascontiguousarray(array[self.start + row, :, first:stop]).view(np.uint8).ravel() for array in self.storage]
        return np.concatenate(parts, out=out)

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        for array in self.storage:
            part = array[self.start + row, :, first:stop]
            part[...] = data[:part.nbytes].view(array.dtype).reshape(part.shape)
            data = data[part.nbytes:]

    def grow(self, capacity: int) -> None:
        for i, array in enumerate(self.storage):            # one at a time, so that only one exists twice
            rows, heads, old, size = array.shape
            larger = _zeros((rows, heads, capacity, size), array.dtype)
            larger[:, :, :old] = array
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
        opened, rows = cache.backend.opened, cache.rows
        self.input_ids = np.zeros((rows, tokens), np.int64)
        self.position_ids = np.zeros((rows, tokens), np.int64)
        self.write_index = np.zeros(rows, np.int64)
        self.logits_positions = np.zeros((rows, positions), np.int64)
        self.counts = np.zeros(rows, np.int64)
        self.logits = np.empty((rows, positions, opened.vocab), np.float32)
        self.session = opened.session            # which `io` points into
        arrays = cache.states.arrays if cache.states else []
        self._inputs = {name: getattr(self, name) for name in self.TOKEN_INPUTS if name in opened.inputs}
        self._inputs |= {past: array[side] for (past, _, _), array in zip(opened.states, arrays)}
        self._buffers = [*cache.storage, *arrays]           # the pointers' owners
        with opened.errors():
            self.io = self.session.io_binding()
            for name, array in self._inputs.items():
                self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for (_, present, _), array in zip(opened.states, arrays):
                self.io.bind_output(present, "cpu", 0, np.float32, array.shape[1:], array[1 - side].ctypes.data)
            self.io.bind_output("logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)
            for (past, present, *_), buffer in zip(opened.caches, self._buffers):
                shown = buffer[cache.start:cache.start + rows]
                memory = "cpu", 0, opened.dtype, shown.shape, shown.ctypes.data
                self.io.bind_input(past, *memory)
                self.io.bind_output(present, *memory)


def _zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros in a mapping of their own: unlike the heap's, its pages take memory only once they are written to."""
    try:
        return np.frombuffer(mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    except (OSError, MemoryError, OverflowError) as error:
        raise UserError(f"no memory for a KV cache of {shape}: {error}; use fewer or shorter sequences") from None
