"""Sensitivity measured on a device of its own is what a CPU measures, with layers that stay there or come for their turn."""

from contextlib import nullcontext

import pytest
import torch

from compress.quantizing import fisher, sensitivity
from compress.quantizing.sensitivity import measure_sensitivity
from models.checkpoint import open_checkpoint
from models.network.quantized import TensorFormat

IDS = torch.randint(0, 384, (6, 40), generator=torch.Generator().manual_seed(0))
FORMATS = [TensorFormat(bits, group) for bits, group in ((4, 32), (8, 0), (3, 128))]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Products in one type, whichever units the CPU and the device have for another."""
    monkeypatch.setattr(fisher, "fast_forward", lambda device: nullcontext())


def near(found, wanted, within: float = 0.02) -> bool:
    """Sums of several windows at once round otherwise, and a row that was nearly drawn may be drawn."""
    pairs = [(found.damage[module][form], cost) for module, row in wanted.damage.items() for form, cost in row.items()]
    return (found.damage.keys() == wanted.damage.keys() and all(found.damage[m].keys() == row.keys() for m, row in wanted.damage.items())
            and all(abs(one / other - 1) < within for one, other in pairs)
            and all((found.vocabulary[m] - h).norm() < 1e-3 * h.norm() for m, h in wanted.vocabulary.items()))


@pytest.mark.parametrize("family", ("smollm2", "qwen3_moe", "qwen3_5", "granite4_tiny", "gemma4"))
def test_measured_on_a_device(family, tiny_checkpoint, device, monkeypatch):
    checkpoint = open_checkpoint(tiny_checkpoint(family))
    wanted = measure_sensitivity(checkpoint, IDS, FORMATS)
    found = measure_sensitivity(checkpoint.on(device), IDS, FORMATS)
    assert near(found, wanted)
    assert all(hessian.device == torch.device("cpu") for hessian in found.vocabulary.values())
    monkeypatch.setattr("models.network.streamed.free_bytes", lambda device: 1000)
    gradients, _ = fisher.output_gradients(checkpoint.on(device), IDS)
    whole, _ = fisher.output_gradients(checkpoint, IDS)
    assert gradients.keys() == whole.keys()
    assert all((gradients[name].cpu() - square).norm() <= 1e-3 * square.norm() for name, square in whole.items())


def test_fewer_windows_where_memory_is_short(tiny_checkpoint, device, monkeypatch):
    checkpoint, sums, tried = open_checkpoint(tiny_checkpoint("smollm2")), fisher._sums, []
    wanted, _ = fisher.output_gradients(checkpoint, IDS)

    def small(decoder, ids, *rest):
        tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return sums(decoder, ids, *rest)
    monkeypatch.setattr(fisher, "_sums", small)
    found, _ = fisher.output_gradients(checkpoint.on(device), IDS)
    assert tried == [4, 2, 2, 2] and all((found[name].cpu() - g).norm() <= 1e-3 * g.norm() for name, g in wanted.items())


@pytest.mark.parametrize("where", ("gradients", "layers"))
def test_a_device_lost_in_the_middle(where, tiny_checkpoint, device, monkeypatch, tmp_path):
    """What was finished is not done again, and the end is the same to the bit."""
    checkpoint = open_checkpoint(tiny_checkpoint("smollm2")).on(device)
    wanted = measure_sensitivity(checkpoint, IDS, FORMATS)
    module, name = (fisher, "window_sums") if where == "gradients" else (sensitivity, "_damage")
    work, done = getattr(module, name), []

    def failing(*how):
        done.append(1)
        if len(done) == (2 if where == "gradients" else 10):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return work(*how)
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(torch.AcceleratorError):
        measure_sensitivity(checkpoint, IDS, FORMATS, work=tmp_path / "work")
    found = measure_sensitivity(checkpoint, IDS, FORMATS, work=tmp_path / "work")
    assert len(done) == (3 if where == "gradients" else 10 + 7 + 1)          # of two pieces; of two layers with seven linears, and the table
    assert found.damage == wanted.damage
