"""cuda.onnx on ONNX Runtime's CPU: what can be known of its arithmetic without a GPU.

    backend = CudaOnCpu(bundle)               # a runtime.backend.Backend
    backend.outputs                           # of the last call, by name: logits, next_token, top_ids, top_logits

The lengths and weights that the graph wants are made as the CUDA backend makes them (runtime/nbits.py). It proves the graph and nothing
of CUDA's kernels, which sum in another order and in fp16; it is slow, and no backend to serve from.
"""

import numpy as np

from runtime.backend import Cache
from runtime.bundle import Bundle
from runtime.errors import Unavailable, pip_line
from runtime.machine import cpu_threads
from runtime.nbits import made
from runtime.onnx_files import check_external_data
from runtime.ort_backend import OrtCache
from runtime.tensors import check_tensors

TYPES = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}      # of caches
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64}      # of what comes out


class CudaOnCpu:
    """See `runtime.backend.Backend`. Raises Unavailable where the bundle has no such graph, or onnxruntime cannot be had."""

    name, max_chunk_rows, chunk = "onnxruntime-cpu", 1, None

    def __init__(self, bundle: Bundle, threads: int | None = 1):
        entry = bundle.graph("cuda")
        if entry is None:
            raise Unavailable(f"{bundle.folder}: no cuda graph in this bundle; `python -m export.ort` adds it where the bundle is in fp16")
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable(f"onnxruntime cannot be imported ({error}); {pip_line('cpu')}") from None
        check_tensors(bundle)
        check_external_data(bundle, entry["file"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = cpu_threads(threads), 3
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        self._weights = dict(made(bundle))                   # which the session reads until it is open
        options.add_external_initializers(list(self._weights), [onnxruntime.OrtValue.ortvalue_from_numpy(array)
                                                                for array in self._weights.values()])
        self.session = onnxruntime.InferenceSession(str(bundle.path(entry["file"])), options, providers=["CPUExecutionProvider"])
        self.graph, self.outputs = entry["file"], {}
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        self._caches = {name: (i.shape[1], i.shape[3], TYPES[i.type]) for name, i in self._inputs.items() if name.startswith("past_")}
        self._found = {o.name: (o.shape, NUMPY[o.type]) for o in self.session.get_outputs() if not o.name.startswith("present_")}

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return rows * capacity * sum(heads * size * np.dtype(dtype).itemsize for heads, size, dtype in self._caches.values())

    def new_cache(self, rows: int, capacity: int) -> Cache:
        buffers = [np.zeros((rows, heads, capacity, size), dtype) for heads, size, dtype in self._caches.values()]
        return OrtCache(self, buffers, capacity, np.zeros(rows, np.int64))

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray, logits_positions: np.ndarray,
                cache: Cache, counts: np.ndarray | None = None) -> np.ndarray:
        rows, tokens = input_ids.shape
        after = write_index + tokens
        feed = {"input_ids": input_ids, "position_ids": position_ids, "logits_positions": logits_positions,
                "seqlens_k": (after - 1).astype(np.int32), "total_sequence_length": np.array(after.max(), np.int32)}
        feed = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in self._inputs}
        io = self.session.io_binding()
        for name, value in feed.items():
            io.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        for name, buffer in zip(self._caches, cache.storage, strict=True):
            view = buffer[cache.start:cache.start + rows]
            memory = "cpu", 0, view.dtype.type, view.shape, view.ctypes.data
            io.bind_input(name, *memory)
            io.bind_output(name.replace("past_", "present_", 1), *memory)
        self.outputs = {name: np.empty((*logits_positions.shape, *shape[2:]), dtype) for name, (shape, dtype) in self._found.items()}
        for name, value in self.outputs.items():
            io.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        self.session.run_with_iobinding(io)
        return self.outputs["logits"]

    def close(self) -> None:
        self.session = None
