"""A bundle's graph on ONNX Runtime with an NVIDIA GPU, whose decode step is recorded once and replayed.

Which graph: in float16 "cuda" (written for this: nothing of it runs on the CPU), else "fast", else "portable"; in float32 "portable",
since ONNX Runtime unfolds the fast graph's weights at every step there.

One stream carries everything, ONNX Runtime's work too: the token inputs go up from pinned memory, the graph runs, what is wanted of
its outputs comes down. The cache is one device buffer per layer and key or value, bound as past and as present at once; it is
copied, grown and forked on the device (device_cache.py). Buffers that a cache has given up are kept for the next one of their size,
with what was recorded over them; sizes are few, so that they come again.

A step of one token a row that comes a third time is recorded as a CUDA graph. It replays with the addresses, the shapes and the
host's numbers of its recording: so a view has one binding, with an id of its own, inputs that change in place, and the whole cache as
the total length, which only bounds the rows' own. ONNX Runtime runs such a step three times (twice to have all memory, once to
record): it writes the same slots. It keeps what it has recorded for one thread, and for ever: so one thread of the backend's own runs
it, an id is never used again, and after MOST_RECORDED of them further steps run unrecorded. It records graphs whose nodes are all on
the GPU: of ours, "cuda". `how` says whether the step is recorded, and why not: one is tried when the bundle is opened.

What a sampler chooses among comes as ids: up to as many candidates as the graph tells of each row. Rows with
penalties, a grammar or log probabilities have all their logits brought down, and no others.

States of recurrent layers are in host memory; each call takes them up and down.

Written against ONNX Runtime 1.31 and CUDA 13, and tested against a double of both; it has never run on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .backend import States
from .bundle import Bundle
from .capabilities import BACKENDS, check_runs
from .cuda_device import Block, Device
from .cuda_opening import settings, usable_onnxruntime
from .device_cache import DeviceCache, Storage
from .errors import DeviceError, Unavailable, UserError
from .layout import CHUNK
from .machine import cpu_threads
from .nbits import made
from .ort_session import OrtSession, choose_graph
from .sampling import Sampler
from .tensors import check_tensors

MOST_RECORDED = 128
_LEAST_CAPACITY = 512
_MOST_IDLE = 4                    # storages that nobody has
_MOST_STEPS = 8                   # shapes that a storage remembers beside those recorded
_BEFORE_RECORDING = 2             # calls of a step, most of which come no more often
_UNRECORDED = -1                  # as an id: this run is not recorded


class CudaBackend:
    """See `runtime.backend.Backend`. Raises Unavailable with the reason where the graph, the GPU or a library cannot be had.

    role: insists on that graph. onnxruntime, cuda: in place of the modules (tests).
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, *, threads: int | None = 1, role: str | None = None, onnxruntime=None, cuda=None):
        threads = cpu_threads(threads)
        check_runs("onnx", check_tensors(bundle), bundle.folder)
        half = (bundle.graph("portable") or {}).get("dtype") == "fp16"
        graph = choose_graph(bundle, [role] if role else ["cuda", "fast", "portable"] if half else ["portable", "fast"])
        if graph.get("dtype", "fp32") not in BACKENDS["onnx"].dtypes:
            raise Unavailable(f"ONNX Runtime lacks most operators of {graph['dtype']}")
        self._onnxruntime = onnxruntime or usable_onnxruntime()
        self.graph, self._max_context = graph["file"], bundle.max_context
        self._idle: dict[tuple[int, int], Storage] = {}
        self.bounce: Block | None = None
        self._ids = itertools.count(1)
        self._inside: list[int] = []                          # the thread's identity, once it runs
        self._thread = ThreadPoolExecutor(1, "edgewright-cuda", lambda inside=self._inside: inside.append(threading.get_ident()))
        self._open(bundle, graph, threads, cuda)
        self.max_chunk_rows = None if graph["role"] == "portable" else 1
        self.chunk = CHUNK if self.opened.states else None

    def _open(self, bundle: Bundle, graph: dict, threads: int, cuda) -> None:
        """A session that records, where it can; else one that does not."""
        reason = "only cuda.onnx can be, which `python -m export.ort` writes for bundles of fp16"
        for record in (True, False) if graph["role"] == "cuda" else (False,):
            # Nothing of a session that failed: a stream on which no recording has, and storages that nothing is bound to.
            self.device, self.opened, self._returned = Device(cuda), None, collections.deque()
            try:
                self.opened = self._session(bundle, graph, threads, record)
                self.recorded = record
                if record:
                    self._try_step()
                    reason = ""
                break
            except (DeviceError, Unavailable) as error:
                if not record:
                    raise
                reason = str(error)
        self.how = f"{self.device.gpu.name}, the step not recorded: {reason}" if reason else f"{self.device.gpu.name}, the step recorded"

    def _session(self, bundle: Bundle, graph: dict, threads: int, record: bool) -> OrtSession:
        options, provider = settings(self._onnxruntime, threads, self.device.stream, record)
        repacked = []                                         # weights as MatMulNBits wants them, until the session has its own
        if graph["role"] == "cuda":
            names = []
            for name, array in made(bundle):
                names.append(name)
                repacked.append(self._onnxruntime.OrtValue.ortvalue_from_numpy(array))
            options.add_external_initializers(names, repacked)
        opened = OrtSession(bundle, graph, self._onnxruntime, options, provider)
        if opened.providers[0] != provider[0]:
            raise Unavailable("onnxruntime found no usable CUDA device (driver or libraries missing)")
        self.caches = [(past, heads, size) for past, _, heads, size, _ in opened.caches]
        self.item_bytes = np.dtype(opened.dtype).itemsize
        opened.stream_of = self.device                        # goes after the session
        return opened

    def _try_step(self) -> None:
        cache = self.new_cache(1, 1)
        for _ in range(_BEFORE_RECORDING + 1):
            self.step_rows(cache, np.zeros(1, np.int64), [])

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that caches may take."""
        return self.device.free_memory()

    def capacity_for(self, capacity: int) -> int:
        """Slots of a cache for `capacity`: one of at most four sizes between a power of two and the next."""
        step = max(_LEAST_CAPACITY, 1 << max(0, (capacity - 1).bit_length() - 3))
        rounded = -(-capacity // step) * step
        fixed = self.opened.caches[0][4] if self.opened.caches else None
        if not isinstance(fixed, int):
            return max(capacity, min(rounded, -(-self._max_context // 64) * 64))
        if capacity > fixed:
            raise UserError(f"{self.graph} has a cache of {fixed} slots fixed in it; {capacity} cannot be had")
        return fixed

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return rows * (self.capacity_for(capacity) * self.opened.slot_bytes() + self.opened.state_bytes())

    def new_cache(self, rows: int, capacity: int) -> DeviceCache:
        capacity = self.capacity_for(capacity)
        states = [np.zeros((2, rows, *shape), np.float32) for _, _, shape in self.opened.states]
        return DeviceCache(self, self.new_storage(rows, capacity), capacity, np.zeros(rows, np.int64), 0, States(states) if states else None)

    def new_storage(self, rows: int, capacity: int) -> _Lease:
        with self._turn():
            while self._returned:
                storage = self._returned.popleft()
                self._idle[storage.rows, storage.capacity] = storage
            storage = self._idle.pop((rows, capacity), None)
            while len(self._idle) > _MOST_IDLE:
                self._idle.pop(next(iter(self._idle)))
            if storage:
                storage.zero()
                return _Lease(self._returned, storage)
            try:
                return _Lease(self._returned, Storage(self, rows, capacity))
            except DeviceError:
                if not self._idle:
                    raise
            self._idle.clear()
            return _Lease(self._returned, Storage(self, rows, capacity))

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: DeviceCache, counts: np.ndarray | None = None) -> np.ndarray:
        (rows, tokens), states = input_ids.shape, cache.states
        if states and tokens > self.chunk:
            raise UserError(f"{self.graph} takes at most {self.chunk} tokens of a row in one call, not {tokens}")
        counts = np.full(rows, tokens) if counts is None else counts
        with self._turn():
            step = self._run(cache, input_ids, position_ids, write_index, logits_positions, counts)
            logits = np.empty((rows, logits_positions.shape[1], self.opened.vocab), self.opened.outputs["logits"])
            self.device.download(logits, step.logits.addresses["logits"])
            self._wait(cache, step, write_index, counts)
        return logits.astype(np.float32, copy=False)

    def step_rows(self, cache: DeviceCache, tokens: np.ndarray,
                  samplers: list[Sampler]) -> list[tuple[np.ndarray, np.ndarray] | np.ndarray]:
        """Append one token (int64 [rows]) to every row of `cache`, whose lengths it advances by 1, and find what is likely next.

        The result has for each sampler what `NativeBackend.step_rows` gives; and all logits too where one has penalties, or more
        candidates than the graph tells. Raises UserError where a row is full; then no length has changed.
        """
        lengths, ones = cache.lengths, np.ones(cache.rows, np.int64)
        with self._turn():
            step = self._run(cache, tokens[:, None], lengths[:, None], lengths, np.zeros((cache.rows, 1), np.int64), ones)
            found: list = [self._sought(sampler) or np.empty(self.opened.vocab, self.opened.outputs["logits"]) for sampler in samplers]
            if any(isinstance(sought, int) for sought in found):
                step.told.download()
            for row, logits in enumerate(found):
                if not isinstance(logits, int):
                    self.device.download(logits, step.logits.addresses["logits"] + row * logits.nbytes)
            self._wait(cache, step, lengths, ones)
            for row, sought in enumerate(found):
                if isinstance(sought, int):
                    ids, logits = (step.told.host[name][row, 0, :sought] for name in ("top_ids", "top_logits"))
                    found[row] = ids.astype(np.int32), logits.astype(np.float32)
                else:
                    found[row] = sought.astype(np.float32, copy=False)
        cache.lengths += 1
        return found

    def within(self, work: Callable):
        """What `work`, steps of this backend, gives, run on the thread that runs them: to hand over each would cost 60 microseconds."""
        with self._turn():
            return self._thread.submit(work).result() if self.recorded else work()

    @contextlib.contextmanager
    def _turn(self):
        """The device, while nobody else queues anything; what the own thread does, it does for somebody who has the turn."""
        self.opened.check_open()                  # before anything waits for a lock or a thread, which after a fork is for ever
        with contextlib.nullcontext() if threading.get_ident() in self._inside else self.device.turn:
            yield

    def _sought(self, sampler: Sampler) -> int:
        """How many candidates this sampler is to have; 0: all logits."""
        count, vocab = sampler.candidates, self.opened.vocab
        return count if min(count, vocab) <= self.opened.told and sampler.penalties(vocab) is None else 0

    def _run(self, cache: DeviceCache, input_ids, position_ids, write_index, logits_positions, counts) -> _Step:
        """Queue a call, whose outputs will be on the device."""
        tokens, end = input_ids.shape[1], int(write_index.max()) + input_ids.shape[1]
        if end > cache.capacity:                  # on a device, nobody notices what is written beyond
            raise UserError(f"{end} slots are needed, and the KV cache has {cache.capacity}")
        key = cache.start, cache.rows, tokens, logits_positions.shape[1]
        kept = cache.storage.kept
        step = kept.get(key)
        if step is None:
            others = [other for other, one in kept.items() if not one.recorded]
            for other in others if len(others) >= _MOST_STEPS else ():
                del kept[other]
            step = kept[key] = _Step(self, cache, *key[2:])
        values = {"input_ids": input_ids, "position_ids": position_ids, "write_index": write_index, "logits_positions": logits_positions,
                  "counts": counts, "seqlens_k": write_index + (tokens - 1)}
        for name, image in step.tokens.host.items():
            image[...] = values[name]
        # what is recorded has one total for all steps to come
        step.total[...] = min(cache.capacity, self._max_context) if step.decodes else end
        step.tokens.upload()
        if cache.states:
            side = cache.states.on_one_side(write_index)
            for (past, _, _), array in zip(self.opened.states, cache.states.arrays):
                step.past.host[past][...] = array[side]
            step.past.upload()
        if self.recorded:
            step.calls += 1
            if step.decodes and step.calls == _BEFORE_RECORDING + 1 and (number := next(self._ids)) <= MOST_RECORDED:
                step.options, step.recorded = self.run_options(number), True
        if self.recorded and threading.get_ident() not in self._inside:
            self._thread.submit(self._launch, step).result()
        else:
            self._launch(step)
        return step

    def _launch(self, step: _Step) -> None:
        with self.opened.running(step) as session:
            session.run_with_iobinding(step.io, step.options)

    def _wait(self, cache: DeviceCache, step: _Step, write_index, counts) -> None:
        """Until what was queued is done; the new states are then beside the old ones."""
        if cache.states:
            step.present.download()
        self.device.synchronize()
        if cache.states:
            for (_, present, _), array in zip(self.opened.states, cache.states.arrays):
                array[1 - cache.states.copy[0]] = step.present.host[present]
            cache.states.end(write_index, counts)

    def run_options(self, number: int = _UNRECORDED):
        """Of calls that are recorded under this number, or not."""
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")      # `_wait` does, once
        return options

    def close(self) -> None:
        """Free the session with the last call that runs and the last cache; no other call begins."""
        self.opened.close()
        with self.device.turn:
            self._thread.shutdown(wait=False)
            self.bounce = None
            self._idle.clear()
            self._returned.clear()


class _Lease:
    """A storage while caches show it; given back with the last of them, in whatever thread that is. What frees or reuses it has the
    turn: to free memory while a step is recorded would spoil it."""

    def __init__(self, returned: collections.deque, storage: Storage):
        self._returned, self._storage = returned, storage
        self.addresses, self.row_bytes, self.kept = storage.addresses, storage.row_bytes, storage.kept

    def __del__(self):
        self._returned.append(self._storage)


class _Step:
    """The inputs and outputs of calls of one shape on one view: bound once, and changed in place."""

    def __init__(self, backend: CudaBackend, cache: DeviceCache, tokens: int, wanted: int):
        opened, device, rows = backend.opened, backend.device, cache.rows
        self.decodes = tokens == wanted == 1
        shapes = {"input_ids": (rows, tokens), "position_ids": (rows, tokens), "write_index": (rows,), "logits_positions": (rows, wanted),
                  "counts": (rows,), "seqlens_k": (rows,)}
        self.tokens = Block(device, {name: (shape, opened.inputs[name]) for name, shape in shapes.items() if name in opened.inputs})
        self.logits = Block(device, {"logits": ((rows, wanted, opened.vocab), opened.outputs["logits"])}, image=False)
        self.told = None                          # ids and logits of the likeliest tokens, where they are wanted
        if self.decodes and opened.told:
            self.told = Block(device, {name: ((rows, 1, opened.told), opened.outputs[name]) for name in ("top_ids", "top_logits")})
        self.past = self.present = None
        if opened.states:
            self.past, self.present = (Block(device, {state[which]: ((rows, *state[2]), np.float32) for state in opened.states})
                                       for which in (0, 1))
        self.total = np.zeros((), np.int32)       # on the host
        self.calls, self.recorded, self.options = 0, False, backend.run_options()
        self.session = opened.session             # which `io` points into
        with opened.errors():
            self.io = self.session.io_binding()
            for block, bind in ((self.tokens, self.io.bind_input), (self.past, self.io.bind_input), (self.logits, self.io.bind_output),
                                (self.told, self.io.bind_output), (self.present, self.io.bind_output)):
                for name, (shape, dtype) in block.arrays.items() if block else ():
                    bind(name, "cuda", 0, dtype, shape, block.addresses[name])
            if "total_sequence_length" in opened.inputs:
                self.io.bind_input("total_sequence_length", "cpu", 0, np.int32, (), self.total.ctypes.data)
            for index, (past, present, heads, size, _) in enumerate(opened.caches):
                memory = "cuda", 0, opened.dtype, (rows, heads, cache.capacity, size), cache.address(index)
                self.io.bind_input(past, *memory)
                self.io.bind_output(present, *memory)
        self.device = device                      # of what is here, the stream goes last
