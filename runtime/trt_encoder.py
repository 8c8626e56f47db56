"""An encoder's TensorRT engine: a call's ids go up, it runs, its first output comes down.

An engine has one profile, of 1 to `rows` texts and 1 to `tokens` tokens each, and the memory of the largest call, taken when it is
opened. More texts than that are cut into several runs. Engines are chosen and loaded as decoders' are (trt_engine.py). A call is not
recorded as a CUDA graph, since few calls have the same shape.

Written against TensorRT-RTX 1.7 and cuda-python 13, and tested against a double of both; it has not run on a GPU yet.
"""

from __future__ import annotations

import numpy as np

from .cuda_device import Block, Device
from .encoder_bundle import EncoderBundle
from .errors import DeviceError, Unavailable, UserError
from .trt_engine import NO_ENGINE, bind, fitting_engines, load_plan, new_context, queue_step, read_plan

DTYPES = {"INT64": np.int64, "FLOAT": np.float32, "HALF": np.float16}


class TrtEncoder:
    """The engine of the bundle for the most tokens, then rows, that can run here. output: name of the output to give.

    inputs: the names that it reads. size: the output's last dimension. cuda, modules: in place of cuda-python and of the TensorRT
    libraries (tests). Raises Unavailable with the reason where none can run here, UserError for a damaged engine.
    """

    def __init__(self, bundle: EncoderBundle, output: str, *, cuda=None, modules: dict | None = None):
        if not bundle.manifest["engines"]:
            raise Unavailable(NO_ENGINE)
        self._device = Device(cuda)
        tensorrt, entries = fitting_engines(bundle, self._device.gpu, modules)
        entry = max(entries, key=lambda entry: (entry["tokens"], entry["rows"]))
        self._path, self.rows, self.tokens = bundle.path(entry["file"]), entry["rows"], entry["tokens"]
        self._engine = engine = load_plan(tensorrt, read_plan(self._path, entry["bytes"]), self._path)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
        if output not in names or output in self.inputs or {dtypes[name] for name in self.inputs} != {"INT64"} or not set(
                dtypes.values()) <= set(DTYPES):
            raise UserError(f"{self._path}: the engine has {', '.join(f'{name} ({dtype})' for name, dtype in dtypes.items())}, which is no "
                            f"encoder's with {output}; build it again with `python -m export.trt`")
        self._output, self.size = output, engine.get_tensor_shape(output)[-1]
        self._context = new_context(engine, self._device, self._path, 0, "shapes")
        bind(self._context, self._path, {name: (self.rows, self.tokens) for name in self.inputs}, {})
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in names}
        if min(map(min, shapes.values())) < 1:
            raise DeviceError(f"{self._path}: TensorRT does not know how large its outputs are")
        self._memory = Block(self._device, {name: (shapes[name], DTYPES[dtypes[name]]) for name in names})
        self._device.synchronize()

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The output [n, ...], float32, of inputs int64 [n, tokens]. Raises DeviceError, and UserError for too many tokens."""
        rows, tokens = feeds["input_ids"].shape
        if tokens > self.tokens:
            raise UserError(f"{self._path}: takes texts of at most {self.tokens} tokens, and one has {tokens}")
        return np.concatenate([self._once({name: feeds[name][first:first + self.rows] for name in self.inputs})
                               for first in range(0, rows, self.rows)])

    def _once(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Of rows within the profile."""
        bind(self._context, self._path, {name: array.shape for name, array in arrays.items()}, self._memory.addresses)
        for name, array in arrays.items():
            image = self._image(name, array.shape)
            image[...] = array
            self._device.upload(self._memory.addresses[name], image)
        queue_step(self._context, self._device, self._path)
        image = self._image(self._output, tuple(self._context.get_tensor_shape(self._output)))
        self._device.download(image, self._memory.addresses[self._output])
        self._device.synchronize()
        return image.astype(np.float32)

    def _image(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Pinned memory of an array of this shape, at most the largest call's."""
        return self._memory.host[name].reshape(-1)[:np.prod(shape, dtype=int)].reshape(shape)
