"""Sparse weights: set the least useful ones to zero, and keep every shape.

`pattern` is a fraction of each output row's weights (0.5), or "2:4", two zeros in every four neighbouring inputs.
Which weights go:
- "magnitude": the smallest |w|.
- "wanda": the smallest |w| |x_j|, with |x_j| the norm of input j over the text (Sun et al. 2024).
- "sparsegpt": in blocks of columns the smallest w^2 / [U]_jj^2, and every column that loses weights passes its error on to
  those behind it, as GPTQ does (Frantar and Alistarh 2023); U is the Cholesky factor of the inverse second moment.

Zeros save nothing by themselves: neither ONNX Runtime nor the native core skips them, a file shrinks only under
compression, and 2:4 gains speed on NVIDIA tensor cores alone (TensorRT, SM80 and later). Structured pruning
(depth.py, width.py) is what makes a model faster everywhere.
"""

import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

from compress.layerwise import Walk, rewritten, second_moment
from compress.quantizing.gptq import factorize
from compress.quantizing.fisher import output_gradients
from compress.quantizing.sensitivity import pivots
from models.checkpoint import Checkpoint
from models.network.decoder import Layer
from runtime.errors import UserError

STEP = 0.05
WINDOWS = 24                # that gradients are taken of, at most: a forward and a backward pass of the whole model
BLOCK = 128                 # columns whose zeros SparseGPT chooses at once; 4 of them where the pattern is 2:4


def parse_pattern(text: str) -> float | str:
    """"2:4", or a fraction above 0 and below 1. Raises UserError for anything else."""
    if text == "2:4":
        return text
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise UserError(f"the sparsity is {text!r}, which should be 2:4 or a fraction between 0 and 1")
    return fraction


def zeros(score: Tensor, pattern: float | str) -> Tensor:
    """Which of score [N, K] are among the smallest: bool [N, K]. 2:4 counts within every four columns."""
    if pattern == "2:4":
        small = score.unflatten(1, (-1, 4)).argsort(dim=-1, stable=True).argsort(-1) < 2
        return small.flatten(1)
    drop = int(round(pattern * score.shape[1]))
    return score.argsort(dim=1, stable=True).argsort(1) < drop


def sparsegpt(weight: Tensor, moment: Tensor, pattern: float | str) -> Tensor:
    """The weight [N, K] with zeros, what is left corrected for them; moment = E[x x^T] [K, K]."""
    columns = weight.shape[1]
    upper, _ = factorize(moment, torch.arange(columns, device=moment.device))
    left, block = weight.clone(), 4 if pattern == "2:4" else BLOCK
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        diagonal = upper.diagonal()[part]
        gone = zeros((left[:, part] / diagonal).square(), pattern)
        errors = torch.zeros_like(left[:, part])
        for j in range(part.stop - start):
            column = start + j
            kept = torch.where(gone[:, j], 0.0, left[:, column])
            errors[:, j] = (left[:, column] - kept) / upper[column, column]
            left[:, column:part.stop] -= errors[:, j, None] * upper[column, column:part.stop]
            left[:, column] = kept
        left[:, part.stop:] -= errors @ upper[part, part.stop:]
    return left


def sparsified(checkpoint: Checkpoint, ids: Tensor, score: str, pattern: float | str,
               ratios: dict[str, float] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model, the linears of every layer sparse. ids int64 [windows, tokens].

    ratios: module -> pattern of its own.
    """
    walk, modules = Walk(checkpoint, ids), checkpoint.modules()

    def change(number: int, layer: Layer) -> dict[str, Tensor]:
        def visit(names, inputs):
            moment = second_moment(inputs)
            for name in names:
                if f"model.layers.{number}.{name}" not in modules:                  # a router
                    continue
                linear = layer.get_submodule(name)
                share = pattern if ratios is None else ratios[f"model.layers.{number}.{name}"]
                if score == "sparsegpt":
                    weight = sparsegpt(linear.weight, moment, share)
                else:
                    norms = moment.diagonal().sqrt() if score == "wanda" else moment.new_ones(linear.in_features)
                    weight = linear.weight.masked_fill(zeros(linear.weight.abs() * norms, share), 0)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        walk.step(layer, visit)
        return layer.state_dict()
    return rewritten(walk, score, change)


def sparsity_ratios(checkpoint: Checkpoint, ids: Tensor, score: str, fraction: float) -> dict[str, float]:
    """Module -> fraction of zeros, `fraction` of all weights of the layers' linears, so that all together cost least.

    What zeros cost is the estimate of compress/quantizing/sensitivity.py with the weight itself as the error: 1/2 sum_o G[o]
    sum_k p[k] w[o, k]^2 over the weights that go, p the pivots of the inputs' Hessian for SparseGPT, which compensates, else
    its diagonal. A linear's costs grow the sparser it gets, so the cheapest next STEP, over all linears, is taken until there
    are zeros enough. ids: int64 [windows, tokens].
    """
    gradients, _ = output_gradients(checkpoint, ids[:: -(-len(ids) // WINDOWS)])
    curves, sizes, walk, modules = {}, {}, Walk(checkpoint, ids), checkpoint.modules()
    for number, layer in walk.layers("ratios"):
        def visit(names: list[str], inputs: list[Tensor]) -> None:
            moment = second_moment(inputs)
            price = pivots(moment) if score == "sparsegpt" else moment.diagonal()
            for name in names:
                module, weight = f"model.layers.{number}.{name}", layer.get_submodule(name).weight
                if module not in modules:
                    continue
                cost = weight.square() * price
                order = (weight.abs() if score == "magnitude" else cost).argsort(dim=1, stable=True)
                curves[module] = 0.5 * (gradients[module].to(walk.device) @ cost.gather(1, order)).cumsum(0).cpu()     # by zeros in a row
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
