"""A teacher's cache as the reference of an evaluation: beside the live teacher, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import write_stranger
from tokenizers import Tokenizer

from compress.teacher import build_cache
from models import evaluate
from models.judging import fidelity
from models.checkpoint import load_decoder
from models.formats.teacher_cache import open_cache
from models.network.torch_backend import TorchBackend
from runtime.errors import UserError

IDS = torch.randint(3, 384, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(tiny_checkpoint, tmp_path_factory):
    """(student, teacher, the teacher's cache with all but one token kept)."""
    teacher = tiny_checkpoint("smollm2", seed=1)
    return tiny_checkpoint("smollm2"), teacher, build_cache(teacher, IDS, tmp_path_factory.mktemp("cache"), 383,
                                                              "fp32").folder


def run(*args) -> int:
    return evaluate.main([str(a) for a in args])


def test_the_cache_gives_the_figures_of_the_live_teacher(world, tmp_path):
    student, teacher, folder = world
    assert run(student, "--task", "kl", "--reference", folder, "--stride", 20, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    windows = [fidelity.Window(row.numpy(), 12, 1) for row in IDS]
    live = fidelity.measure(TorchBackend(load_decoder(student)), windows, TorchBackend(load_decoder(teacher)),
                            progress=False).metrics()
    assert result["tokens"] == live["tokens"] == 6 * 20
    assert result["perplexity"] == pytest.approx(live["perplexity"], rel=1e-6)
    assert result["kl"] == pytest.approx(live["kl"], rel=2e-3)               # the cache is in fp16
    assert result["top1_agreement"] == live["top1_agreement"]
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    text = sum(len(tokenizer.decode(row.tolist()).encode()) - len(tokenizer.decode(row[:12].tolist()).encode()) for row in IDS)
    assert result["bits_per_byte"] == pytest.approx(np.log2(result["perplexity"]) * 120 / text)


def test_a_teacher_agrees_with_its_cache(world, tmp_path):
    _, teacher, folder = world
    assert run(teacher, "--task", "perplexity", "--reference", folder, "--max-windows", 2, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["tokens"] == 2 * 16 and abs(result["kl"]) < 1e-3 and result["top1_agreement"] == 1


def test_refusals(world, tmp_path, capsys):
    student, _, folder = world
    stranger = write_stranger(student, tmp_path / "stranger")
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for arguments, says in [((stranger, "--reference", folder), "another tokenizer"),
                            ((student, "--reference", folder, "--data", text), "brings its own text"),
                            ((student, "--reference", folder, "--window", 16), "windows of 32 tokens"),
                            ((student, "--reference", folder, "--stride", 32), "stride is 32"),
                            ((student, "--task", "kl", "--data", text), "needs --reference"),
                            ((student,), "--data")]:
        assert run(*arguments) == 2
        assert says in capsys.readouterr().err
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    state = json.loads((unfinished / "state.json").read_text())
    (unfinished / "state.json").write_text(json.dumps(state | {"done": 3}))
    with pytest.raises(UserError, match="only 3 of 6 windows"):
        open_cache(unfinished)
    (unfinished / "ids.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no teacher cache that can be read"):
        open_cache(unfinished)
