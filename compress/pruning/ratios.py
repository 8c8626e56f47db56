"""How sparse every linear should be, so that the zeros of a whole model cost least.

    ratios = sparsity_ratios(checkpoint, ids, "wanda", 0.5)        # module -> fraction of zeros, 0.5 of all weights

What the zeros of a linear cost is the estimate of compress/quantizing/sensitivity.py, in nats of KL divergence a token,
with the weight itself as the error: 1/2 sum_o G[o] sum_k p[k] w[o, k]^2 over the weights that go, p the pivots of the
inputs' Hessian for SparseGPT, which compensates, else its diagonal. A linear's costs grow faster the sparser it gets,
so the cheapest next step of STEP, over all linears, is taken until there are zeros enough.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from compress.layerwise import Walk, second_moment
from compress.quantizing.sensitivity import output_gradients, pivots
from models.formats.checkpoint import Checkpoint

STEP = 0.05
WINDOWS = 24                # that gradients are taken of, at most: a forward and a backward pass of the whole model


def sparsity_ratios(checkpoint: Checkpoint, ids: Tensor, score: str, fraction: float) -> dict[str, float]:
    """Module -> fraction of zeros, `fraction` of all weights of the layers' linears. ids: int64 [windows, tokens]."""
    gradients, _ = output_gradients(checkpoint, ids[:: -(-len(ids) // WINDOWS)])
    curves, sizes, walk = {}, {}, Walk(checkpoint, ids)
    for number, layer in walk.layers("ratios"):
        def visit(names: list[str], inputs: list[Tensor]) -> None:
            moment = second_moment(inputs)
            price = pivots(moment) if score == "sparsegpt" else moment.diagonal()
            for name in names:
                module, weight = f"model.layers.{number}.{name}", layer.get_submodule(name).weight
                cost = weight.square() * price
                order = (weight.abs() if score == "magnitude" else cost).argsort(1)
                curves[module] = 0.5 * (gradients[module] @ cost.gather(1, order)).cumsum(0)        # by zeros in a row
                sizes[module] = weight.numel()
        walk.step(layer, visit)
    return cheapest_ratios(curves, sizes, fraction)


def cheapest_ratios(curves: dict[str, Tensor], sizes: dict[str, int], fraction: float) -> dict[str, float]:
    """Module -> fraction of zeros. curves: module -> cost [K] of 1 to K zeros in every row; sizes: weights of a module."""
    steps = dict.fromkeys(curves, 0)

    def cost(module: str, taken: int) -> float:
        zeros = round(taken * STEP * len(curves[module]))
        return float(curves[module][zeros - 1]) if zeros else 0.0

    def following(module: str) -> tuple[float, str]:
        return (cost(module, steps[module] + 1) - cost(module, steps[module])) / sizes[module], module
    queue = [following(module) for module in curves]
    heapq.heapify(queue)
    wanted = fraction * sum(sizes.values())
    while queue and sum(STEP * steps[module] * sizes[module] for module in steps) < wanted - 1e-6:
        _, module = heapq.heappop(queue)
        steps[module] += 1
        if (steps[module] + 1) * STEP < 1:                  # a linear of zeros alone is another model
            heapq.heappush(queue, following(module))
    return {module: round(taken * STEP, 6) for module, taken in steps.items()}
