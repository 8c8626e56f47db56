"""AWQ, SmoothQuant and rotations: the model's function stays, and its weights become easier to round."""

import pytest
import torch
from tiny import EVERY_FAMILY

from compress.quantizing.calibrated import clip
from compress.layerwise import Walk, second_moment
from compress.quantizing.folds import awq, rotate_values, rotation, smooth
from models.checkpoint import load_decoder, open_checkpoint
from models.network.decoder import named_groups
from models.network.quantized import TensorFormat
from runtime.errors import UserError

FOLDS = {"awq": awq, "smooth": smooth, "values": lambda layer, walk, formats: rotate_values(layer, seed=3)}


def folded(path, ids, fold, forms):
    """The model with every layer folded, and the walk's layers."""
    checkpoint, decoder = open_checkpoint(path), load_decoder(path).requires_grad_(False)
    walk = Walk(checkpoint, ids)
    for number in range(len(checkpoint.config.layers)):
        layer = walk.load(number)
        # What a real model has and a random one lacks: inputs of very different loudness.
        fold(layer, walk, {name: TensorFormat(*forms) for name, module in layer.named_modules()
                         if isinstance(module, torch.nn.Linear) and not name.endswith("router")})
        decoder.model.layers[number].load_state_dict(layer.state_dict())
        walk.step(layer)
    return decoder


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("fold", FOLDS)
def test_the_function_stays(family, fold, tiny_checkpoint):
    path = tiny_checkpoint(family)
    if fold == "values" and open_checkpoint(path).config.attention_gate:
        with pytest.raises(UserError, match="by a gate, which no rotation passes"):
            folded(path, torch.zeros(2, 8, dtype=torch.long), FOLDS[fold], (3, 32))
        return
    ids = torch.randint(0, 384, (6, 40), generator=torch.Generator().manual_seed(0))
    before, after = load_decoder(path).requires_grad_(False), folded(path, ids, FOLDS[fold], (3, 32))
    assert torch.allclose(after(ids), before(ids), atol=2e-3, rtol=1e-3)
    changed = {name for name, p in after.named_parameters() if not torch.allclose(p, before.get_parameter(name))}
    if fold == "values":
        assert {name for name in changed if name.endswith("v_proj.weight")} == {
            name for name, _ in before.named_parameters() if name.endswith("v_proj.weight")}
    if fold == "smooth":                       # all that has a maker has moved, on both sides
        expected = {f"{name}.weight" for blocks in named_groups(before.config) for groups in blocks for group in groups
                    if group.maker is not None for name in (*group.readers, group.maker)}
        assert expected <= changed


@pytest.mark.parametrize("fold", ["awq", "values"])
def test_rounding_then_costs_less(fold, tiny_checkpoint):
    """A layer with loud inputs, or outliers among a head's channels: output error of clipped rounding, before and after."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    ids = torch.randint(0, 384, (8, 40), generator=torch.Generator().manual_seed(0))
    walk = Walk(checkpoint, ids)
    layer = walk.load(0)
    if fold == "awq":
        layer.input_layernorm.weight[::9] *= 20
    else:
        layer.self_attn.v_proj.weight[::16] *= 20
        layer.self_attn.o_proj.weight[:, ::16] *= 3
    name, form = ("self_attn.q_proj", TensorFormat(3, 32)) if fold == "awq" else ("self_attn.o_proj", TensorFormat(3, 0))

    def error():
        hessian, weight = walk.inputs(layer, second_moment)[name], layer.get_submodule(name).weight
        lost = clip(weight.data, hessian, form).dequantize() - weight
        return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())
    before = error()
    FOLDS[fold](layer, walk, {name: form})
    assert error() < 0.9 * before


def test_smoothing_evens_out_the_loudest_inputs(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2"))
    walk = Walk(checkpoint, torch.randint(0, 384, (8, 40), generator=torch.Generator().manual_seed(0)))
    layer = walk.load(0)
    layer.post_attention_layernorm.weight[5] *= 50

    def spread():
        diagonal = walk.inputs(layer, second_moment)["mlp.gate_proj"].diagonal()
        return float(diagonal.max() / diagonal.median())
    before = spread()
    smooth(layer, walk, {"mlp.up_proj": TensorFormat(8, 0)})
    assert spread() < 0.1 * before


@pytest.mark.parametrize("size", [1, 2, 16, 64, 24, 576])
def test_rotations_are_orthogonal_and_spread(size):
    turn = rotation(size, torch.Generator().manual_seed(0))
    assert torch.allclose(turn @ turn.T, torch.eye(size), atol=1e-5)
    if size & (size - 1) == 0:
        assert torch.allclose(turn.abs(), torch.full_like(turn, size**-0.5))
