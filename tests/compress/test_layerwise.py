"""The calibration walk against hooks on the whole model, for every family."""

import pytest
import torch
from torch import nn

from tiny import EVERY_FAMILY

from compress.layerwise import Walk, passed_through, second_moment
from models.checkpoint import load_decoder, open_checkpoint


def hooked_moments(decoder, ids):
    """Second moments of every linear's inputs during an ordinary forward pass."""
    found = {}
    for name, module in decoder.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: found.__setitem__(name, second_moment([x[0].double()])))
    with torch.no_grad():
        hidden = decoder.model(ids)
    return found, hidden


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_moments_and_stream_are_those_of_the_whole_model(family, tiny_checkpoint):
    path = tiny_checkpoint(family)
    checkpoint, decoder = open_checkpoint(path), load_decoder(path)
    ids = torch.randint(0, 384, (6, 40), generator=torch.Generator().manual_seed(0))
    expected, hidden = hooked_moments(decoder, ids)
    walk, seen = Walk(checkpoint, ids), set()
    for number, layer in walk.layers("test"):
        def compare(names, inputs):
            # Products may run in bfloat16 inside: 8 bits of mantissa, errors of the sum far below.
            for name in names:
                reference = expected[f"{number}.{name}"]
                assert (second_moment(inputs) - reference).abs().max() <= 0.01 * reference.diagonal().max()
                seen.add(f"{number}.{name}")
        before = walk.x.home.clone()
        moments = walk.inputs(layer, second_moment)
        assert torch.equal(walk.x.home, before)
        walk.step(layer, compare)
        assert {f"{number}.{name}" for name in moments} <= seen
    assert seen == set(expected)
    final = decoder.model.norm(walk.x.home)
    assert (final - hidden).norm() <= 0.02 * hidden.norm()


def test_what_a_visit_changes_is_what_the_data_passes_through(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2"))
    ids = torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0))
    walk, order = Walk(checkpoint, ids), []
    layer = walk.load(0)
    before = walk.x.home.clone()

    def silence(names, inputs):
        order.append(names)
        for name in names:
            if name.endswith(("o_proj", "down_proj")):
                layer.get_submodule(name).weight.data.zero_()
    walk.step(layer, silence)
    assert torch.equal(walk.x.home, before)                         # nothing is added to the stream any more
    assert order == [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                     ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


def test_tokens_weigh_by_what_the_attention_makes_of_them(tiny_checkpoint):
    """Against the squared Jacobian of the attention's output; of windows that are all alike, the mean of the estimates is near it."""
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2"))
    ids = torch.randint(0, 384, (1, 10), generator=torch.Generator().manual_seed(0)).expand(200, -1)
    walk, found = Walk(checkpoint, ids), {}
    layer = walk.load(0)
    block, x = layer.blocks[0], layer.blocks[0].norm(walk.x[0][:1])
    expected = {}
    for name in ("k_proj", "v_proj"):
        linear = getattr(block.mixer, name)
        made = linear(x)
        with passed_through(block.mixer.o_proj):
            def attended(made):
                linear.forward = lambda x: made
                return block.mixer(x, walk._told(layer, 0))
            jacobian = torch.autograd.functional.jacobian(attended, made)
            del linear.forward
        squares = jacobian.square().sum((0, 1, 2, 3, 5))
        expected[f"self_attn.{name}"] = (1 + squares / squares.mean()) / 2
    walk.step(layer, lambda names, inputs: found.update({name: walk.token_weights(name) for name in names}))
    assert all(weights is None for name, weights in found.items() if name not in expected) and walk.token_weights("self_attn.v_proj") is None
    for name, weights in expected.items():
        assert found[name].shape == ids.shape and torch.allclose(found[name].mean(0), weights, rtol=0.1), name
    assert expected["self_attn.v_proj"][0] > 2 * expected["self_attn.v_proj"][-1]           # all read the first, nobody the last


def test_an_expert_that_no_token_reaches_sees_all_of_them(tiny_checkpoint, capsys):
    checkpoint = open_checkpoint(tiny_checkpoint("olmoe"))
    walk, seen = Walk(checkpoint, torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0))), {}
    layer = walk.load(0)
    layer.post_attention_layernorm.weight = nn.Parameter(torch.zeros(64), requires_grad=False)      # all logits are alike: experts 0 and 1
    walk.step(layer, lambda names, inputs: seen.update({names[0]: sum(len(part) for part in inputs)}))
    assert {seen[f"moe.experts.{number}.{part}"] for number in range(4) for part in ("gate_proj", "down_proj")} == {48}
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == 2 and "no token of the text reaches moe.experts." in notes[0] and "of layer 0" in notes[0]
