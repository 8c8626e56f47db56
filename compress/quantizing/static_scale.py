"""One scale for an input of linears, whatever the text: the step to int8 that harms their outputs least.

max|x| / 127 rounds every input to a grid that its one largest value has chosen. A smaller scale clips that value and
rounds all others more finely: of max|x| / 127 times RATIOS the one whose squared error, weighted by the importance (the
squared weights of the linears behind, summed over their outputs), is least over a sample of the text. It does not help
where a few values carry the model and all others too, as what down_proj reads in most models: quantize leaves these alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.layerwise import largest
from models.network.activations import fake_int8

RATIOS = [2 ** (-n / 2) for n in range(7)]
SAMPLE = 2048                       # tokens whose error is measured


def static_scale(inputs: list[Tensor], importance: Tensor) -> Tensor:
    """Float32 [1]; 1 for inputs that are always zero. inputs: chunks [..., K]; importance [K]."""
    most = largest(inputs).amax(0, keepdim=True)
    if most == 0:
        return torch.ones(1)
    rows = torch.cat([part.flatten(0, -2) for part in inputs[::max(1, len(inputs) // 16)]])
    rows = rows[::-(-len(rows) // SAMPLE)]
    scales = [most * ratio / 127 for ratio in RATIOS]
    errors = torch.stack([((fake_int8(rows, scale) - rows).square() @ importance).sum() for scale in scales])
    return scales[int(errors.argmin())]
