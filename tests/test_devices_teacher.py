"""The teacher's cache and its own text on a device of their own: what a CPU makes, as many windows at once as fit, and what failures leave."""

import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from compress import teacher
from compress.teacher import Question, asking_bytes, build_cache, main, write_own_text
from families import KINDS
from models.checkpoint import load_decoder
from models.network.config import ModelConfig
from runtime.errors import UserError

IDS = torch.randint(0, 384, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def chosen(device, monkeypatch):
    """The device that `--device cuda` then means."""
    monkeypatch.setattr("models.device.find_device", lambda asked: device)
    return device


def same(found, wanted) -> bool:
    """As near as fp16 keeps it: several windows at once are other products, which round otherwise, and of equal tokens either may be first."""
    return (np.array_equal(found.ids, wanted.ids) and (found.indices == wanted.indices).mean() > 0.98
            and np.abs(found.log_probabilities.astype(np.float32) - wanted.log_probabilities).max() < 0.01
            and np.abs(found.others.astype(np.float32) - wanted.others).max() < 0.01)


def text(folder):
    file = folder / "text.txt"
    file.write_text("The capital of France is Paris, and the capital of Italy is Rome. " * 40)
    return file


@pytest.mark.parametrize("family", KINDS)
def test_a_cache_made_on_a_device(family, tiny_checkpoint, tmp_path, device):
    path = tiny_checkpoint(family)
    found, wanted = (build_cache(path, IDS, tmp_path / where.type, 64, "fp32", device=where) for where in (device, torch.device("cpu")))
    assert found.folder.name == wanted.folder.name and found.state == wanted.state
    assert same(found, wanted)


@pytest.mark.parametrize("family", ("smollm2", "qwen3_moe", "qwen3_5", "gemma4"))
def test_bf16_on_a_device(family, tiny_checkpoint, tmp_path, device):
    """Autocast where the device is not the CPU: what it rounds is as far from fp32 as on a CPU, and no student's matter."""
    path = tiny_checkpoint(family)
    low, exact = (build_cache(path, IDS, tmp_path, 383, precision, device=device) for precision in ("bf16", "fp32"))
    with torch.no_grad():
        logits = load_decoder(path)(IDS)
    differ = np.abs(exact.log_probabilities.astype(np.float32) - low.log_probabilities).max()
    assert differ > 2e-3 and torch.stack([low.divergence(window, logits[window]) for window in range(len(IDS))]).mean() < 2e-3


def test_a_batch_is_read_home_once(tiny_checkpoint, tmp_path, device):
    """Whatever it holds: an array of predictions each, and nothing between the layers."""
    far = pytest.importorskip("far")
    if device.type != far.KIND:
        pytest.skip("counted on the device that counts")
    decoder = load_decoder(tiny_checkpoint("smollm2"), device=device)
    far.reads.clear()
    teacher.ask(decoder, IDS, Question(64, 384, False))
    assert len(far.reads) == 3


@pytest.mark.parametrize("family", ("smollm2", "qwen3_moe", "qwen3_5", "gemma4"))
def test_a_teacher_larger_than_the_device(family, tiny_checkpoint, tmp_path, device, monkeypatch, capsys):
    path = tiny_checkpoint(family)
    wanted = build_cache(path, IDS, tmp_path / "cpu", 64, "fp32")
    config = load_decoder(path).config
    room = sum(asking_bytes(config, 3, 40, Question(64, 384, False)).values())
    monkeypatch.setattr(teacher, "free_bytes", lambda device: room)
    monkeypatch.setattr("models.network.streamed.free_bytes", lambda device: 1000)
    assert same(build_cache(path, IDS, tmp_path / "far", 64, "fp32", device=device), wanted)
    assert f"3 windows at once on {device}, with layers that come for their turn memory: about" in capsys.readouterr().out


def test_half_the_batch_where_memory_is_short(tiny_checkpoint, tmp_path, device, monkeypatch):
    path, ask, tried = tiny_checkpoint("smollm2"), teacher.ask, []
    wanted = build_cache(path, IDS, tmp_path / "cpu", 64, "fp32")

    def small(decoder, ids, question):
        tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return ask(decoder, ids, question)
    monkeypatch.setattr(teacher, "ask", small)
    assert same(build_cache(path, IDS, tmp_path / "far", 64, "fp32", device=device), wanted)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]


def test_one_window_that_does_not_fit(tiny_checkpoint, tmp_path, chosen, monkeypatch, capsys):
    line = [str(tiny_checkpoint("smollm2")), "--data", str(text(tmp_path)), "--length", "40", "-o", str(tmp_path / "out"), "--device", "cuda"]
    monkeypatch.setattr(teacher, "ask", lambda *asked: (_ for _ in ()).throw(torch.OutOfMemoryError("Tried to allocate 20.00 GiB")))
    assert main(line) == 2
    assert f"error: {chosen} has too little memory: 20.00 GiB asked for" in capsys.readouterr().err
    monkeypatch.setattr(teacher, "free_bytes", lambda device: 50_000)
    assert main(line) == 2
    assert f"error: {chosen} has 0.00 GB free, and one window of 40 tokens with one layer" in capsys.readouterr().err


def test_a_device_lost_in_the_middle(tiny_checkpoint, tmp_path, chosen, monkeypatch, capsys):
    """What was finished stays, and the same command goes on to the bytes of a run that lost nothing."""
    monkeypatch.setattr(teacher, "BATCH", 80)
    line = [str(tiny_checkpoint("smollm2")), "--data", str(text(tmp_path)), "--windows", "6", "--length", "40", "--device", "cuda",
            "--precision", "fp32", "-o"]
    assert main([*line, str(tmp_path / "whole")]) == 0
    ask, asked = teacher.ask, []

    def failing(decoder, ids, question):
        asked.append(len(ids))
        if len(asked) == 2:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return ask(decoder, ids, question)
    monkeypatch.setattr(teacher, "ask", failing)
    assert main([*line, str(tmp_path / "lost")]) == 2
    assert "run the same command again" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "lost")]) == 0 and asked == [2, 2, 2, 2]
    whole, lost = (next((tmp_path / name).iterdir()) for name in ("whole", "lost"))
    for file in whole.iterdir():
        assert file.read_bytes() == (lost / file.name).read_bytes()


@pytest.mark.parametrize("family", ("smollm2", "gpt2", "qwen3_moe", "qwen3_5", "gemma4"))
def test_own_text_written_on_a_device(family, tiny_checkpoint, device):
    path = tiny_checkpoint(family)
    found, wanted = (write_own_text(load_decoder(path, device=where), 5, 10, 300, seed=3) for where in (device, torch.device("cpu")))
    assert found.device == torch.device("cpu") and torch.equal(found, wanted) and int(found.max()) < 300


LLAMA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False, rms_norm_eps=1e-5)


def test_seven_billion_parameters_in_eight_gigabytes(monkeypatch, tmp_path):
    """By calculation: Llama-2-7B on a device with 8 GB, as many windows of 2048 tokens at once as fit there."""
    config, question = ModelConfig.from_hf(LLAMA), Question(64, 32000, True)
    monkeypatch.setattr(teacher, "free_bytes", lambda device: 8_000_000_000)
    rows, needed = teacher.batch(config, (400, 2048), question, torch.device("cuda"), tmp_path)
    assert rows >= 4 and sum(needed.values()) < 8e9
    assert needed["tables"] == 4 * (2 * 32000 * 4096 + 4096)
    assert sum(asking_bytes(config, 1, 2048, question).values()) < 4.5e9


@pytest.mark.parametrize("low", (False, True))
def test_the_calculation_holds(low, tiny_checkpoint, device, monkeypatch):
    """Against what a random model a hundredth of that width takes on the device that counts it."""
    far = pytest.importorskip("far")
    if device.type != far.KIND:
        pytest.skip("counted on the device that counts")
    path = tiny_checkpoint("llama", vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=6)
    monkeypatch.setattr("models.network.streamed.free_bytes", lambda device: 1000)
    held, most, make = Counter(), 0, far.Far.__new__

    def counting(cls, tensor):
        nonlocal most
        made, storage = make(cls, tensor), tensor.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        held[place] += 1
        weakref.finalize(made, held.subtract, [place])
        most = max(most, sum(size for (_, size), users in held.items() if users))
        return made
    monkeypatch.setattr(far.Far, "__new__", counting)
    question, ids = Question(64, 2000, low), torch.randint(0, 2000, (4, 128), generator=torch.Generator().manual_seed(0))
    decoder = teacher.frozen_decoder(path, low, device, 0)
    teacher.ask(decoder, ids, question)
    predicted = sum(asking_bytes(decoder.config, 4, 128, question).values())
    assert predicted / 3 < most < predicted
