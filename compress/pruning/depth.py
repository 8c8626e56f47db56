"""Depth pruning: leave out whole layers, those whose absence the model notices least.

Four orders in which layers go:
- "influence": 1 - cos(what enters a layer, what leaves it), averaged over tokens; one pass over the text (Men et al.
  2024, "ShortGPT", block influence).
- "kl": KL(whole model || model without the layer), one pass for each layer.
- "greedy": the same, measured anew after every removal, because layers stand in for each other; passes grow with
  layers times removals.
- "beam": greedy, with the `BEAM` best sets of removals followed side by side, as many times the passes.

What is left is an ordinary model with fewer layers; nothing is retrained here. A layer whose keys and values later ones read stays.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.activations import Parts, home_for, room
from compress.distilling.divergence import kl
from compress.layerwise import fast_matmul
from models.checkpoint import SPARE
from models.network.config import ModelConfig
from models.network.decoder import Decoder
from models.progress import progress
from runtime.errors import UserError

BEAM = 3


@torch.no_grad()
def choose_layers(decoder: Decoder, ids: Tensor, drop: int, order: str, stay: frozenset[int] = frozenset()) -> list[int]:
    """Numbers of the layers to drop, first to go first, none of those that `stay`. ids int64 [windows, tokens]; drop: at least 1, at
    most as many as may go, and not all layers. Computed where the decoder and ids are."""
    if order == "influence":
        return [n for n in torch.tensor(block_influence(decoder, ids)).argsort().tolist() if n not in stay][:drop]
    with fast_matmul():
        whole = _predictions(decoder, ids)
        every = list(range(len(decoder.model.layers)))
        free = [n for n in every if n not in stay]

        def damage(gone: tuple[int, ...]) -> float:
            bar.update()
            return _divergence(decoder, ids, whole, [n for n in every if n not in gone])

        with progress(label="layers", unit="trial") as bar:
            if order == "kl":
                return sorted(free, key=lambda layer: damage((layer,)))[:drop]
            best: list[tuple[int, ...]] = [()]                   # removals, each in the order they were made
            for _ in range(drop):
                found = {frozenset((*gone, layer)): (*gone, layer) for gone in best for layer in free if layer not in gone}
                best = sorted(found.values(), key=damage)[:BEAM if order == "beam" else 1]
    return list(best[0])


def block_influence(decoder: Decoder, ids: Tensor) -> list[float]:
    """1 - mean cosine of what enters and leaves each layer."""
    alike: list[list[Tensor]] = [[] for _ in decoder.model.layers]

    def watch(number: int):
        def hook(layer, inputs, output):
            alike[number].append(F.cosine_similarity(inputs[0], output, -1).mean())
        return hook
    hooks = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(decoder.model.layers)]
    try:
        with torch.no_grad(), fast_matmul():
            for row in ids:
                decoder.model(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [sum(1 - cosine for cosine in torch.stack(found).tolist()) / len(ids) for found in alike]


def kept_config(config: ModelConfig, left: list[int]) -> ModelConfig:
    """The model of these layers. Raises UserError where one reads the keys and values of one that is not among them, and where no
    config.json can say what is left."""
    layers = []
    for number in left:
        layer, source = config.layers[number], config.layers[number].cache_source
        if source is not None and source not in left:
            raise UserError(f"layer {number} reads the keys and values of layer {source}, which would be left out")
        layers.append(layer if source is None else replace(layer, cache_source=left.index(source)))
    kept = replace(config, layers=tuple(layers))
    try:
        kept.to_hf()
    except ValueError as error:
        raise UserError(f"layers {', '.join(map(str, left))} alone are a model that config.json cannot say: {error}") from None
    return kept


def kept_tensors(config: ModelConfig, left: list[int], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Of the tensors of a model, those of `kept_config`, by their new names."""
    new, size = {old: n for n, old in enumerate(left)}, config.per_layer_size
    for name, tensor in tensors:
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(number) in new:
                yield f"model.layers.{new[int(number)]}.{rest}", tensor
            continue
        if name in ("model.per_layer_embed.weight", "model.per_layer_projection.weight") and len(left) < len(config.layers):
            axis = int(name == "model.per_layer_embed.weight")                   # a part for every layer
            tensor = torch.cat([tensor.narrow(axis, n * size, size) for n in left], axis)
        yield name, tensor


def _predictions(decoder: Decoder, ids: Tensor) -> Parts:
    """The decoder's log-probabilities of every window, a window a part, where they fit."""
    whole = None
    for number, row in enumerate(ids):
        found = torch.log_softmax(decoder(row[None]), -1)
        if whole is None:
            shape = (len(ids), *found.shape[1:])
            whole = Parts(room(shape, home_for(4 * math.prod(shape), ids.device, SPARE), ids.device), 1, ids.device)
        whole.put(number, found)
    return whole


def _divergence(decoder: Decoder, ids: Tensor, whole: Parts, layers: list[int]) -> float:
    """Mean KL(whole || the model of these layers), nats a token."""
    every = decoder.model.layers
    decoder.model.layers = nn.ModuleList(every[n] for n in layers)
    try:
        found = [kl(log_p[0], torch.log_softmax(decoder(row[None])[0], -1)).mean() for row, log_p in zip(ids, whole)]
        return sum(torch.stack(found).tolist()) / len(ids)
    finally:
        decoder.model.layers = every
