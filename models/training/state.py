"""What a training run keeps on disk, and how it comes back after kill -9.

    OUT/last/                            newest checkpoint (a Hugging Face folder), and beside its weights:
    OUT/last/training_state/state.json   step, options, inputs, best loss, loss scale
    OUT/last/training_state/state.safetensors   parameters in training, AdamW's two moments or SGD's one
    OUT/best/                            checkpoint with the lowest validation loss
    OUT/metrics.jsonl                    one line a step and an evaluation
    OUT/logs/                            TensorBoard

A checkpoint is written whole beside the old one, then takes its place (runtime/files.py). The order of the data is a
function of the step, and nothing random is drawn after initialization, so this state is all that an exact continuation
needs. Ctrl-C and SIGTERM let the step that runs come to its end, and the state is written (`noticed`).
"""

import dataclasses
import errno
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from models.formats.safetensors_file import save_tensors
from runtime.errors import UserError
from runtime.files import parse_json, read_json, restored, write

FOLDER, STATE, TENSORS = "training_state", "state.json", "state.safetensors"
MAY_CHANGE = {"out", "resume", "cache", "device", "micro_batch"}      # options that do not change what is learned, but for rounding
MAY_GROW = ("steps", "epochs")               # a longer run goes on where a shorter one stands
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Stop:
    """Whether somebody wants the run to end: `signal` is the number of the signal that said so, or None."""

    signal: int | None = None
    at_once = False              # nothing would be lost or half-done: leave without waiting for the step
    hurried = False              # asked twice: left in the middle of something, which is not to be saved

    def ask(self, number: int, frame) -> None:
        self.hurried = self.signal is not None
        self.signal = number
        if self.at_once or self.hurried:
            self.leave()

    def leave(self) -> None:
        """Raises KeyboardInterrupt for Ctrl-C, else SystemExit with a shell's code for the signal (SIGTERM: 143)."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


@contextmanager
def noticed() -> Iterator[Stop]:
    """Meanwhile Ctrl-C and SIGTERM only say so in the Stop that is given; whoever runs the steps looks there between two."""
    stop, old = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        old = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}
    for number in old:
        signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def told_of_the_disk(out: Path) -> Iterator[None]:
    """Meanwhile a log or metric in `out` that cannot be written is a UserError. TensorBoard writes from a thread of its
    own, which hands its error to the next call: what Python would print of that thread besides is left out."""
    def hook(said):
        if not isinstance(said.exc_value, OSError):
            old(said)
    old, threading.excepthook = threading.excepthook, hook
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        for thread in threading.enumerate():                 # it may be about to be told of
            if type(thread).__module__.startswith("tensorboard."):
                thread.join(1)
        raise UserError(f"{error.filename or out / 'logs'} could not be written ({error.strerror}). Free some space and continue with "
                        "--resume") from None
    finally:
        threading.excepthook = old


def comparable(options) -> dict:
    """The options that decide what is learned, as plain JSON."""
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {key: value for key, value in plain.items() if key not in MAY_CHANGE}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; one that is sharded over processes is gathered, for which all of them call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def training_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], int]:
    """(trainable parameters and their moments by name, updates made so far). All processes call this together."""
    tensors, updates = {}, 0
    for name, parameter in _trainable(module):
        tensors[f"parameter.{name}"] = whole(parameter)
        moments = optimizer.state.get(parameter, {})
        updates = int(moments.get("step", 0))
        tensors |= {f"{moment}.{name}": whole(moments[moment]) for moment in MOMENTS if moment in moments}
    return tensors, updates


def save_state(checkpoint: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write `checkpoint`/training_state."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    save_tensors(folder / TENSORS, tensors)
    (folder / STATE).write_text(json.dumps(state, indent=1))


def load_state(out: Path, options, inputs: dict) -> dict | None:
    """The state of OUT/last, or None. Raises UserError where `options` or `inputs` differ, naming them.

    More steps than before do not count as another run, nor the longer warm-up that goes with them unasked.
    """
    file = restored(out / "last") / FOLDER / STATE
    if not file.is_file():
        return None
    state = read_json(file, strict=False)                # the lowest loss is infinite before there is one
    kinds = {"step": int, "updates": int, "best": float, "bad_evaluations": int, "options": dict, "inputs": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
        raise UserError(f"{file}: {wrong[0]} is missing or of another type: it is not the state of a run")
    now = comparable(options)
    before = {key: value for key, value in state["options"].items() if key not in MAY_CHANGE}
    grown = [key for key in MAY_GROW if (now.get(key) or 0) > (before.get(key) or 0)]
    if "steps" in grown and all(o.get("warmup") == o["steps"] // 20 for o in (now, before)):
        grown.append("warmup")
    changed = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in sorted(now.keys() | before.keys())
               if now.get(key) != before.get(key) and key not in grown]
    changed += [f"the contents of {key} changed" for key in sorted(inputs) if inputs[key] != state["inputs"].get(key)]
    if changed:
        raise UserError(f"{out}: cannot resume with changed options: {'; '.join(changed)}. Give the old ones, or "
                        "another -o for a new run")
    return state


def load_tensors(out: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Put the parameters and moments of OUT/last back, in place."""
    place = out / "last" / FOLDER / TENSORS
    try:
        with safe_open(place, framework="pt") as file, torch.no_grad():
            held = set(file.keys())
            for name, parameter in _trainable(module):
                parameter.copy_(_as_held(file.get_tensor(f"parameter.{name}"), parameter))
                moments = {moment: _as_held(file.get_tensor(f"{moment}.{name}"), parameter) for moment in MOMENTS if f"{moment}.{name}" in held}
                if "exp_avg" in moments:
                    moments["step"] = torch.full((), float(updates), device=parameter.device)
                if moments:
                    optimizer.state[parameter] = moments
    except (SafetensorError, OSError, RuntimeError) as error:            # RuntimeError: a tensor of another shape
        raise UserError(f"{place} cannot be read ({str(error).splitlines()[0]}): the run cannot be resumed from it") from None


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`: they will be measured again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            if parse_json(line, strict=False)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):            # a dying process leaves half a line
            continue
    write(file, "".join(kept))


def _as_held(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor on the parameter's device, sharded as the parameter is."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _trainable(module):
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
