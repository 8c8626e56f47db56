"""The C core as ctypes sees it: native.h, declaration for declaration.

`load()` opens the shared library that `pip install` built beside this file. ctypes releases the GIL for every call.
"""

import ctypes
import functools
import itertools
import os
import warnings
import weakref
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p, py_object
from pathlib import Path

import numpy as np

from ..errors import Unavailable, UserError

PASS = 128                        # EW_PASS: tokens of one ew_forward
MAX_THREADS = 64
PATH_VARIABLE = "EDGEWRIGHT_NATIVE"    # another build of the library, such as one with sanitizers
DTYPES = {name: i for i, name in enumerate(
    ("float32", "float16", "bfloat16", "int8", "uint8", "int4", "uint4", "uint2", "uint3", "uint5", "uint6"))}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
MIXERS = {"attention": 0, "conv": 1, "delta": 2, "mamba": 3}
NORM_ORDERS = {"pre": 0, "post": 1, "both": 2}
ROUTERS = {"softmax": 0, "chosen": 1, "sigmoid": 2}
PARTS = ("qkv", "attention", "output", "gate_up", "down", "head", "other")


class Layer(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("mixer", "heads", "kv_heads", "head_dim", "state_dim", "kernel", "window", "rope",
                                             "cache_source", "mlp", "experts", "experts_per_token", "shared")]


class Config(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in (
        "vocab", "hidden", "layers", "max_context", "layer_norm", "learned_positions", "activation", "norm_order", "qk_norm",
        "qk_norm_last", "v_norm", "attention_gate", "router", "router_normalized", "router_bias", "per_layer", "layer_scalar")]
    _fields_ += [(name, c_float) for name in ("norm_eps", "attention_scale", "attention_softcap", "logits_softcap")]
    _fields_ += [("layer", POINTER(Layer))]


class States(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("from_", c_void_p), ("to", c_void_p)]


class Tensor(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("dtype", c_int32), ("dims", c_int32), ("shape", c_int64 * 2),
                ("offset", c_int64), ("bytes", c_int64)]


class Choice(ctypes.Structure):
    _fields_ = [("k", c_int32), ("index", c_void_p), ("value", c_void_p), ("repetition", c_float),
                ("presence", c_float), ("frequency", c_float), ("counts", c_void_p), ("seen", c_void_p)]


_FUNCTIONS = {
    "ew_open": (c_void_p, c_char_p, POINTER(Config), POINTER(Tensor), c_int, c_int, c_int, c_char_p, c_char_p, c_char_p,
                c_char_p),
    "ew_close": (None, c_void_p, py_object),                   # without the object, which only `life` gives
    "ew_isa": (c_char_p, c_void_p),
    "ew_cache_bytes": (c_int64, c_void_p, c_int, c_int, c_int),
    "ew_cache_new": (c_void_p, c_void_p, c_int, c_int, c_int, c_char_p),
    "ew_cache_free": (None, c_void_p, py_object),
    "ew_cache_copy": (None, c_void_p, c_void_p, c_int, c_void_p, c_int, c_int),
    "ew_cache_slots": (c_int64, c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int),
    "ew_state_floats": (c_int64, c_void_p),
    "ew_forward": (c_int, c_void_p, c_void_p, POINTER(States), c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p, POINTER(Choice),
                   c_void_p, c_char_p),
    "ew_profile": (None, c_void_p, c_int, POINTER(c_double)),
}


def call(function, *arguments, where: str = ""):
    """What a function of the core gives that may fail; its last argument is a buffer for its sentence. Raises UserError
    with that, after `where`: Unavailable where the core or the machine lacks something."""
    buffer = ctypes.create_string_buffer(256)
    result = function(*arguments, buffer)
    if result in (None, -1):
        text = buffer.value.decode(errors="replace")
        raise Unavailable(where + text[1:]) if text.startswith("\1") else UserError(where + text)
    return result


_lives: dict[int, weakref.ref] = {}
_numbers = itertools.count()


def life(free, handle: int) -> np.ndarray:
    """What to keep beside `handle`: the core frees it (ew_close, ew_cache_free) when the last reference to this is gone.

    By a weak reference, whose callback has no line of Python in it: the exception of a signal (Ctrl-C) that came in a `__del__` would be
    swallowed. And of an array, which the garbage collector does not know, so that it ends after what may use it when both are garbage."""
    alive = np.empty(0)
    for number, one in list(_lives.items()):
        if one() is None:
            _lives.pop(number, None)
    _lives[next(_numbers)] = weakref.ref(alive, functools.partial(free, handle))
    return alive


@functools.cache
def load() -> ctypes.CDLL:
    """The library. Raises Unavailable where it was not built (no compiler at installation) or cannot be opened."""
    path = Path(os.environ.get(PATH_VARIABLE) or Path(__file__).with_name("_core.so"))
    if not path.exists():
        warnings.warn("the native core was not built; falling back to ONNX Runtime", RuntimeWarning, stacklevel=2)
        raise Unavailable("the native core was not built (no C compiler when edgewright was installed); install again with one")
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path}: the native core cannot be opened ({error}); install edgewright again") from None
    return library
