"""Second moments of what an encoder's linears read, E[x x^T], on text: what quantizing and pruning are calibrated by."""

import torch

from models.encoders.network import alone
from models.progress import progress
from runtime.encoder import Encoded


@torch.no_grad()
def second_moments(model, names, texts: list[Encoded]) -> dict[str, torch.Tensor]:
    """Of the inputs of each linear, by its name, the mean over the tokens of the texts, float32 [K, K]."""
    linears = {name: model.get_submodule(name) for name in names}
    sums = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in linears.items()}
    hooks = [linear.register_forward_pre_hook(lambda _, given, name=name: _add(sums[name], given[0])) for name, linear in linears.items()]
    for one in progress(texts, label="calibrate", unit="text"):
        model(**alone(model, one))
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, texts))
    return {name: moment / tokens for name, moment in sums.items()}


def _add(moment: torch.Tensor, inputs: torch.Tensor) -> None:
    rows = inputs.flatten(0, -2)
    moment.addmm_(rows.T, rows)
