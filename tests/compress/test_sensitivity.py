"""Fisher gradients and damages against per-token autograd and measured KL divergence on random models."""

import pytest
import torch

from compress.quantizing.clipping import clipped_grid
from compress.quantizing.fisher import output_gradients
from compress.quantizing.gptq import DAMPING, activation_order, gptq
from compress.quantizing.grid import Grid
from compress.quantizing.sensitivity import Sensitivity, measure_sensitivity, pivots
from models.checkpoint import load_decoder, open_checkpoint
from models.network.quantized import TensorFormat
from runtime.errors import UserError

FORMATS = [TensorFormat(bits, group) for bits in (2, 4, 8) for group in (32, 128)]


@pytest.fixture(scope="module", params=("smollm2", "gemma2", "gemma4", "qwen3_5", "granite4_tiny"))
def measured(request, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint(request.param))
    ids = torch.randint(0, 384, (32, 48), generator=torch.Generator().manual_seed(1))
    return checkpoint, ids, measure_sensitivity(checkpoint, ids, FORMATS)


def test_every_module_has_every_format_that_fits(measured):
    checkpoint, _, found = measured
    assert set(found.damage) == set(checkpoint.modules())
    for module, row in found.damage.items():
        columns = checkpoint.shape(f"{module}.weight")[1]
        assert set(row) == {form for form in FORMATS if columns % form.group == 0}
        by_bits = [row[TensorFormat(bits, 32)] for bits in (2, 4, 8)]
        assert by_bits[0] > by_bits[1] > by_bits[2] > 0


def test_predicts_measured_divergence_within_a_factor(measured):
    checkpoint, ids, found = measured
    teacher = load_decoder(checkpoint.path)
    with torch.no_grad():
        reference = torch.log_softmax(teacher(ids), -1)
    form, ratios = TensorFormat(4, 32), []
    modules = [m for m in checkpoint.modules() if "layers." in m or m == "model.per_layer_projection"]
    for module in modules[::-(-len(modules) // 14)]:
        decoder = load_decoder(checkpoint.path)
        weight = decoder.get_submodule(module).weight
        inputs = []
        hook = decoder.get_submodule(module).register_forward_pre_hook(lambda m, x: inputs.append(x[0].flatten(0, -2)))
        with torch.no_grad():
            decoder(ids)
            hook.remove()
            hessian = inputs[0].T @ inputs[0] / len(inputs[0])
            grid = clipped_grid(weight.data, form, pivots(hessian))
            weight.data = grid.values(gptq(weight.data, hessian, grid))
            student = torch.log_softmax(decoder(ids), -1)
        ratios.append(float((reference.exp() * (reference - student)).sum(-1).mean()) / found.damage[module][form])
    ratios = torch.tensor(ratios).log()
    assert abs(float(ratios.mean())) < 1.1 and float(ratios.std()) < 0.8, ratios.exp()


def test_pivots_are_the_price_of_gptq():
    """GPTQ's loss is exactly its own rounding errors squared, each times its input's pivot; and where nothing is clipped
    those errors are rounding's, so that rounding to nearest foretells the loss before GPTQ runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian, weight = x.T @ x / 512, torch.randn(200, 64, generator=generator)
    steady = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(64)
    wide = Grid(torch.full((200, 1), 0.25), torch.full((200, 1), 128.0), TensorFormat(8, 0))        # +-32: nothing is clipped
    codes, price = gptq(weight, hessian, wide), pivots(hessian)
    error = weight - wide.values(codes)
    measured = ((error @ steady) * error).sum()

    order = activation_order(hessian)
    left, errors = weight.double().clone(), torch.zeros_like(weight)
    for place, k in enumerate(order):                       # replay the compensation in float64, one inverse an input
        rest = order[place:]
        inverse = torch.linalg.inv(steady.double()[rest][:, rest])
        errors[:, k] = (left[:, k] - wide.values(codes)[:, k]).float()
        left[:, rest] -= errors[:, k, None].double() / inverse[0, 0] * inverse[0]
    assert float((errors.square() @ price).sum() / measured) == pytest.approx(1, rel=1e-3)
    assert errors.abs().max() <= 0.125 * 1.001
    nearest = wide.values(wide.codes(weight)) - weight
    assert float((nearest.square() @ price).sum() / measured) == pytest.approx(1, rel=0.05)


def test_saved_and_loaded(measured, tmp_path):
    checkpoint, _, found = measured
    file = tmp_path / "sensitivity.safetensors"
    found.save(file)
    again = Sensitivity.load(file, checkpoint.sha256())
    assert again.damage == found.damage and set(again.vocabulary) == set(found.vocabulary)
    assert torch.equal(again.vocabulary["model.embed_tokens"], found.vocabulary["model.embed_tokens"])
    with pytest.raises(UserError, match="another checkpoint"):
        Sensitivity.load(file, "0" * 64)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a sensitivity file"):
        Sensitivity.load(file, checkpoint.sha256())


def test_gradients_are_fisher_information(tiny_checkpoint):
    """On one linear: G against the exact expectation over all tokens that could be drawn, by autograd one by one."""
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    ids = torch.randint(0, 384, (200, 2), generator=torch.Generator().manual_seed(2))
    name = "model.layers.1.mlp.down_proj"
    gradients, uses = output_gradients(checkpoint, ids)
    decoder = load_decoder(checkpoint.path).requires_grad_(False)
    total = torch.zeros(64)
    for row in ids[:40]:
        kept = []
        hook = decoder.get_submodule(name).register_forward_hook(lambda m, x, y: kept.append(y.requires_grad_()) or y)
        log_probabilities = torch.log_softmax(decoder(row[None])[0, -1], -1)
        hook.remove()
        jacobian = torch.stack([torch.autograd.grad(log_probabilities[v], kept[0], retain_graph=True)[0][0, -1]
                                for v in range(0, 384)])
        total += (log_probabilities.exp()[:, None] * jacobian.square()).sum(0).detach() / 40
    # The last layer's output reaches only its own token's logits, so position does not matter.
    assert float(gradients[name].sum() / total.sum()) == pytest.approx(1, rel=0.25)
    weights, hessian = uses["lm_head"][0]
    assert weights.shape == (384,) and hessian.shape == (64, 64) and (weights >= 0).all()
