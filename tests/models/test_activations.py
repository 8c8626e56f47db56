"""Int8 inputs of a W8A8 checkpoint against integer arithmetic; a row's answer does not depend on its neighbours."""

import json
import shutil

import pytest
import torch

from compress.quantize import main as quantize
from models.network.activations import round_rows
from models.checkpoint import load_decoder
from runtime.errors import UserError


def test_equals_an_integer_product():
    x, codes = torch.randn(7, 96) * 3, torch.randint(-127, 128, (5, 96))
    scale = x.abs().amax(1, keepdim=True) / 127
    integers = (x / scale).round().to(torch.int64) @ codes.T
    assert torch.allclose(round_rows(x) @ codes.float().T, integers * scale, rtol=1e-5, atol=1e-3)
    assert torch.equal(round_rows(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.fixture(scope="module")
def w8a8(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("w8a8") / "q"
    assert quantize([str(tiny_checkpoint("smollm2")), "-o", str(out), "--bits", "8", "--group", "0", "--activations", "8",
                     "--backend", "pytorch"]) == 0
    return out


def test_the_model_rounds_its_inputs_row_by_row(w8a8, tiny_checkpoint):
    ids = torch.randint(0, 384, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = load_decoder(w8a8)(ids)
        alone = torch.cat([load_decoder(w8a8)(row[None]) for row in ids])
        plain = load_decoder(tiny_checkpoint("smollm2"))(ids)
    assert torch.allclose(together, alone, atol=1e-3)
    difference = (together - plain).abs().max()
    assert 0 < difference < 0.2 * plain.abs().max()


def test_another_kind_of_activations_is_refused(w8a8, tmp_path):
    shutil.copytree(w8a8, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["activations"] = {"bits": 4, "per": "tensor"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="supported are"):
        load_decoder(tmp_path / "q")
