"""A bundle's TensorRT engines behind the backend interface (`runtime/backend.py`).

One stream carries everything: the four token inputs go up from pinned memory, the engine runs, the logits come down.
The cache is one device buffer per layer and key or value, [rows, kv_heads, capacity, head_dim], bound as past and as
present at once, so that the engine updates it in place. An engine's capacity is fixed: a cache gets the smallest engine
that holds what was asked, and `grow` moves it to a larger one. Threads take turns at the stream (`Device.turn`); what
is closed is freed with its last reference, so not under a call that runs.

An engine has two profiles, each with its execution context: "decode" for one token a row, "prefill" for more (and for
one, in an engine built without the first). A call that is larger than the profile (rows, tokens or logits) is split.
The decode step of a view is recorded as a CUDA graph once it has run, and launched from then on. States of recurrent layers are in
host memory; each call takes them up and down.

Written against TensorRT-RTX 1.7 and cuda-python 13, and tested against a double of both; it has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np

from .backend import Cache, States
from .bundle import Bundle
from .errors import DeviceError, Unavailable, UserError
from .layout import CHUNK
from .tensors import check_tensors
from .trt_device import Device
from .trt_engine import fitting_engines, load_plan, read_plan

TOKEN_INPUTS = ("input_ids", "position_ids", "write_index", "logits_positions", "counts")
ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}


class TrtBackend:
    """See `runtime.backend.Backend`. Raises Unavailable with the reason where no engine of the bundle can run here.

    cuda, modules: in place of cuda-python and of the TensorRT libraries (tests).
    """

    name = "tensorrt"
    max_chunk_rows = None

    def __init__(self, bundle: Bundle, *, cuda=None, modules: dict | None = None):
        if not bundle.manifest["engines"]:
            raise Unavailable("the bundle has no TensorRT engine; `python -m export.trt` adds one")
        check_tensors(bundle)
        self.device = Device(cuda)
        tensorrt, entries = fitting_engines(bundle, self.device.gpu, modules)
        self.graph, self._max_context = entries[0]["file"], bundle.max_context
        self._engines = {entry["capacity"]: _Engine(tensorrt, self.device, bundle, entry) for entry in entries}
        first = min(self._engines)
        self._engines[first].load()               # an engine that cannot run is found now
        self.caches = self._engines[first].caches
        self.item_bytes, self._states = self._engines[first].item_bytes, self._engines[first].states
        self.chunk = min([CHUNK, *(engine.tokens for engine in self._engines.values())]) if self._states else None

    def capacity_for(self, capacity: int) -> int:
        """The smallest capacity of an engine that holds `capacity` slots, or the model's whole context. Raises DeviceError."""
        self._check_open()
        capacity = min(capacity, self._max_context)
        enough = [size for size in self._engines if size >= capacity]
        if not enough:
            raise DeviceError(f"the TensorRT engines of this bundle hold at most {max(self._engines, default=0)} tokens, and {capacity} "
                            f"are needed; build one with `python -m export.trt --capacity {capacity}`")
        return min(enough)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        slots = self.capacity_for(capacity) * self.item_bytes * sum(heads * size for _, heads, size in self.caches)
        return rows * (slots + sum(2 * 4 * math.prod(shape) for _, shape in self._states))

    def new_cache(self, rows: int, capacity: int) -> TrtCache:
        capacity = self.capacity_for(capacity)
        states = States([np.zeros((2, rows, *shape), np.float32) for _, shape in self._states]) if self._states else None
        return TrtCache(self, _Storage(self, rows, capacity), capacity, np.zeros(rows, np.int64), 0, states)

    def _check_open(self) -> None:
        if not self._engines:                     # perhaps by another reply that found the device failing
            raise DeviceError("this TensorRT backend was closed; open the bundle again")

    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: TrtCache, counts=None) -> np.ndarray:
        with self.device.turn:
            self._check_open()
            engine = self._engines[cache.capacity].load()
            (rows, tokens), wanted = input_ids.shape, logits_positions.shape[1]
            if self._states and tokens > self.chunk:
                raise UserError(f"{self.graph} takes at most {self.chunk} tokens of a row in one call, not {tokens}")
            counts = np.full(rows, tokens) if counts is None else counts
            if rows <= engine.rows and tokens <= engine.tokens and wanted <= engine.logits:
                found = engine.run(input_ids, position_ids, write_index, counts, logits_positions, cache).copy()
                if cache.states:
                    cache.states.end(write_index, counts)
                return found
            logits = np.empty((rows, wanted, engine.vocab), np.float32)
            for start in range(0, rows, engine.rows):
                part = slice(start, min(start + engine.rows, rows))
                view = cache.view(part.start, part.stop)
                for first in range(0, tokens, engine.tokens):
                    chunk = slice(first, first + engine.tokens)
                    inputs = input_ids[part, chunk], position_ids[part, chunk], write_index[part] + first, counts[part]
                    self._chunk(engine, inputs, view, logits_positions[part] - first, logits[part])
                if view.states:
                    view.states.end(write_index[part], counts[part])
            return logits

    def _chunk(self, engine, inputs, view, positions, out) -> None:
        """Run one chunk, and fill the logits whose positions (relative to it) lie inside it."""
        tokens = inputs[0].shape[1]
        inside = (positions >= 0) & (positions < tokens)
        columns = np.flatnonzero(inside.any(axis=0))
        groups = [columns[i:i + engine.logits] for i in range(0, len(columns), engine.logits)] or [np.empty(0, int)]
        for group in groups:                      # a second run of the same tokens writes the same slots and states again
            asked = np.clip(positions[:, group], 0, tokens - 1) if len(group) else np.zeros((len(out), 1), np.int64)
            result = engine.run(*inputs, asked, view)
            for i, column in enumerate(group):
                rows = inside[:, column]
                out[rows, column] = result[rows, i]

    def close(self) -> None:
        self._engines = {}


class TrtCache(Cache):
    def address(self, index: int) -> int:
        """Where the first row of buffer `index` (in the order of the engine's caches) begins."""
        return self.storage.addresses[index] + self.start * self.storage.row_bytes[index]

    def _copy_slots(self, source: int, target: int) -> None:
        with self.backend.device.turn:
            for index, size in enumerate(self.storage.row_bytes):
                begin = self.address(index)
                self.backend.device.copy_blocks(begin + target * size, size, begin + source * size, size, size, 1)

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        found = self._through_host(row, first, stop, None)
        if out is None:
            return found
        out[:] = found
        return out

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        self._through_host(row, first, stop, data)

    def _through_host(self, row: int, first: int, stop: int, data: np.ndarray | None) -> np.ndarray | None:
        """The slots of all heads, gathered in one buffer on the device: its bytes, or (data) these to there."""
        device, item = self.backend.device, self.backend.item_bytes
        widths = [(stop - first) * size * item for _, _, size in self.backend.caches]
        total = sum(width * heads for width, (_, heads, _) in zip(widths, self.backend.caches))
        with device.turn:
            host, gathered = device.pinned((total,), np.uint8), device.allocate(total)
            try:
                if data is not None:
                    host[:] = data
                    device.upload(gathered, host)
                at = gathered
                for index, (width, (_, heads, size)) in enumerate(zip(widths, self.backend.caches)):
                    pitch = self.capacity * size * item
                    there = self.address(index) + row * self.storage.row_bytes[index] + first * size * item, pitch
                    target, source = ((at, width), there) if data is None else (there, (at, width))
                    device.copy_blocks(*target, *source, width, heads)
                    at += width * heads
                if data is None:
                    device.download(host, gathered)
                device.synchronize()
                return host.copy() if data is None else None
            finally:
                device.free(gathered)
                device.unpin(host)

    def grow(self, capacity: int) -> None:
        backend, larger = self.backend, self.backend.capacity_for(capacity)
        if larger <= self.capacity:
            return
        storage = _Storage(backend, self.rows, larger)
        with backend.device.turn:
            for (_, heads, size), source, target in zip(backend.caches, self.storage.addresses, storage.addresses):
                old, new = (slots * size * backend.item_bytes for slots in (self.capacity, larger))
                backend.device.copy_blocks(target, new, source, old, old, self.rows * heads)
            backend.device.synchronize()          # before the old storage is freed
        self.capacity, self.storage = larger, storage


class _Storage:
    """Zeroed device buffers of a cache: what no token has written yet must not be NaN, since 0 x NaN is NaN."""

    def __init__(self, backend: TrtBackend, rows: int, capacity: int):
        self._device, self.addresses, self.graphs = backend.device, [], {}
        self.row_bytes = [heads * capacity * size * backend.item_bytes for _, heads, size in backend.caches]
        try:
            with self._device.turn:
                for size in self.row_bytes:
                    self.addresses.append(self._device.allocate(rows * size))
                    self._device.zero(self.addresses[-1], rows * size)
        except DeviceError as error:
            self.free()
            raise DeviceError(f"the KV cache of {rows} x {capacity} tokens ({rows * sum(self.row_bytes) / 1e6:.0f} MB) "
                              f"does not fit the GPU: {error}") from None

    def free(self) -> None:
        for graph in self.graphs.values():
            self._device.drop_graph(graph)
        for address in self.addresses:
            self._device.free(address)
        self.graphs, self.addresses = {}, []

    def __del__(self):
        with contextlib.suppress(DeviceError):    # the device is gone, and its memory with it
            self.free()


class _Engine:
    """One engine of one capacity, loaded when first needed."""

    def __init__(self, tensorrt, device: Device, bundle: Bundle, entry: dict):
        self._tensorrt, self._device, self._path = tensorrt, device, bundle.path(entry["file"])
        self._bytes = entry.get("bytes")
        self._contexts, self._engine, self._staging = {}, None, {}
        high = {p["name"]: {k: v[2] for k, v in p["shapes"].items()} for p in entry["profiles"]}
        self._profiles = [p["name"] for p in entry["profiles"]]
        self.rows, self.tokens = high["prefill"]["input_ids"]
        self.logits = high["prefill"]["logits_positions"][1]

    def load(self) -> _Engine:
        if self._engine is not None:
            return self
        engine = load_plan(self._tensorrt, read_plan(self._path, self._bytes), self._path)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        pasts = [name for name in names if name.startswith(("past_key.", "past_value."))]
        self.states = [(name, tuple(engine.get_tensor_shape(name))[1:]) for name in names if name.startswith(("past_conv.", "past_state."))]
        self.item_bytes = ITEM_BYTES[engine.get_tensor_dtype(pasts[0]).name]
        self.caches = [(name, engine.get_tensor_shape(name)[1], engine.get_tensor_shape(name)[3]) for name in pasts]
        self.vocab = engine.get_tensor_shape("logits")[2]
        for index, name in enumerate(self._profiles):
            context = engine.create_execution_context()
            if context is None:
                raise DeviceError(f"{self._path}: the GPU has too little memory to run the engine")
            if not context.set_optimization_profile_async(index, int(self._device.stream)):
                raise DeviceError(f"{self._path}: the profile {name} cannot be set")
            self._contexts[name] = context
        self._device.synchronize()
        self._engine = engine
        return self

    def run(self, input_ids, position_ids, write_index, counts, logits_positions, cache: TrtCache) -> np.ndarray:
        """One call within the profiles; float32 logits [b, k, vocab] in pinned memory, valid until the next call. The new states
        are beside the old ones, which stay."""
        arrays = (input_ids, position_ids, write_index, logits_positions, *([counts] if self.states else []))
        (rows, tokens), wanted = input_ids.shape, logits_positions.shape[1]
        decode = tokens == wanted == 1
        context = self._contexts["decode" if decode and "decode" in self._contexts else "prefill"]
        staging = self._stage(rows, tokens, wanted)
        for name, array in zip(TOKEN_INPUTS, arrays):
            staging.host[name][...] = array
        side = cache.states.on_one_side(write_index) if self.states else 0
        for (name, _), array in zip(self.states, cache.states.arrays if self.states else []):
            staging.host[name][...] = array[side]

        def work():
            self._device.upload(staging.address, staging.flat)
            if self.states:
                self._device.upload(staging.states_address, staging.states)
            if not context.execute_async_v3(int(self._device.stream)):
                raise DeviceError(f"{self._path}: TensorRT could not run a step")
            self._device.download(staging.logits, staging.logits_address)
            if self.states:
                self._device.download(staging.new_states, staging.new_address)

        key = (cache.start, rows)
        graph = cache.storage.graphs.get(key) if decode else None
        if graph is not None:
            self._device.launch(graph)
        else:
            self._bind(context, staging, arrays, cache)
            work()
            if decode and self._capturable(context):
                cache.storage.graphs[key] = self._device.capture(work)
        self._device.synchronize()
        for (name, _), array in zip(self.states, cache.states.arrays if self.states else []):
            array[1 - side] = staging.host[name.replace("past_", "present_", 1)]
        return staging.logits

    def _bind(self, context, staging, arrays, cache) -> None:
        bound = [context.set_input_shape(name, array.shape) and
                 context.set_tensor_address(name, staging.addresses[name]) for name, array in zip(TOKEN_INPUTS, arrays)]
        for index, (name, heads, size) in enumerate(self.caches):
            shape, address = (len(arrays[0]), heads, cache.capacity, size), cache.address(index)
            bound += [context.set_input_shape(name, shape), context.set_tensor_address(name, address),
                      context.set_tensor_address(name.replace("past_", "present_", 1), address)]
        for name, size in self.states:
            present = name.replace("past_", "present_", 1)
            bound += [context.set_input_shape(name, (len(arrays[0]), *size)), context.set_tensor_address(name, staging.addresses[name]),
                      context.set_tensor_address(present, staging.addresses[present])]
        bound.append(context.set_tensor_address("logits", staging.logits_address))
        if not all(bound):
            raise DeviceError(f"{self._path}: TensorRT refused a shape or an address")

    def _capturable(self, context) -> bool:
        """TensorRT for RTX compiles kernels while it first runs, and cannot be recorded until it has."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or ask(int(self._device.stream))

    def _stage(self, rows: int, tokens: int, wanted: int) -> _Staging:
        """Buffers for calls of one shape; those of decode steps stay, since CUDA graphs hold their addresses."""
        key = (rows, tokens, wanted)
        if key not in self._staging:
            for old in [k for k in self._staging if k[1:] != (1, 1)]:
                del self._staging[old]
            self._staging[key] = _Staging(self._device, rows, tokens, wanted, self.vocab, self.states)
        return self._staging[key]


class _Staging:
    """Pinned and device memory of a call's token inputs, one block each, of its logits, and of states before and after it."""

    ALIGNMENT = 256                   # bytes that TensorRT wants addresses to be a multiple of

    def __init__(self, device: Device, rows: int, tokens: int, wanted: int, vocab: int, states: list[tuple[str, tuple[int, ...]]]):
        shapes = {"input_ids": (rows, tokens), "position_ids": (rows, tokens), "write_index": (rows,),
                  "logits_positions": (rows, wanted)} | ({"counts": (rows,)} if states else {})
        offsets, end = self._places(shapes, 8)
        self._device = device
        self.address = device.allocate(end)
        self.logits_address = device.allocate(rows * wanted * vocab * 4)
        self.flat = device.pinned((end // 8,), np.int64)
        self.logits = device.pinned((rows, wanted, vocab), np.float32)
        self.addresses = {name: self.address + offset for name, offset in offsets.items()}
        self.host = {name: self.flat[offsets[name] // 8:][:math.prod(shape)].reshape(shape)
                     for name, shape in shapes.items()}
        if states:
            past = {name: (rows, *shape) for name, shape in states}
            offsets, end = self._places(past, 4)
            self.states_address, self.new_address = device.allocate(end), device.allocate(end)
            self.states, self.new_states = device.pinned((end // 4,), np.float32), device.pinned((end // 4,), np.float32)
            for name, shape in past.items():
                for which, address, flat in (("past_", self.states_address, self.states), ("present_", self.new_address, self.new_states)):
                    told = name.replace("past_", which, 1)
                    self.addresses[told] = address + offsets[name]
                    self.host[told] = flat[offsets[name] // 4:][:math.prod(shape)].reshape(shape)

    def _places(self, shapes: dict[str, tuple[int, ...]], item: int) -> tuple[dict[str, int], int]:
        """Where each array begins in a block of all, in bytes, and where the block ends."""
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name], end = end, end + -(-math.prod(shape) * item // self.ALIGNMENT) * self.ALIGNMENT
        return offsets, end

    def __del__(self):
        with contextlib.suppress(DeviceError, AttributeError):       # the device is gone, or had no memory for all of them
            for free, block in ((self._device.free, "address"), (self._device.free, "logits_address"), (self._device.unpin, "flat"),
                                (self._device.unpin, "logits"), (self._device.free, "states_address"), (self._device.free, "new_address"),
                                (self._device.unpin, "states"), (self._device.unpin, "new_states")):
                free(getattr(self, block))
