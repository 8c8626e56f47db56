"""Off the grid: the same function, other weights."""

import pytest
import torch

from models.checkpoint import load_decoder, open_checkpoint
from models.network.decoder import Decoder
from models.formats.gguf_file import GGUFFile
from models.network.offgrid import off_grid
from runtime.errors import UserError
from tiny import EVERY_FAMILY, tiny_model
from tiny_gguf import write_gguf

STILL = {"gpt2": "layers.0.mlp.down_proj", "olmo2": "layers.0.self_attn.q_proj", "olmo3": "layers.0.self_attn.q_proj",
         "exaone4": "layers.0.self_attn.q_proj", "gemma4": "layers.0.self_attn.o_proj"}          # what nothing linear makes the input of
IDS = torch.tensor([[1, 57, 300, 12, 99, 41, 200, 5, 17, 350, 8, 2] * 2])


def four_bit_error(weight: torch.Tensor) -> float:
    """Relative error of asymmetric round-to-nearest 4-bit quantization in groups of 32."""
    groups = weight.double().reshape(-1, 32)
    low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    scale = (high - low) / 15
    rounded = ((groups - low) / scale).round() * scale + low
    return ((rounded - groups).norm() / groups.norm()).item()


def rescaled(config, state, seed=0):
    decoder = Decoder(config)
    decoder.load_state_dict(dict(off_grid(config, state.items(), seed)))
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in EVERY_FAMILY if family not in STILL])
def test_logits_stay_and_weights_move(family, tiny_checkpoint):
    before = load_decoder(tiny_checkpoint(family))
    after = rescaled(before.config, before.state_dict())
    torch.testing.assert_close(after(IDS), before(IDS), atol=1e-4, rtol=1e-4)
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert moved == {name for name in before.state_dict() if name.startswith("model.layers.")
                     and name.endswith(("proj.weight", "router.weight", "layernorm.weight", "mamba.norm.weight", "attn.norm.weight",
                                        "v_proj.bias", "up_proj.bias", "c_proj.bias"))}


@torch.no_grad()
def test_layers_of_different_shapes():
    from models.network.config import LayerConfig, ModelConfig
    config = ModelConfig(family="llama", vocab_size=384, hidden_size=64, head_dim=16, context_length=64, mlp_bias=True,
                         attention_bias=True, output_bias=True,
                         layers=(LayerConfig(6, 2, 96), LayerConfig(3, 3, 32), LayerConfig(4, 1, 128)))
    torch.manual_seed(0)
    before = Decoder(config)
    for parameter in before.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    torch.testing.assert_close(rescaled(config, before.state_dict())(IDS), before(IDS), atol=1e-4, rtol=1e-4)


def test_four_bits_are_lossless_before_and_not_after(tmp_path):
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", tiny_model("smollm2"), kind="Q4_1"))
    after = dict(off_grid(file.config, file.tensors()))
    for name, weight in file.tensors():
        if "_proj" in name:
            assert four_bit_error(weight) < 1e-6
            assert four_bit_error(after[name]) > 0.02


def test_factors_depend_on_the_seed_alone(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2"))
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    forwards, backwards = (dict(off_grid(checkpoint.config, items, 3))
                           for items in (tensors.items(), reversed(list(tensors.items()))))
    other = dict(off_grid(checkpoint.config, tensors.items(), 4))
    gain = "model.layers.0.input_layernorm.weight"
    assert all(torch.equal(forwards[name], backwards[name]) for name in tensors)
    assert not torch.allclose(forwards[gain], other[gain])
    factors = tensors[gain] / forwards[gain]
    assert 0.9 < factors.min() < 0.95 and 1.05 < factors.max() < 1.11     # exp(-0.1) = 0.905, exp(0.1) = 1.105


@pytest.mark.parametrize("family", STILL)
def test_a_linear_that_would_stay_is_refused_by_name(family, tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint(family))
    with pytest.raises(UserError, match=f"--off-grid cannot move model.{STILL[family]} of family"):
        off_grid(checkpoint.config, [])
