"""Every command: help and errors of arguments come without PyTorch and its like, and each package lists its commands."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "compress", "export", "runtime")
COMMANDS = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for package in PACKAGES
                  for file in (ROOT / package).rglob("*.py") if "\ndef main(argv" in file.read_text("utf-8"))
HEAVY = {"torch", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "neural_compressor",
         "auto_round", "lm_eval", "safetensors", "gguf", "tqdm", "scipy", "tensorboard"}
RUN = """
import contextlib, io, json, runpy, sys
lines = json.load(sys.stdin)
results = []
for name, *words in lines:
    sys.argv, out, err, code = [name, *words], io.StringIO(), io.StringIO(), None
    before = sys.modules["__main__"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    results.append([code or 0, out.getvalue(), err.getvalue(), sorted({m.split(".")[0] for m in sys.modules})])
print(json.dumps(results))
"""


def run_each(lines: list[list[str]]) -> list[list]:
    """[exit code, stdout, stderr, top-level modules that are loaded by then] of each command line, in one process."""
    done = subprocess.run([sys.executable, "-W", "ignore::RuntimeWarning", "-c", RUN], input=json.dumps(lines), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_nothing_heavy():
    assert len(COMMANDS) >= 27
    for name, (code, out, err, loaded) in zip(COMMANDS, run_each([[name, "--help"] for name in COMMANDS])):
        assert code == 0 and err == "" and out.startswith(f"usage: python -m {name}"), name
        assert not HEAVY & set(loaded), name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_commands(package):
    listed = importlib.import_module(f"{package}.__main__").COMMANDS
    assert sorted(f"{package}.{name}" for names in listed.values() for name in names) == [
        name for name in COMMANDS if name.split(".")[0] == package]
    (code, out, err, _), (wrong, nothing, said, _) = run_each([[package], [package, next(iter(listed.values()))[0]]])
    assert code == 0 and err == "" and all(out.count(f"python -m {name} ") == 1 for name in COMMANDS if name.startswith(package))
    assert wrong == 2 and nothing == "" and "did you mean" in said
    assert max(map(len, out.splitlines())) <= 140


WRONG = [
    (["compress.quantize", "CKPT", "-o", "OUT", "--bit", "4"], "did you mean --bits?"),
    (["compress.quantize", "CKPT", "-o", "OUT", "--methode=gptq"], "did you mean --method?"),
    (["compress.quantize", "CKPT", "-o", "OUT", "--method", "gptq", "--data", "x", "--target-size", "92"], "write 92MB"),
    (["compress.quantize", "CKPT", "-o", "OUT", "--method", "gptq"], "give --data FILES"),
    (["compress.prune", "CKPT", "-o", "OUT", "--data", "x", "--what", "mlp", "--keep", "1.5"], "above 0 and below 1"),
    (["compress.distill", "--teacher", "A", "--data", "x", "-o", "OUT"], "give a student"),
    (["compress.recover", "A", "--teacher", "B", "--data", "x", "-o", "OUT", "--steps", "0"], "--steps is 0"),
    (["compress.run", "tiny", "--data", "x"], "--model is missing"),
    (["compress.teacher", "CKPT", "-o", "OUT"], "--self N"),
    (["export.trt", "MODEL", "--rows", "0"], "--rows is 0, which should be at least 1"),
    (["models.evaluate", "MODEL", "--task", "kl"], "--reference"),
    (["models.finetune", "A", "--task", "chat", "--data", "x", "-o", "OUT", "--learning-rate", "nan"], "finite number"),
    (["models.info"], "CHECKPOINT"),
    (["models.train", "--data", "x", "-o", "OUT"], "give either --preset"),
    (["runtime.bench", "BUNDLE", "--new-tokens", "1"], "--new-tokens is 1, which should be at least 2"),
    (["runtime.generate", "BUNDLE", "--promt", "Hi"], "did you mean --prompt?")]


def test_a_wrong_argument_is_told_at_once():
    for (words, said), (code, out, err, loaded) in zip(WRONG, run_each([words for words, _ in WRONG])):
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, (words, err)
        assert not HEAVY & set(loaded), words
