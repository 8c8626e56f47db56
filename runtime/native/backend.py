"""The native CPU backend: `runtime.backend.Backend` over the C core, and a decoding loop inside it.

It opens the bundle's weights file (no ONNX graph is read), repacks it for the CPU's instruction set, and runs whole
steps in C on `threads` threads. Weights of 2 to 8 bits, evenly spaced or of tables of levels, meet activations in int8, one
scale for every 32 of a row, as ONNX Runtime's int4 kernels do; `exact=True` keeps activations and cache in float32 (logits
within 1e-4 of PyTorch's).
Where a checkpoint rounds its activations row by row, or its caches with stored scales, the core's finer scales take their
place (32 inputs; a head of a token). Stored scales of activations and 8-bit floats it does not have.

Results are the same to the bit whatever the batch, the number of threads and the chunking of a prompt, for one
instruction set and one kind of cache. One exception: with AMX, passes of 32 tokens and more round weights and activations to
bfloat16, so that a token's result depends on whether it went through such a pass (of a mixture's experts: whether so many
tokens chose it), and on nothing else of it. A pass takes at most 128 tokens; longer inputs go through pass by pass, and
Ctrl-C is heard between two passes.

Recurrent states are float32, whatever the keys and values are; any number of tokens steps through them in a call. Inputs of
a layer's own (Gemma 4) are rows of a table that stays in the weights file, which may be replaced meanwhile, not overwritten.
Layers that only read other layers' keys and values run for the tokens alone whose logits are asked.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..backend import Cache, States
from ..bundle import Bundle
from ..capabilities import check_runs
from ..errors import DeviceError, Unavailable, UserError
from ..machine import cpu_threads
from ..sampling import Sampler
from ..tensors import check_tensors
from . import library
from .steps import Ragged, Step

CACHE_DTYPES = ("float16", "float32", "int8")


class NativeBackend:
    """See `runtime.backend.Backend`. Raises Unavailable where the core, one of the bundle's formats or memory cannot be had.

    threads: None for every CPU available to the process (the core takes 64 at most). isa: None for the best of this CPU, or a
    name from native.h's kernels ("avx512-amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "plain").
    cache_dtype: of the KV cache; None for float16, or int8 where the bundle's was quantized.
    repack_cache: keep the repacked weights in a file beside the bundle's, bound to their hash, and open that next time.
    meanwhile: called while the core opens the weights, for work that needs the GIL; what it raises is raised here.

    Threads may share it, each with caches of its own. A call that runs while another thread closes it goes to its end.
    """

    max_chunk_rows = chunk = None
    name = "native"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, exact: bool = False, isa: str | None = None,
                 cache_dtype: str | None = None, repack_cache: bool = False, meanwhile: Callable[[], object] | None = None):
        check_cache_dtype(cache_dtype)
        check_runs("native", check_tensors(bundle), bundle.folder)
        self.threads = min(cpu_threads(threads), library.MAX_THREADS)
        self._core = library.load()
        quantized_cache = any(t["name"].endswith(".k_scale") for t in bundle.manifest["weights"]["tensors"])
        cache_dtype = cache_dtype or ("float32" if exact else "int8" if quantized_cache else "float16")
        self._kind = library.DTYPES[cache_dtype]
        weights = bundle.path(bundle.manifest["weights"]["file"])
        config = _config(bundle)
        tensors = _tensors(bundle)
        key = _tiles_key(bundle) if repack_cache else ""
        repacked = weights.with_name(f".{weights.name}.{key[:16]}.tiles") if repack_cache else None

        def open_model() -> _Model:
            return _Model(self._core, f"{weights}: ", os.fsencode(weights), config, tensors, len(tensors), self.threads, exact,
                          isa.encode() if isa else None, repacked and os.fsencode(repacked), key.encode())

        with ThreadPoolExecutor(1) as beside:     # left when the core is done, whatever `meanwhile` raises
            opening = beside.submit(open_model)
            if meanwhile:
                meanwhile()
            self.model: _Model | None = opening.result()
        self.vocab, self._max_context = config.vocab, config.max_context
        self.state_floats = self._call(self._core.ew_state_floats)
        self.isa = self._call(self._core.ew_isa).decode()
        self.graph = f"{weights.name} with its {self.isa} kernels"

    def _call(self, function, *arguments):
        """What a function of the core gives for the open model. Raises DeviceError where it was closed."""
        model = self.model                        # held while the function runs
        if model is None:
            raise DeviceError("this backend was closed; open the bundle again")
        return function(model.handle, *arguments)

    def _try(self, function, *arguments):
        """`_call` of a function that may fail. Raises UserError."""
        return self._call(functools.partial(library.call, function), *arguments)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return self._call(self._core.ew_cache_bytes, rows, capacity, self._kind) + 2 * rows * self.state_floats * 4

    def new_cache(self, rows: int, capacity: int) -> NativeCache:
        storage = _Storage(self, rows, capacity)
        if not self.state_floats:
            return NativeCache(self, storage, capacity, np.zeros(rows, np.int64))
        try:
            storage.states = np.zeros((2, rows, self.state_floats), np.float32)      # takes memory as rows are used
        except MemoryError:
            raise UserError(f"the recurrent states of {rows} rows cannot be had: out of memory") from None
        return NativeCache(self, storage, capacity, np.zeros(rows, np.int64), states=States([storage.states]))

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: NativeCache, counts: np.ndarray | None = None) -> np.ndarray:
        rows, width = input_ids.shape
        wanted = (logits_positions + np.arange(rows)[:, None] * width).ravel()
        slots = (write_index[:, None] + np.arange(width)).ravel()
        columns = [input_ids.ravel(), np.repeat(np.arange(cache.start, cache.start + rows), width), slots]
        inside, used = slots < self._max_context, wanted        # what reaches beyond is padding: nothing may look at it
        if cache.states:
            counts = np.full(rows, width) if counts is None else counts
            real = (np.arange(width) < counts[:, None]).ravel()
            if not real[wanted].all():
                raise UserError("logits are asked of padding, which a model with recurrent layers does not run")
            used = real
        if not inside[used].all():
            raise UserError(f"position {slots.max()} is beyond the context of {self._max_context} tokens")
        if cache.states:
            inside &= real
            columns += [np.repeat(cache.states.begin(write_index), width), np.repeat(1 - cache.states.copy, width)]
        if not inside.all():
            wanted = (np.cumsum(inside) - 1)[wanted]
            columns = [column[inside] for column in columns]
        logits = cache.logits(len(wanted))
        if len(columns[0]) <= library.PASS and len(wanted) <= library.PASS:
            self._pass(columns, wanted, logits, cache)
        else:
            self._passes(columns, wanted, logits, cache)
        if cache.states:
            cache.states.end(write_index, counts)
        return logits.reshape(rows, -1, self.vocab)

    def _passes(self, columns, wanted, logits, cache) -> None:
        for start in range(0, len(columns[0]), library.PASS):
            part = [column[start:start + library.PASS] for column in columns]
            if cache.states and start and part[1][0] == columns[1][start - 1]:       # its row has begun: on in its own copy
                part[3] = np.where(part[1] == part[1][0], part[4], part[3])
            inside, = np.nonzero((wanted >= start) & (wanted < start + library.PASS))
            unique, where = np.unique(wanted[inside] - start, return_inverse=True)
            found = np.empty((len(unique), self.vocab), np.float32)
            self._pass(part, unique, found, cache)
            logits[inside] = found[where]

    def _pass(self, columns, wanted, logits, cache) -> None:
        tokens, owners, slots, *copies, wanted = (np.ascontiguousarray(a, np.int32) for a in (*columns, wanted))
        if len(tokens) or len(wanted):
            self._try(self._core.ew_forward, cache.handle_for(self), cache.c_states(*copies), len(tokens), tokens.ctypes.data,
                      owners.ctypes.data, slots.ctypes.data, len(wanted), wanted.ctypes.data, None, logits.ctypes.data)

    def step_rows(self, cache: NativeCache, tokens: np.ndarray,
                  samplers: list[Sampler]) -> list[tuple[np.ndarray, np.ndarray] | np.ndarray]:
        """Append one token (int64 [rows]) to every row of `cache`, whose lengths it advances by 1, and find what is likely next.

        samplers: one a row (the same one twice: as two rows would have it). The result has for each row, where its sampler has
        `candidates`, ids (int32 [n]) and logits (float32 [n]) of that many largest logits (fewer only where the vocabulary is smaller),
        with the sampler's penalties, largest first, the lower id first among equals: `Sequence.accept` takes them.
        Where `candidates` is 0, it has all logits as they are, float32 [vocab]. The arrays are
        valid until the next step of this cache. The samplers' penalties are read during the call: no other thread may choose with
        them meanwhile. Raises UserError where a row is full, or beyond the context; then no length has changed.
        """
        rows, slots, states = cache.rows, cache.lengths, cache.states
        if rows > library.PASS:
            parts = [(start, min(start + library.PASS, rows)) for start in range(0, rows, library.PASS)]
            return [found for a, b in parts for found in self.step_rows(cache.view(a, b), tokens[a:b], samplers[a:b])]
        filled = slots.tolist()
        if max(filled) >= self._max_context:
            raise UserError(f"position {max(filled)} is beyond the context of {self._max_context} tokens")
        step = cache.step()
        step.seek(samplers)
        step.numbers[0], step.numbers[2] = tokens, slots
        if states:
            step.numbers[4], step.numbers[5] = states.begin(slots), 1 - states.copy
        token, row, slot, wanted, *_ = step.at
        self._try(self._core.ew_forward, cache.handle_for(self), step.states, rows, token, row, slot, rows, wanted, step.choices,
                  step.logits_at)
        if states:
            states.end(slots, np.ones(rows, np.int64))
        slots[:] = [n + 1 for n in filled]
        return list(step.found)

    def check_rows(self, cache: NativeCache, feeds: list[list[int]], firsts: list[int],
                   samplers: list[Sampler]) -> list[list[tuple[np.ndarray, np.ndarray] | np.ndarray]]:
        """Append feeds[r], at least one token, to row r of `cache`, whose lengths it advances; at most steps.MOST tokens of all rows.

        For each row, after each of its tokens from index firsts[r] on, what `step_rows` gives; all logits too where a sampler has
        penalties. Valid until the next call with this cache. Raises UserError as step_rows does.
        """
        slots, states, counts = cache.lengths.tolist(), cache.states, [len(feed) for feed in feeds]
        if (end := max(map(sum, zip(slots, counts)))) > self._max_context:
            raise UserError(f"position {end - 1} is beyond the context of {self._max_context} tokens")
        plan = cache.ragged()
        sought = plan.tell(feeds, slots, firsts, samplers, self.vocab)
        if states:
            before = cache.lengths.copy()
            plan.numbers[4, :sum(counts)] = np.repeat(states.begin(before), counts)
            plan.numbers[5, :sum(counts)] = np.repeat(1 - states.copy, counts)
        logits, (token, row, slot, wanted, *_) = cache.logits(len(sought)), plan.at
        self._try(self._core.ew_forward, cache.handle_for(self), plan.states, sum(counts), token, row, slot, len(sought), wanted,
                  plan.choices, logits.ctypes.data)
        if states:
            states.end(before, np.array(counts))
        cache.lengths[:] = [slot + count for slot, count in zip(slots, counts)]
        found = iter([plan.found(place, count) if count else logits[place] for place, count in enumerate(sought)])
        return [list(itertools.islice(found, count - first)) for count, first in zip(counts, firsts)]

    def profile(self, on: bool) -> dict[str, float]:
        """Microseconds spent in each part of the steps since the last call; `on` starts or ends the counting."""
        spent = (ctypes.c_double * len(library.PARTS))()
        self._call(self._core.ew_profile, on, spent)
        return dict(zip(library.PARTS, spent))

    def close(self) -> None:
        """Free the model when the last call that runs has ended; no other begins."""
        self.model = None


class _Model:
    """A model that the core has opened. It is closed with the last reference, and a call that runs holds one: so nobody can
    close it under a call, be it another thread, a callback, the garbage collector or the interpreter's end."""

    def __init__(self, core: ctypes.CDLL, where: str, *arguments):
        self.handle = library.call(core.ew_open, *arguments, where=where)
        self._life = library.life(core.ew_close, self.handle)


class _Storage:
    """A C cache, freed with the last Python cache that shows it; its model may be closed before."""

    def __init__(self, backend: NativeBackend, rows: int, capacity: int):
        self.backend, self.states = backend, None
        self.handle = backend._try(backend._core.ew_cache_new, rows, capacity, backend._kind)
        self._life = library.life(backend._core.ew_cache_free, self.handle)

    def copy(self, row: int, target: _Storage, to: int, length: int) -> None:
        """Row `row`, its first `length` slots, over row `to` of `target`."""
        self.backend._call(self.backend._core.ew_cache_copy, self.handle, row, target.handle, to, length)


class NativeCache(Cache):
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self._logits = np.empty((0, self.backend.vocab), np.float32)
        self._step: Step | None = None
        self._ragged: Ragged | None = None

    def handle_for(self, backend: NativeBackend) -> int:
        """The C cache. Raises UserError where it is another backend's."""
        if self.backend is not backend:
            raise UserError("this KV cache is of another backend; make one with this one's `new_cache`")
        return self.storage.handle

    def c_states(self, *copies: np.ndarray) -> library.States | None:
        """The states as the core takes them, with the copies (int32 [tokens] each) that tokens go on from and leave them in."""
        return library.States(self.storage.states.ctypes.data, *(copy.ctypes.data for copy in copies)) if copies else None

    def logits(self, count: int) -> np.ndarray:
        """A buffer for float32 [count, vocab]: of this cache, since each thread has caches of its own."""
        if len(self._logits) < count:
            self._logits = np.empty((count, self.backend.vocab), np.float32)
        return self._logits[:count]

    def step(self) -> Step:
        if self._step is None:
            self._step = Step(self)
        return self._step

    def ragged(self) -> Ragged:
        if self._ragged is None:
            self._ragged = Ragged(self.start, self.storage.states.ctypes.data if self.states else None)
        return self._ragged

    def _copy_slots(self, source: int, target: int) -> None:
        self.storage.copy(self.start + source, self.storage, self.start + target, int(self.lengths[source]))

    def read(self, row: int, first: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        move = self.backend._core.ew_cache_slots, self.storage.handle, self.start + row, first, stop - first
        found = np.empty(self.backend._call(*move, None, 0), np.uint8) if out is None else out
        self.backend._call(*move, found.ctypes.data, 0)
        return found

    def write(self, row: int, first: int, stop: int, data: np.ndarray) -> None:
        self.backend._call(self.backend._core.ew_cache_slots, self.storage.handle, self.start + row, first, stop - first, data.ctypes.data, 1)

    def grow(self, capacity: int) -> None:
        larger = _Storage(self.backend, self.rows, capacity)
        larger.states = self.storage.states
        for row, length in enumerate(self.lengths):
            self.storage.copy(row, larger, row, int(length))
        self.storage, self.capacity = larger, capacity


def check_cache_dtype(name: str | None) -> None:
    """Raises UserError for a dtype that no KV cache of the core has."""
    if name is not None and name not in CACHE_DTYPES:
        raise UserError(f"cache_dtype={name!r}; the native core has {', '.join(CACHE_DTYPES)}")


_NEW = {                         # fields of the configuration that a manifest leaves out at these values
    "norm_order": "pre", "qk_norm_over": "head", "qk_norm_last": False, "v_norm": False, "attention_gate": False,
    "attention_scale": None, "attention_softcap": None, "logits_softcap": None, "router": "softmax", "router_normalized": False,
    "router_bias": False, "per_layer_size": 0, "layer_scalar": False}


def _config(bundle: Bundle) -> library.Config:
    """The manifest's configuration as the core takes it. Raises UserError where it is none, Unavailable for what the core lacks."""
    try:
        model = _NEW | bundle.model["config"]
        for name, value, known in (*(("mixer", layer.get("mixer", "attention"), library.MIXERS) for layer in model["layers"]),
                                   ("activation", model["activation"], library.ACTIVATIONS), ("norm", model["norm"], ("layer", "rms")),
                                   ("positions", model["positions"], ("learned", "rope")), ("router", model["router"], library.ROUTERS),
                                   ("norm_order", model["norm_order"], library.NORM_ORDERS),
                                   ("qk_norm_over", model["qk_norm_over"], ("head", "all"))):
            if value not in known:
                raise Unavailable(f"{bundle.folder}: {name} {value!r} is none of the native core's ({', '.join(known)})")
        layers = [_layer(model, layer) for layer in model["layers"]]
        return library.Config(
            vocab=model["vocab_size"], hidden=model["hidden_size"], layers=len(layers), max_context=bundle.max_context,
            layer_norm=model["norm"] == "layer", learned_positions=model["positions"] == "learned",
            activation=library.ACTIVATIONS[model["activation"]], norm_order=library.NORM_ORDERS[model["norm_order"]],
            qk_norm=model["qk_norm"] and 1 + (model["qk_norm_over"] == "all"), router=library.ROUTERS[model["router"]],
            per_layer=model["per_layer_size"], norm_eps=model["norm_eps"], layer=(library.Layer * len(layers))(*layers),
            **{name: model[name] for name in ("qk_norm_last", "v_norm", "attention_gate", "router_normalized", "router_bias",
                                              "layer_scalar")},
            **{name: model[name] or 0 for name in ("attention_scale", "attention_softcap", "logits_softcap")})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{bundle.folder}: model.config of the manifest cannot be read ({error!r}); export the bundle again") from None


def _layer(model: dict, layer: dict) -> library.Layer:
    source, window = layer.get("cache_source"), layer.get("sliding_window", model["sliding_window"])
    return library.Layer(
        mixer=library.MIXERS[layer.get("mixer", "attention")], mlp=layer["mlp_size"], head_dim=layer.get("head_dim", model["head_dim"]),
        rope=-1 if model["positions"] == "learned" else layer.get("rope", 0), window=window or 0,
        cache_source=-1 if source is None else source, shared=layer.get("shared_size", 0), heads=layer["heads"], kv_heads=layer["kv_heads"],
        **{name: layer.get(name, 0) for name in ("kernel", "state_dim", "experts", "experts_per_token")})


def _tiles_key(bundle: Bundle) -> str:
    """64 hexadecimal digits of everything that repacked weights follow from, as the manifest has it."""
    import hashlib                                # brings OpenSSL, which opening does not need
    weights = bundle.manifest["weights"]
    facts = [bundle.manifest["files"][weights["file"]], weights["tensors"], bundle.model["config"], bundle.max_context]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tensors(bundle: Bundle) -> ctypes.Array:
    """The manifest's table of tensors as the core takes it."""
    rows = [t for t in bundle.manifest["weights"]["tensors"] if 1 <= len(t["shape"]) <= 2]
    table = (library.Tensor * len(rows))()
    for entry, t in zip(table, rows):
        shape = (ctypes.c_int64 * 2)(*(t["shape"] + [1])[:2])
        entry.name, entry.dtype, entry.dims, entry.shape = t["name"].encode(), library.DTYPES[t["dtype"]], len(t["shape"]), shape
        entry.offset, entry.bytes = t["offset"], t["bytes"]
    return table
