"""Hidden-state and attention matching against loops over layers, heads and tokens; which layers go together."""

import pytest
import torch

from compress.distilling.matching import attention_loss, hidden_loss, hidden_maps, hidden_modules, layer_pairs, watched
from models.checkpoint import load_decoder, open_checkpoint

DRAW = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=DRAW)


@pytest.mark.parametrize("student,teacher,pairs", [(2, 6, [2, 5]), (6, 30, [4, 9, 14, 19, 24, 29]), (3, 3, [0, 1, 2]), (1, 5, [4])])
def test_layers_at_the_same_share_of_the_depth_go_together(student, teacher, pairs):
    assert layer_pairs(student, teacher) == pairs


def test_hidden_loss_is_the_relative_error_of_each_token(tiny_checkpoint):
    narrow, wide = (open_checkpoint(tiny_checkpoint("smollm2", hidden_size=size)).config for size in (32, 64))
    maps = hidden_maps(narrow, wide)
    ours, theirs = [random(2, 5, 32) for _ in maps], [10 * random(2, 5, 64) for _ in maps]
    expected = torch.zeros(2, 5)
    for x, y, to_width in zip(ours, theirs, maps):
        for row in range(2):
            for token in range(5):
                error = to_width.weight @ x[row, token] - y[row, token]
                expected[row, token] += (error @ error) / (y[row, token] @ y[row, token]) / len(maps)
    torch.testing.assert_close(hidden_loss(ours, theirs, maps), expected)
    same = hidden_maps(wide, wide)
    assert not list(same.parameters()) and hidden_loss(theirs, theirs, same).abs().max() == 0


def test_attention_loss_is_the_divergence_of_relations():
    """Widths 32 and 48 can both be cut into 16 parts."""
    ours, theirs = [random(2, 6, 32) for _ in range(3)], [random(2, 6, 48) for _ in range(3)]
    expected = torch.zeros(2, 6, dtype=torch.float64)

    def relation(x, part, row, token):
        width = x.shape[-1] // 16
        cut = x[row, :, part * width:(part + 1) * width].double()
        return torch.stack([cut[token] @ cut[other] / width**0.5 for other in range(token + 1)]).softmax(0)
    for x, y in zip(ours, theirs):
        for row in range(2):
            for token in range(6):
                for part in range(16):
                    p, q = relation(y, part, row, token), relation(x, part, row, token)
                    expected[row, token] += (p * (p / q).log()).sum() / (3 * 16)
    torch.testing.assert_close(attention_loss(ours, theirs).double(), expected, rtol=1e-4, atol=1e-6)
    assert attention_loss(theirs, theirs).abs().max() < 1e-6


def test_what_is_watched_is_what_layers_give_out(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("smollm2"))
    layers, same = hidden_modules(decoder, decoder)
    assert layers == same
    ids = torch.tensor([[5, 6, 7]])
    with watched(layers) as found, torch.no_grad():
        last = decoder.model(ids)
    torch.testing.assert_close(decoder.model.norm(found[-1]), last)
    assert not any(layer._forward_hooks for layer in layers)
