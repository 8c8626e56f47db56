"""AWQ: scale the inputs that matter up before rounding, and fold the inverse into what comes before.

    awq(layer, walk, formats)        # rewrites the layer's weights in place; its function stays

An input k of a group of linears is multiplied by s[k] in their weights and divided by s[k] where it is made
(folding.py), so that no factor is left unabsorbed and nothing costs a byte or an operation more. s = (mean square of
the input)^(a/2), normalized to a geometric mean of 1, where a is the one of `EXPONENTS` with the least output error sum
(dW H dW^T) over the linears' sampled rows after rounding to nearest on the clipped grid; a = 0 changes nothing, so the
estimate never grows.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization". Of that paper the scale search is here; clipping is
clipping.py. It composes with GPTQ, which then starts from weights that are easier to round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.quantizing.clipping import clipped_grid
from compress.quantizing.folding import fold_scales
from compress.quantizing.gptq import damped
from compress.layerwise import Walk, second_moment
from models.network.decoder import Layer
from models.network.quantized import TensorFormat

EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
ROWS = 128                     # rows of each linear that the search rounds


@torch.no_grad()
def awq(layer: Layer, walk: Walk, formats: dict[str, TensorFormat]) -> None:
    """Fold scales into `layer`, in place. formats: the layer's linears that will be quantized, and how."""
    moments = walk.inputs(layer, second_moment)

    def choose(linears: dict[str, nn.Linear], tie: Callable[[Tensor], Tensor]) -> Tensor | None:
        wanted = {name: formats[name] for name in linears if name in formats}
        return _search(linears, moments[next(iter(linears))], wanted, tie) if wanted else None
    fold_scales(layer, choose)


def _search(linears: dict[str, nn.Linear], hessian: Tensor, formats: dict[str, TensorFormat], tie) -> Tensor:
    """The factors [K] with the least output error of the linears that will be rounded."""
    hessian = damped(hessian)
    loudness = hessian.diagonal()
    best, found = None, None
    for exponent in EXPONENTS:
        scales = tie(loudness ** (exponent / 2))
        scales = scales / scales.log().mean().exp()
        error = 0.0
        for name, form in formats.items():
            weight = linears[name].weight
            sample = weight[::max(1, len(weight) // ROWS)]
            grid = clipped_grid(sample * scales, form, loudness / scales**2)
            lost = grid.values(grid.codes(sample * scales)) / scales - sample
            error += float(((lost @ hessian) * lost).sum()) * len(weight) / len(sample)
        if best is None or error < best:
            best, found = error, scales
    return found
