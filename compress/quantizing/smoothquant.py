"""SmoothQuant: move the outliers of activations into the weights, so that both fit 8 bits.

    smooth(layer, walk, formats)      # rewrites the layer's weights in place; its function stays

Input k of a group of linears is divided by s[k] = max|x_k|^a / max|w_k|^(1 - a), a = 1/2, where it is made and multiplied
in the weights (folding.py), after which both are equally hard to round. Maxima are over calibration text and
over all linears of the group. The activations themselves are rounded when the model runs, one scale for each token's
row (models/network/activations.py), never one for a batch: an answer must not depend on its neighbours.

Source: Xiao et al. 2023, "SmoothQuant".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.quantizing.folding import Tie, fold_scales
from compress.layerwise import Walk, largest
from models.network.decoder import Layer
from models.network.quantized import TensorFormat

STRENGTH = 0.5


def smooth(layer: Layer, walk: Walk, formats: dict[str, TensorFormat], strength: float = STRENGTH) -> None:
    """Fold smoothing factors into the groups of linears of `layer` that `formats` names."""
    maxima = walk.inputs(layer, largest)

    def choose(linears: dict[str, nn.Linear], tie: Tie) -> Tensor | None:
        if not any(name in formats for name in linears):
            return None
        activations = maxima[next(iter(linears))].clamp_min(1e-5)
        weights = torch.stack([linear.weight.abs().amax(0) for linear in linears.values()]).amax(0).clamp_min(1e-5)
        scales = tie(activations**strength / weights ** (1 - strength))
        return scales / scales.log().mean().exp()
    fold_scales(layer, choose)
