"""A decoder larger than its device: layers that do not fit there come for their turn, and go again.

    for number in streamed(decoder, types, device, spare):
        bring(decoder.model.layers[number], load)           # load(layer) gives it its weights

Between turns a layer's weights are on no device at all ("meta"); they are read from the file for each call. Where gradients
are taken a layer is run again in the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), for
which its weights come once more. Weights that come and go cannot be trained.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.device import free_bytes
from models.network.decoder import Decoder


def streamed(decoder: Decoder, types: dict[str, torch.dtype], device: torch.device, spare: int) -> list[int]:
    """Numbers of the layers that must come for their turn, so that `spare` bytes stay free: none, or the last ones.

    types: of every parameter by its name, when it is on the device."""
    free = None if device.type == "cpu" else free_bytes(device)
    if free is None:
        return []

    bytes_of = {name: types[name].itemsize * math.prod(tensor.shape) for name, tensor in decoder.state_dict().items()}
    sizes = [sum(bytes_of[f"model.layers.{number}.{name}"] for name in layer.state_dict()) for number, layer in enumerate(decoder.model.layers)]
    left = free - spare - (sum(bytes_of.values()) - sum(sizes))
    if sum(sizes) <= left:
        return []
    left -= 2 * max(sizes)                                   # one at its turn, and what it was stored as
    stay = 0
    while stay < len(sizes) and sizes[stay] <= left:
        left, stay = left - sizes[stay], stay + 1
    return list(range(stay, len(sizes)))


def bring(layer: nn.Module, load: Callable[[nn.Module], None]) -> None:
    """Have `load` give the layer its weights whenever it is called."""
    layer.requires_grad_(False)
    layer.forward = partial(_turn, layer, layer.forward, load)


def _turn(layer: nn.Module, forward: Callable, load: Callable, x: Tensor, *told) -> Tensor:
    if torch.is_grad_enabled():
        return checkpoint(_loaded, layer, forward, load, x, *told, use_reentrant=False, preserve_rng_state=False)
    return _loaded(layer, forward, load, x, *told)


def _loaded(layer: nn.Module, forward: Callable, load: Callable, x: Tensor, *told) -> Tensor:
    load(layer)
    layer.requires_grad_(False)
    try:
        return forward(x, *told)
    finally:
        layer.to("meta")
