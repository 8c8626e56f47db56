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

import math

import numpy as np

from .backend import States
from .bundle import Bundle
from .cuda_device import Block, Device
from .device_cache import DeviceCache, Storage
from .errors import DeviceError, Unavailable, UserError
from .layout import CHUNK
from .tensors import check_tensors
from .trt_engine import NO_ENGINE, bind, fitting_engines, load_plan, new_context, queue_step, read_plan

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
            raise Unavailable(NO_ENGINE)
        check_tensors(bundle)
        self.device = Device(cuda)
        tensorrt, entries = fitting_engines(bundle, self.device.gpu, modules)
        self.graph, self._max_context = entries[0]["file"], bundle.max_context
        self.bounce = None
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

    def new_cache(self, rows: int, capacity: int) -> DeviceCache:
        capacity = self.capacity_for(capacity)
        states = States([np.zeros((2, rows, *shape), np.float32) for _, shape in self._states]) if self._states else None
        return DeviceCache(self, self.new_storage(rows, capacity), capacity, np.zeros(rows, np.int64), 0, states)

    def new_storage(self, rows: int, capacity: int) -> Storage:
        with self.device.turn:
            return Storage(self, rows, capacity)

    def _check_open(self) -> None:
        if not self._engines:                     # perhaps by another reply that found the device failing
            raise DeviceError("this TensorRT backend was closed; open the bundle again")

    def forward(self, input_ids, position_ids, write_index, logits_positions, cache: DeviceCache, counts=None) -> np.ndarray:
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
        self._engines, self.bounce = {}, None


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
            self._contexts[name] = new_context(engine, self._device, self._path, index, name)
        self._device.synchronize()
        self._engine = engine
        return self

    def run(self, input_ids, position_ids, write_index, counts, logits_positions, cache: DeviceCache) -> np.ndarray:
        """One call within the profiles; float32 logits [b, k, vocab] in pinned memory, valid until the next call. The new states
        are beside the old ones, which stay."""
        arrays = (input_ids, position_ids, write_index, logits_positions, *([counts] if self.states else []))
        (rows, tokens), wanted = input_ids.shape, logits_positions.shape[1]
        decode = tokens == wanted == 1
        context = self._contexts["decode" if decode and "decode" in self._contexts else "prefill"]
        staging = self._stage(rows, tokens, wanted)
        for name, array in zip(TOKEN_INPUTS, arrays):
            staging["tokens"].host[name][...] = array
        side = cache.states.on_one_side(write_index) if self.states else 0
        for (name, _), array in zip(self.states, cache.states.arrays if self.states else []):
            staging["past"].host[name][...] = array[side]

        def work():
            for name in ("tokens", "past") if self.states else ("tokens",):
                staging[name].upload()
            queue_step(context, self._device, self._path)
            for name in ("logits", "present") if self.states else ("logits",):
                staging[name].download()

        key = (cache.start, rows)
        graph = cache.storage.kept.get(key) if decode else None
        if graph is not None:
            graph.launch()
        else:
            self._bind(context, staging, arrays, cache)
            work()
            if decode and self._capturable(context):
                cache.storage.kept[key] = self._device.capture(work)
        self._device.synchronize()
        for (name, _), array in zip(self.states, cache.states.arrays if self.states else []):
            array[1 - side] = staging["present"].host[name.replace("past_", "present_", 1)]
        return staging["logits"].host["logits"]

    def _bind(self, context, staging, arrays, cache) -> None:
        rows, addresses = len(arrays[0]), {name: at for block in staging.values() for name, at in block.addresses.items()}
        shapes = {name: array.shape for name, array in zip(TOKEN_INPUTS, arrays)} | {name: (rows, *size) for name, size in self.states}
        for index, (name, heads, size) in enumerate(self.caches):
            shapes[name] = (rows, heads, cache.capacity, size)
            addresses[name] = addresses[name.replace("past_", "present_", 1)] = cache.address(index)
        bind(context, self._path, shapes, addresses)

    def _capturable(self, context) -> bool:
        """TensorRT for RTX compiles kernels while it first runs, and cannot be recorded until it has."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or ask(int(self._device.stream))

    def _stage(self, rows: int, tokens: int, wanted: int) -> dict[str, Block]:
        """Memory for calls of one shape; that of decode steps stays, since CUDA graphs hold its addresses."""
        key = (rows, tokens, wanted)
        if key not in self._staging:
            for old in [k for k in self._staging if k[1:] != (1, 1)]:
                del self._staging[old]
            inputs = {"input_ids": (rows, tokens), "position_ids": (rows, tokens), "write_index": (rows,),
                      "logits_positions": (rows, wanted)} | ({"counts": (rows,)} if self.states else {})
            blocks = {"tokens": {name: (shape, np.int64) for name, shape in inputs.items()},
                      "logits": {"logits": ((rows, wanted, self.vocab), np.float32)}}
            if self.states:
                blocks["past"] = {name: ((rows, *shape), np.float32) for name, shape in self.states}
                blocks["present"] = {name.replace("past_", "present_", 1): array for name, array in blocks["past"].items()}
            self._staging[key] = {name: Block(self._device, arrays) for name, arrays in blocks.items()}
        return self._staging[key]
