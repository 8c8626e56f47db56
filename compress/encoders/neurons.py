"""Fewer neurons in an encoder's MLPs, the same number in every layer, because config.json has one intermediate_size.

    python -m compress.prune ENCODER -o OUT --what mlp --neurons 768 --data FILES

Which stay and how they take over for the others is as for decoders (compress/pruning/width.py): the neurons of a layer that contribute
most, E[x_j^2] |W_j|^2, and the last linear's weights over them by least squares. The inputs are those of the whole network on the text.
"""

import copy

import torch
from torch import nn

from compress.encoders.layers import layers_of
from compress.pruning.width import take_over
from runtime.errors import UserError

_KEYS = ("intermediate_size", "hidden_dim")              # of config.json: BERT's, DistilBERT's


def neurons_of(model) -> tuple[str, list[tuple[str, str]]]:
    """The configuration's key of the width, and of each layer the names of the linear into the neurons and of that out of them.
    Raises UserError for MLPs of another build."""
    key = next((key for key in _KEYS if hasattr(model.config, key)), None)
    found, names = [], {module: name for name, module in model.named_modules()}
    for layer in layers_of(model) if key else ():
        size, linears = getattr(model.config, key), [part for part in layer.modules() if isinstance(part, nn.Linear)]
        pairs = [(names[into], names[out]) for into, out in zip(linears, linears[1:])
                 if into.out_features == out.in_features == size and into.in_features == out.out_features == model.config.hidden_size != size]
        found += pairs if len(pairs) == 1 else []
    if not found or len(found) != len(layers_of(model)):
        raise UserError(f"a {model.config.model_type} model has no MLPs of two linears, {key or 'intermediate_size'} wide: prune depth instead")
    return key, found


def narrowed(model, moments: dict[str, torch.Tensor], neurons: int):
    """A copy with so many neurons a layer. moments: E[x x^T] [K, K] of the inputs of each linear out of the neurons, by its name."""
    student = copy.deepcopy(model)
    key, pairs = neurons_of(student)
    for into, out in pairs:
        reader, writer, moment = student.get_submodule(into), student.get_submodule(out), moments[out]
        kept = (moment.diagonal() * writer.weight.detach().square().sum(0)).topk(neurons).indices.sort().values
        weight = take_over(writer.weight.detach(), moment, kept)
        for linear, changed in ((reader, {"weight": reader.weight[kept], "bias": reader.bias[kept]}), (writer, {"weight": weight})):
            for name, tensor in changed.items():
                setattr(linear, name, nn.Parameter(tensor.detach().clone()))
        reader.out_features = writer.in_features = neurons
    setattr(student.config, key, neurons)
    return student
