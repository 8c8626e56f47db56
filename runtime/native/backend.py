"""The native CPU backend: `runtime.backend.Backend` over the C core, and a decoding loop inside it.

It opens the bundle's weights file (no ONNX graph is read), repacks it for the CPU's instruction set, and runs whole
steps in C on `threads` threads. Weights of 2 to 8 bits meet activations in int8, one scale for every 32 of a row, as
ONNX Runtime's int4 kernels do; `exact=True` keeps activations and cache in float32 (logits within 1e-4 of PyTorch's).
Where a checkpoint rounds its activations row by row, or its caches with stored scales, the core's finer scales take their
place (32 inputs; a head of a token). Stored scales of activations and 8-bit floats it does not have.

Results are the same to the bit whatever the batch, the number of threads and the chunking of a prompt, for one
instruction set and one kind of cache. One exception: with AMX, passes of 32 tokens and more round weights and activations to
bfloat16, so that a token's result depends on whether it went through such a pass, and on nothing else of it. A pass takes
at most 128 tokens; longer inputs go through pass by pass, and Ctrl-C is heard between two passes.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.machine import available_cpus
from runtime.native import library
from runtime.sampling import Sampler

CACHE_DTYPES = ("float16", "float32", "int8")


class NativeBackend:
    """See `runtime.backend.Backend`. Raises UserError where the core, the bundle's formats or memory cannot be had.

    threads: None for every CPU available to the process. isa: None for the best of this CPU, or a name from native.h's
    kernels ("avx512-amx", "avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "plain"). cache_dtype: of the KV cache;
    None for float16, or int8 where the bundle's was quantized.
    repack_cache: keep the repacked weights in a file beside the bundle's, bound to their hash, and open that next time.
    meanwhile: called while the core opens the weights, for work that needs the GIL; what it raises is raised here.
    """

    max_chunk_rows = None
    name = "native"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, exact: bool = False, isa: str | None = None,
                 cache_dtype: str | None = None, repack_cache: bool = False, meanwhile: Callable[[], object] | None = None):
        self._core = library.load()
        cpus = available_cpus()
        threads = cpus if threads is None else threads
        if not 1 <= threads <= cpus:
            raise UserError(f"threads={threads}, but this process may use {cpus} CPUs; give 1 to {cpus}")
        quantized_cache = any(t["name"].endswith(".k_scale") for t in bundle.manifest["weights"]["tensors"])
        cache_dtype = cache_dtype or ("float32" if exact else "int8" if quantized_cache else "float16")
        if cache_dtype not in CACHE_DTYPES:
            raise UserError(f"cache_dtype={cache_dtype!r}; the native core has {', '.join(CACHE_DTYPES)}")
        self._kind = library.DTYPES[cache_dtype]
        weights = bundle.path(bundle.manifest["weights"]["file"])
        self._error = ctypes.create_string_buffer(library.ERROR_BYTES)
        config = _config(bundle)
        tensors = _tensors(bundle)
        key = _tiles_key(bundle) if repack_cache else ""
        repacked = weights.with_name(f".{weights.name}.{key[:16]}.tiles") if repack_cache else None

        def open_model() -> None:
            self.model = self._core.ew_open(os.fsencode(weights), config, tensors, len(tensors), threads, exact,
                                            isa.encode() if isa else None, repacked and os.fsencode(repacked),
                                            key.encode(), self._error)

        with ThreadPoolExecutor(1) as beside:     # left when the core is done, whatever `meanwhile` raises
            opening = beside.submit(open_model)
            if meanwhile:
                meanwhile()
            opening.result()
        if not self.model:
            raise UserError(f"{weights}: {self._reason()}")
        self.vocab, self._max_context = config.vocab, config.max_context
        self.isa = self._core.ew_isa(self.model).decode()
        self.graph = f"{weights.name} with its {self.isa} kernels"
        self.threads = threads
        self._logits = np.empty((0, self.vocab), np.float32)

    def _reason(self) -> str:
        return self._error.value.decode(errors="replace")

    def cache_bytes(self, rows: int, capacity: int) -> int:
        return self._core.ew_cache_bytes(self.model, rows, capacity, self._kind)

    def new_cache(self, rows: int, capacity: int) -> NativeCache:
        return NativeCache(self, rows, capacity)

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, write_index: np.ndarray,
                logits_positions: np.ndarray, cache: NativeCache) -> np.ndarray:
        rows, width = input_ids.shape
        wanted = (logits_positions + np.arange(rows)[:, None] * width).ravel()
        slots = (write_index[:, None] + np.arange(width)).ravel()
        tokens, owners = input_ids.ravel(), np.repeat(np.arange(cache.start, cache.start + rows), width)
        if slots.max() >= self._max_context:         # padding that reaches past the context: nothing may look at it
            inside = slots < self._max_context
            if not inside[wanted].all():
                raise UserError(f"position {slots.max()} is beyond the context of {self._max_context} tokens")
            wanted = (np.cumsum(inside) - 1)[wanted]
            tokens, owners, slots = tokens[inside], owners[inside], slots[inside]
        if len(self._logits) < len(wanted):
            self._logits = np.empty((len(wanted), self.vocab), np.float32)
        if len(tokens) <= library.PASS and len(wanted) <= library.PASS:
            self._pass(tokens, owners, slots, wanted, self._logits, cache)
        else:
            self._passes(tokens, owners, slots, wanted, cache)
        return self._logits[:len(wanted)].reshape(rows, -1, self.vocab)

    def _passes(self, tokens, owners, slots, wanted, cache) -> None:
        for start in range(0, len(tokens), library.PASS):
            part = slice(start, start + library.PASS)
            inside, = np.nonzero((wanted >= start) & (wanted < start + library.PASS))
            unique, where = np.unique(wanted[inside] - start, return_inverse=True)
            logits = np.empty((len(unique), self.vocab), np.float32)
            self._pass(tokens[part], owners[part], slots[part], unique, logits, cache)
            self._logits[inside] = logits[where]

    def _pass(self, tokens, owners, slots, wanted, logits, cache) -> None:
        tokens, owners, slots, wanted = (np.ascontiguousarray(a, np.int32) for a in (tokens, owners, slots, wanted))
        failed = self._core.ew_forward(self.model, cache.handle, len(tokens), tokens.ctypes.data, owners.ctypes.data,
                                       slots.ctypes.data, len(wanted), wanted.ctypes.data, logits.ctypes.data, self._error)
        if failed:
            raise UserError(self._reason())

    def decode(self, cache: NativeCache, row: int, token: int, limit: int, sampler: Sampler,
               choose: Callable[[np.ndarray, np.ndarray], int | None]) -> None:
        """Feed `token` at the end of `row`, then what `choose(ids, logits)` makes of the largest logits (as many as
        `sampler.candidates`, largest first, with the sampler's penalties), at most `limit` steps or until it gives None.

        The loop runs in C without the GIL; an exception in `choose`, Ctrl-C too, ends it and is raised here.
        """
        ids, logits, raised = np.empty(sampler.candidates, np.int32), np.empty(sampler.candidates, np.float32), []

        def callback(count: int) -> int:
            try:
                cache.lengths[row] += 1
                token = choose(ids[:count], logits[:count])
                return -1 if token is None else token
            except BaseException as error:
                raised.append(error)
                return -1

        penalties = sampler.penalties(self.vocab)
        if penalties:
            options, counts, seen = penalties
            penalties = library.Penalties(options.repetition_penalty, options.presence_penalty, options.frequency_penalty,
                                          counts.ctypes.data, seen.ctypes.data)
        start = int(cache.lengths[row])
        steps = self._core.ew_decode(self.model, cache.handle, cache.start + row, start, token,
                                     min(limit, cache.capacity - start, self._max_context - start), penalties, len(ids),
                                     ids.ctypes.data, logits.ctypes.data, library.CHOOSE(callback), self._error)
        if raised:
            raise raised[0]
        if steps < 0:
            raise UserError(self._reason())

    def profile(self, on: bool) -> dict[str, float]:
        """Microseconds spent in each part of the steps since the last call; `on` starts or ends the counting."""
        spent = (ctypes.c_double * len(library.PARTS))()
        self._core.ew_profile(self.model, on, spent)
        return dict(zip(library.PARTS, spent))

    def close(self) -> None:
        if self.model:
            self._core.ew_close(self.model)
            self.model = None

    def __del__(self):
        if getattr(self, "model", None):
            self.close()


class _Storage:
    """A C cache, freed with the last Python cache that shows it; keeps its model open."""

    def __init__(self, backend: NativeBackend, rows: int, capacity: int):
        self.backend = backend
        self.handle = backend._core.ew_cache_new(backend.model, rows, capacity, backend._kind, backend._error)
        if not self.handle:
            raise UserError(backend._reason())

    def __del__(self):
        if getattr(self, "handle", None):
            self.backend._core.ew_cache_free(self.handle)


class NativeCache:
    """See `runtime.backend.Cache`. After `grow`, take views anew: old ones show the smaller storage."""

    def __init__(self, backend: NativeBackend, rows: int, capacity: int, *, storage: _Storage | None = None, start: int = 0,
                 lengths: np.ndarray | None = None):
        self._storage = storage or _Storage(backend, rows, capacity)
        self._backend = backend
        self.rows, self.capacity, self.start = rows, capacity, start
        self.lengths = np.zeros(rows, np.int64) if lengths is None else lengths

    @property
    def handle(self) -> int:
        return self._storage.handle

    @property
    def nbytes(self) -> int:
        return self._backend.cache_bytes(self.rows, self.capacity)

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, self.lengths[row])

    def fork(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        if source != target:
            self._backend._core.ew_cache_copy(self.handle, self.start + source, self.handle, self.start + target, length)
        self.lengths[target] = length

    def view(self, start: int, stop: int) -> NativeCache:
        return NativeCache(self._backend, stop - start, self.capacity, storage=self._storage, start=self.start + start,
                           lengths=self.lengths[start:stop])

    def grow(self, capacity: int) -> None:
        larger = _Storage(self._backend, self.rows, capacity)
        for row, length in enumerate(self.lengths):
            self._backend._core.ew_cache_copy(self.handle, row, larger.handle, row, int(length))
        self._storage, self.capacity = larger, capacity


def _config(bundle: Bundle) -> library.Config:
    """The manifest's configuration as the core takes it."""
    model = bundle.model["config"]
    try:
        arrays = [(ctypes.c_int32 * len(model["layers"]))(*(layer[key] for layer in model["layers"]))
                  for key in ("heads", "kv_heads", "mlp_size")]
        config = library.Config(
            vocab=model["vocab_size"], hidden=model["hidden_size"], layers=len(model["layers"]), head_dim=model["head_dim"],
            layer_norm=model["norm"] == "layer", learned_positions=model["positions"] == "learned",
            activation=library.ACTIVATIONS[model["activation"]], qk_norm=model["qk_norm"], max_context=bundle.max_context,
            sliding_window=model["sliding_window"] or 0, norm_eps=model["norm_eps"],
            heads=arrays[0], kv_heads=arrays[1], mlp=arrays[2])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{bundle.folder}: the native core cannot read model.config of the manifest ({error!r})") from None
    return config


def _tiles_key(bundle: Bundle) -> str:
    """64 hexadecimal digits of everything that repacked weights follow from, as the manifest has it."""
    import hashlib                                # brings OpenSSL, which opening does not need
    weights = bundle.manifest["weights"]
    facts = [bundle.manifest["files"][weights["file"]], weights["tensors"], bundle.model["config"], bundle.max_context]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tensors(bundle: Bundle) -> ctypes.Array:
    """The manifest's table of tensors as the core takes it. Raises UserError where the core would compute something else
    than the bundle was proven with."""
    for t in bundle.manifest["weights"]["tensors"]:
        if t["name"].endswith(".input_scale"):
            raise UserError(f"{bundle.folder}: its linears round their inputs by stored scales (--activation-scales static), "
                            "and the native core by its own: the replies would not be those the bundle was proven with")
        if t["dtype"] not in library.DTYPES:
            raise UserError(f"{bundle.folder}: {t['name']} is {t['dtype']}, which the native core does not have")
    rows = [t for t in bundle.manifest["weights"]["tensors"] if 1 <= len(t["shape"]) <= 2]
    table = (library.Tensor * len(rows))()
    for entry, t in zip(table, rows):
        shape = (ctypes.c_int64 * 2)(*(t["shape"] + [1])[:2])
        entry.name, entry.dtype, entry.dims, entry.shape = t["name"].encode(), library.DTYPES[t["dtype"]], len(t["shape"]), shape
        entry.offset, entry.bytes = t["offset"], t["bytes"]
    return table
