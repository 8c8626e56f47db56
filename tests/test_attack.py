"""The fuzzer and the killer, small: `make fuzz` and `make kill` run them long."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [
    ["tests.fuzz", "--cases", "100", "--seed", "7", "--kind", "bundle", "golden", "gguf", "tokenizer", "template", "data"],
    ["tests.kill", "--kills", "4", "--seed", "7", "--command", "get", "rtn", "onnx", "ort"]], ids=["fuzz", "kill"])
def test_no_findings(words, tmp_path):
    done = subprocess.run([sys.executable, "-m", *words, "--work", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
