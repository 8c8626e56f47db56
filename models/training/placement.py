"""Where a run computes, and in what: its process among those launched with it, its device, its precision."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from models.device import find_device, has_bf16, prefers_bf16
from runtime.errors import UserError


def process_state(asked: str = "auto") -> PartialState:
    """This process among those launched with it, on the device of `--device`. On CPUs they speak gloo.

    Launched with others, a process computes on the GPU of its own rank. ACCELERATE_USE_CPU=true, which `accelerate launch --cpu`
    sets, counts as --device cpu where no other is asked for. Raises UserError where the device is not there.
    """
    if asked == "auto" and parse_flag_from_env("ACCELERATE_USE_CPU"):
        asked = "cpu"
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    if launched and ":" in asked:
        raise UserError(f"--device {asked}: of the processes launched together each takes a GPU of its own: give --device cuda or leave it "
                        "out, and choose GPUs with CUDA_VISIBLE_DEVICES")
    device = find_device(asked)
    known = PartialState._shared_state.get("device")
    if known is not None and (known.type if launched else known) != (device.type if launched else device):
        PartialState._reset_state()              # a run before this one in the process computed elsewhere
    state = PartialState(cpu=device.type == "cpu")
    if not launched and state.device != device:
        state.device = device
    if device.type == "cuda" and not launched:
        torch.cuda.set_device(device)
    return state


def mixed_precision(asked: str, device: torch.device) -> str:
    """accelerate's name for the precision, refused where the device does not compute in it."""
    if asked == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU, and this run computes on the CPU: use fp32")
    if asked == "bf16" and not has_bf16(device):
        raise UserError("--precision bf16: this device does not compute in bf16: use fp32")
    return {"auto": "bf16" if prefers_bf16(device) else "no", "fp32": "no"}.get(asked, asked)
