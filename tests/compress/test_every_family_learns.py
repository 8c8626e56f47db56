"""Every family learns: one step with adapters, and one from a teacher, against the decoder's own logits."""

import pytest
import torch
import torch.nn.functional as F
from tiny import EVERY_FAMILY, labelled_rows

from compress.distilling.distiller import Distiller, Losses
from compress.distilling.divergence import kl
from compress.distilling.matching import attention_modules
from models.checkpoint import load_decoder
from models.data.corpus import IGNORE
from models.network.config import LayerConfig, ModelConfig
from models.network.decoder import Decoder
from models.training.lora import add_lora
from runtime.errors import UserError

IDS = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))
LABELS = torch.cat((IDS[:, 1:], torch.full((2, 1), IGNORE)), 1)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_step_with_adapters_and_a_step_from_a_teacher(family, tiny_checkpoint):
    model = add_lora(load_decoder(tiny_checkpoint(family)), rank=4, alpha=8.0, source=tiny_checkpoint(family))
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(2):
        losses.append(F.cross_entropy(model(IDS).transpose(1, 2), LABELS, ignore_index=IGNORE))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None) and losses[1] < losses[0]

    teacher, student = load_decoder(tiny_checkpoint(family)).requires_grad_(False), load_decoder(tiny_checkpoint(family))
    alone = Distiller(student, teacher, Losses(kl, hidden_weight=1.0, attention_weight=1.0))
    assert 0 <= alone(*labelled_rows(IDS, LABELS)) < 1e-3                        # the teacher itself has nothing to learn
    labelled = Distiller(student, teacher, Losses(kl, label_share=1.0))(*labelled_rows(IDS, LABELS))
    torch.testing.assert_close(labelled, F.cross_entropy(teacher(IDS).transpose(1, 2), LABELS, ignore_index=IGNORE, reduction="sum"),
                               rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=1e-4), []
    for _ in range(2):
        losses.append(alone(*labelled_rows(IDS, LABELS)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]


def test_a_model_without_attention_has_none_to_match():
    conv = LayerConfig(0, 0, 32, mixer="conv", kernel=3)
    decoder = Decoder(ModelConfig(family="lfm2", vocab_size=16, hidden_size=16, head_dim=8, context_length=32, layers=(conv, conv)))
    with pytest.raises(UserError, match="--attention-weight matches attention, and this lfm2 model has none"):
        attention_modules(decoder)
