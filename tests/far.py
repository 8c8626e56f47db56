"""A second device for machines without one: `far:0`, whose tensors live in host memory and behave as if they did not.

    with far.present() as device:                    # the fixture `far`
        model.to(device)

An operation on a far tensor and one of the host's raises `DevicesMeet`, as CUDA would, unless it is a copy or the host's is
a single number. So does a far tensor asked for its memory (`numpy()`), and a CPU generator that is to fill a far tensor. What
the host reads of far tensors (`item`, `bool`, `tolist`, `cpu`, a copy to the host), each of which would wait for a GPU, is
counted: `far.reads`; and what it sends there and waits for: `far.sends`. A copy that is not to be waited for (non_blocking) is
neither. `far.peak_bytes()` is what far tensors have taken at most. Arithmetic is the CPU's own, so results are the CPU's bit for
bit, as long as a stage does the same; but a division by a number of the host's is, as on CUDA, a product with its reciprocal, which
may round otherwise.

Built on PyTorch's own way of making a Python backend; a device needs more than tensors that say they are on it, because
autograd asks it for streams and guards.
"""

import gc
import weakref
from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "far"
COPIES = ("aten::copy_", "aten::_to_copy")
DIVISIONS = {torch.ops.aten.div.Tensor: torch.ops.aten.mul.Tensor, torch.ops.aten.div_.Tensor: torch.ops.aten.mul_.Tensor}
reads: list[str] = []                              # operations by which the host has read a far tensor
sends: list[str] = []                              # copies to the device that the host waits for
_users: dict[int, int] = {}                        # far tensors by where their memory begins
_now = _peak = 0                                   # bytes that they take, and have taken at most
_open = 0                                          # of `present`


def _register() -> None:
    """Make PyTorch know the device: before anything else is done with it, because the first backward pass of a process counts its devices.
    Raises ImportError where PyTorch is an older one, which lacks this."""
    class Hooks(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return _open > 0

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(KIND, Module(), Hooks())
    _others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
        _products.impl(name, _as_autocast(name), "AutocastPrivateUse1")


def _as_autocast(name: str):
    """An operation that autocast does in its own type on a GPU, and so on the far device, for which PyTorch knows none."""
    operation = getattr(torch.ops.aten, name).default
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args, **how):
        dtype = torch.get_autocast_dtype(KIND)
        args, how = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x, (args, how))
        with torch._C._ExcludeDispatchKeyGuard(here):
            return operation(*args, **how)
    return cast


_others, _products = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
if not torch.cuda.is_available():                  # PyTorch would take this device for its accelerator in place of the GPU
    try:
        _register()
    except AttributeError as error:
        raise ImportError(f"PyTorch {torch.__version__} cannot have the far device: {error}") from None


class DevicesMeet(RuntimeError):
    """Tensors of two devices in one operation."""


def peak_bytes() -> int:
    """The most that far tensors have taken at once, since `forget_peak`."""
    return _peak


def forget_peak() -> None:
    global _peak
    _peak = _now


def _count(tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    global _now, _peak
    place, size = storage.data_ptr(), storage.nbytes()
    _users[place] = _users.get(place, 0) + 1
    if _users[place] == 1:
        _now += size
        _peak = max(_peak, _now)
    weakref.finalize(tensor, _release, place, size).atexit = False


def _release(place: int, size: int) -> None:
    global _now
    _users[place] -= 1
    if not _users[place]:
        del _users[place]
        _now -= size


class Far(torch.Tensor):
    """A tensor of the far device; `held` is the host's tensor that it really is."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=torch.device(KIND, 0))
        made.held = held
        _count(made, held.untyped_storage())
        return made

    def __repr__(self):
        return f"Far({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()                  # counted there

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, **how):
        raise TypeError(f"can't convert a {self.device} tensor to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    leaves, name = tree_leaves((args, kwargs)), function._schema.name
    far, near = ([leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and isinstance(leaf, Far) is there] for there in (True, False))
    result_far, device = bool(far), kwargs.get("device")
    if device is not None:
        result_far = torch.device(device).type == KIND
        kwargs = kwargs | {"device": torch.device("cpu") if result_far else device}
    asked = kwargs.get("non_blocking") or name == "aten::copy_" and len(args) > 2 and args[2]
    if name == "aten::copy_":
        result_far = isinstance(args[0], Far)
    if name == "aten::_local_scalar_dense" or far and name in COPIES and not result_far and not asked:
        reads.append(name)
    if result_far and name in COPIES and any(tensor.ndim for tensor in near) and not asked:
        sends.append(name)
    if far and name not in COPIES and any(tensor.ndim for tensor in near):
        raise DevicesMeet(f"{name}: {[(tuple(t.shape), str(t.device)) for t in (*far, *near)]}")
    if result_far and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise DevicesMeet(f"{name}: a generator of the CPU cannot fill a tensor of another device")
    held = {id(leaf.held): leaf for leaf in far}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Far) else x, (args, kwargs))
    if far and function in DIVISIONS and _of_the_host(args[1], near) and args[0].dtype == torch.float32:
        function, args = DIVISIONS[function], (args[0], float(torch.tensor(1 / float(args[1]))))
    found = function(*args, **kwargs)
    same = {id(tensor): tensor for tensor in near}

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in held:                            # in place
            return held[id(x)]
        return Far(x) if result_far and id(x) not in same else x
    return tree_map(wrapped, found)


def _of_the_host(divisor, near: list[torch.Tensor]) -> bool:
    return isinstance(divisor, (int, float)) or any(divisor is tensor and tensor.ndim == 0 for tensor in near)


class _Mode(TorchDispatchMode):
    """Takes what makes tensors on the device out of nothing, or out of the host's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def present():
    """While open, the device is there. `reads` begins empty."""
    global _open
    reads.clear()
    sends.clear()
    _open += 1
    gc.freeze()                      # every operation makes objects, and a collection would look at all of a whole suite's
    try:
        with _Mode():
            yield torch.device(KIND, 0)
    finally:
        gc.unfreeze()
        _open -= 1
