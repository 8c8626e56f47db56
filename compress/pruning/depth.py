"""Depth pruning: leave out whole layers, those whose absence the model notices least.

Four orders in which layers go:
- "influence": 1 - cos(what enters a layer, what leaves it), averaged over tokens; one pass over the text (Men et al.
  2024, "ShortGPT", block influence).
- "kl": KL(whole model || model without the layer), one pass for each layer.
- "greedy": the same, measured anew after every removal, because layers stand in for each other; passes grow with
  layers times removals.
- "beam": greedy, with the `BEAM` best sets of removals followed side by side, as many times the passes.

What is left is an ordinary model with fewer layers; nothing is retrained here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.distilling.divergence import kl
from compress.layerwise import fast_matmul
from models.network.decoder import Decoder
from models.progress import progress

BEAM = 3


@torch.no_grad()
def choose_layers(decoder: Decoder, ids: Tensor, drop: int, order: str) -> list[int]:
    """Numbers of the layers to drop, first to go first. ids int64 [windows, tokens]; 0 < drop < number of layers."""
    if order == "influence":
        return torch.tensor(block_influence(decoder, ids)).argsort()[:drop].tolist()
    with fast_matmul():
        whole = [torch.log_softmax(decoder(row[None])[0], -1) for row in ids]
        every = list(range(len(decoder.model.layers)))

        def damage(gone: tuple[int, ...]) -> float:
            bar.update()
            return _divergence(decoder, ids, whole, [n for n in every if n not in gone])

        with progress(label="layers", unit="trial") as bar:
            if order == "kl":
                return sorted(every, key=lambda layer: damage((layer,)))[:drop]
            best: list[tuple[int, ...]] = [()]                   # removals, each in the order they were made
            for _ in range(drop):
                found = {frozenset((*gone, layer)): (*gone, layer) for gone in best for layer in every if layer not in gone}
                best = sorted(found.values(), key=damage)[:BEAM if order == "beam" else 1]
    return list(best[0])


def block_influence(decoder: Decoder, ids: Tensor) -> list[float]:
    """1 - mean cosine of what enters and leaves each layer."""
    totals = [0.0] * len(decoder.model.layers)

    def watch(number: int):
        def hook(layer, inputs, output):
            totals[number] += 1 - F.cosine_similarity(inputs[0], output, -1).mean().item()
        return hook
    hooks = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(decoder.model.layers)]
    try:
        with torch.no_grad(), fast_matmul():
            for row in ids:
                decoder.model(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [total / len(ids) for total in totals]


def _divergence(decoder: Decoder, ids: Tensor, whole: list[Tensor], layers: list[int]) -> float:
    """Mean KL(whole || the model of these layers), nats a token."""
    every = decoder.model.layers
    decoder.model.layers = nn.ModuleList(every[n] for n in layers)
    try:
        return sum(kl(log_p, torch.log_softmax(decoder(row[None])[0], -1)).mean().item()
                   for row, log_p in zip(ids, whole)) / len(ids)
    finally:
        decoder.model.layers = every
