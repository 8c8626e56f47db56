"""A session of ONNX Runtime over one of a bundle's graphs, and its end.

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
import os
import sys
import time
import weakref

import numpy as np

from .bundle import Bundle
from .errors import DeviceError, Unavailable, UserError
from .onnx_files import check_external_data

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8, "tensor(int64)": np.int64,
           "tensor(int32)": np.int32}


class OrtSession:
    """One graph, opened.

    caches: of each key or value (past input, present output, heads, numbers a head, slots or a name for them); states: of each part of
    a recurrent layer (past, present, shape); dtype: of the cache's numbers; inputs, outputs: name -> numpy type, of all;
    vocab: logits a token; told: tokens of each row that it names as the likeliest, 0: none.
    Raises UserError for a damaged graph, Unavailable where ONNX Runtime cannot load it.
    """

    def __init__(self, bundle: Bundle, graph: dict, onnxruntime, options, provider: tuple[str, dict]):
        check_external_data(bundle, graph["file"])
        self.graph, self._device, path = graph["file"], provider[0], bundle.path(graph["file"])
        options.log_severity_level = 3            # errors; what ORT warns of here is by design
        try:                                      # its own fallback prints, and takes other options than were asked for
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
        except Exception as error:                # one class per ORT status, with no useful common one
            damaged = type(error).__name__ in ("InvalidProtobuf", "NoSuchFile")
            raise (UserError if damaged else Unavailable)(f"{path}: ONNX Runtime cannot load it: {error}") from None
        try:
            inputs, outputs = ({i.name: i for i in some} for some in (self._session.get_inputs(), self._session.get_outputs()))
            self.inputs, self.outputs = ({name: _DTYPES[i.type] for name, i in some.items()} for some in (inputs, outputs))
            self.caches = [(name, name.replace("past_", "present_", 1), i.shape[1], i.shape[3], i.shape[2])
                           for name, i in inputs.items() if name.startswith(("past_key.", "past_value."))]
            self.states = [(name, name.replace("past_", "present_", 1), tuple(i.shape[1:]))
                           for name, i in inputs.items() if name.startswith(("past_conv.", "past_state."))]
            self.dtype = self.inputs[self.caches[0][0]] if self.caches or not self.states else np.float32
            self.vocab, self.told = outputs["logits"].shape[2], outputs["top_ids"].shape[2] if "top_ids" in outputs else 0
            sizes = [size for sizes in (*(cache[2:4] for cache in self.caches), *(shape for _, _, shape in self.states)) for size in sizes]
            bad = [size for size in sizes if not isinstance(size, int) or size < 1] or not isinstance(self.told, int)
        except (IndexError, KeyError, UnicodeDecodeError):
            bad = True
        if bad or self.vocab != bundle.model["config"]["vocab_size"]:
            raise UserError(f"{path}: its inputs and outputs are not those of this model; export the bundle again")
        self._forks = _forks
        _sessions.add(self._session)

    @property
    def session(self):
        """The session, while it can run. Raises DeviceError where it was closed, UserError in the child of a fork."""
        session = self._session
        if session is None or _ending:
            raise DeviceError("this backend was closed; open the bundle again")
        if self._forks != _forks:
            raise UserError("the bundle was opened before this process was forked, and ONNX Runtime does not work in the child; "
                            "open it in the child, or use the native core")
        return session

    def check_open(self) -> None:
        """Raises what `session` raises."""
        _ = self.session

    @property
    def providers(self) -> list[str]:
        return self.session.get_providers()

    @contextlib.contextmanager
    def errors(self):
        """ONNX Runtime's errors as ours: a graph that cannot run is damaged, and what fails on a device may run elsewhere."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:                # one class per ORT status, with no useful common one
            reason = " ".join(str(error).split())
            if self._device == "CPUExecutionProvider":
                raise UserError(f"{self.graph}: ONNX Runtime cannot run it: {reason}; export the bundle again, or ask for fewer or "
                                "shorter sequences where memory is short") from None
            raise DeviceError(f"ONNX Runtime failed on cuda: {reason}") from None

    @contextlib.contextmanager
    def running(self, what: object):
        """The session for a call, which the interpreter's end waits for. what: the call's own, hashable."""
        try:
            _running.add(what)
            session = self.session
            with self.errors():
                yield session
        finally:
            _running.discard(what)

    def slot_bytes(self) -> int:
        """Of the caches of one token."""
        return sum(heads * size for _, _, heads, size, _ in self.caches) * np.dtype(self.dtype).itemsize

    def state_bytes(self) -> int:
        """Of a row's recurrent states, both copies."""
        return sum(2 * 4 * math.prod(shape) for _, _, shape in self.states)

    def close(self) -> None:
        """Free the session with the last call that runs and the last cache that has run; no other call begins."""
        self._session = None


def choose_graph(bundle: Bundle, roles: list[str]) -> dict:
    """The entry of the first of these graphs that the bundle has. Raises Unavailable."""
    for wanted in roles:
        if graph := bundle.graph(wanted):
            return graph
    raise Unavailable(f"{bundle.folder}: no {' or '.join(roles)} graph for ONNX Runtime in this bundle; "
                      f"`python -m export.{'onnx' if 'portable' in roles else 'ort'}` adds it")


_forks = 0                        # of this process and those it comes from
_sessions = weakref.WeakSet()
_running: set = set()
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
