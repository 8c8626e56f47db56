"""The calibration walk against hooks on the whole model, for every family."""

import pytest
import torch
from torch import nn

from tiny import EVERY_FAMILY

from compress.layerwise import Walk, second_moment
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
        before = walk.x.clone()
        moments = walk.inputs(layer, second_moment)
        assert torch.equal(walk.x, before)
        walk.step(layer, compare)
        assert {f"{number}.{name}" for name in moments} <= seen
    assert seen == set(expected)
    final = decoder.model.norm(walk.x)
    assert (final - hidden).norm() <= 0.02 * hidden.norm()


def test_what_a_visit_changes_is_what_the_data_passes_through(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2"))
    ids = torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0))
    walk, order = Walk(checkpoint, ids), []
    layer = walk.load(0)
    before = walk.x.clone()

    def silence(names, inputs):
        order.append(names)
        for name in names:
            if name.endswith(("o_proj", "down_proj")):
                layer.get_submodule(name).weight.data.zero_()
    walk.step(layer, silence)
    assert torch.equal(walk.x, before)                         # nothing is added to the stream any more
    assert order == [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                     ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


def test_an_expert_that_no_token_reaches_sees_all_of_them(tiny_checkpoint, capsys):
    checkpoint = open_checkpoint(tiny_checkpoint("olmoe"))
    walk, seen = Walk(checkpoint, torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0))), {}
    layer = walk.load(0)
    layer.post_attention_layernorm.weight = nn.Parameter(torch.zeros(64), requires_grad=False)      # all logits are alike: experts 0 and 1
    walk.step(layer, lambda names, inputs: seen.update({names[0]: sum(len(part) for part in inputs)}))
    assert {seen[f"moe.experts.{number}.{part}"] for number in range(4) for part in ("gate_proj", "down_proj")} == {48}
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == 2 and "no token of the text reaches moe.experts." in notes[0] and "of layer 0" in notes[0]
