"""AutoRound through neural-compressor: nearer to the original's answers than rounding to nearest, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES
from tokenizers import Tokenizer

from compress.quantize import main
from models.checkpoint import load_decoder, open_checkpoint

pytest.importorskip("auto_round")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    return file


def quantized(checkpoint, text, out, *options) -> int:
    return main([str(checkpoint), "-o", str(out), "--data", str(text), "--cache", str(out.with_name("cache")), "--windows", "8",
                 "--length", "64", "--bits", "2", *options])


def test_nearer_than_rounding_to_nearest(tiny_checkpoint, text, tmp_path):
    original, errors = tiny_checkpoint("smollm2"), {}
    tokens = Tokenizer.from_file(str(original / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    ids = torch.tensor(tokens[:8 * 64]).view(8, 64)
    for method in ("rtn", "autoround"):
        out = tmp_path / method
        assert quantized(original, text, out, "--method", method, "--iterations", "30") == 0
        with torch.no_grad():
            errors[method] = (load_decoder(out)(ids) - load_decoder(original)(ids)).square().mean().item()
    tensor = open_checkpoint(tmp_path / "autoround").quantized("model.layers.1.mlp.down_proj")
    assert tensor.codes.shape == (64, 128) and tensor.scales.shape == (64, 4) and tensor.symmetric
    assert tensor.codes.unique().tolist() == [0, 1, 2, 3] and tensor.scales.isfinite().all()
    assert errors["autoround"] < 0.5 * errors["rtn"]


def test_nothing_is_left_where_the_command_runs(tmp_path):
    """In a fresh process: neural-compressor makes its workspace while it is imported."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", "from compress.quantizing.neural_compressor import _load; _load('hqq')"], cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, words", [
    (["--bits", "3"], "AutoRound has 2, 4 and 8 bits"),
    (["--no-symmetric"], "without zero points"),
    (["--skip", "*.down_proj"], "leave out --skip"),
    (["--backend", "tensorrt", "--bits", "4"], "negative scales"),
    (["--iterations", "0"], "--iterations is 0"),
])
def test_refusals(options, words, tiny_checkpoint, text, tmp_path, capsys):
    assert quantized(tiny_checkpoint("smollm2"), text, tmp_path / "out", "--method", "autoround", *options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_family_of_other_linears_is_refused(tiny_checkpoint, text, tmp_path, capsys):
    assert quantized(tiny_checkpoint("phi3"), text, tmp_path / "out", "--method", "autoround") == 2
    assert "as transformers has it, whose linears in a phi3 are other ones" in capsys.readouterr().err
