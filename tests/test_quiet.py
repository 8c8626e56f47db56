"""What a command prints is its own: no library's warnings, failures or bars."""

import re
import subprocess
import sys

import pytest
from test_help import ROOT

# Command: the lines it may print on stderr, where that is no terminal.
COMMANDS = {
    "models.finetune CKPT --task chat --data CHATS -o OUT --steps 1 --context 64": r"step \d+: .*|train: 1 step",
    "compress.quantize CKPT -o OUT --method autoround --bits 4 --group 32 --data TEXT --windows 1 --iterations 1": r"quantizing: 20 tensors|tokenize data",
}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[0])
def test_prints_only_its_own_lines(line, tiny_checkpoint, tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(f'{{"prompt": "Say {i}.", "completion": "It is {i}."}}\n' for i in range(40)))
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 200)
    given = {"CKPT": tiny_checkpoint("smollm2"), "OUT": tmp_path / "out", "CHATS": tmp_path / "chats.jsonl", "TEXT": tmp_path / "text.txt"}
    done = subprocess.run([sys.executable, "-m", *(str(given.get(word, word)) for word in line.split())], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [said for said in done.stderr.splitlines() if not re.fullmatch(COMMANDS[line], said)] == []
    assert not re.search("warning|torchao|failed|deprecated", done.stdout, re.IGNORECASE)
