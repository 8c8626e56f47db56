"""Every command where an optional part is not installed: exit code 2 and one sentence with the pip line, no traceback.

One process has PyTorch and safetensors loaded and forks for each case, whose packages are then not to be found; a case of PyTorch's
own comes before. A command line here goes as far as the import of what is taken away.
"""

import json
import subprocess
import sys

import pytest
from test_help import COMMANDS, ROOT

# Command line: the optional parts it cannot do without, each taken away in turn. CKPT and BUNDLE are tiny, TEXT and so on data.
NEEDS = {
    "models.get CKPT -o OUT": "torch safetensors gguf tqdm",
    "models.get someone/something -o OUT": "huggingface_hub",
    "models.info CKPT": "torch safetensors",
    "models.tokenizer train --data TEXT -o OUT": "tqdm",
    "models.train --checkpoint CKPT --data TEXT -o OUT --steps 1": "torch safetensors accelerate tensorboard",
    "models.train --preset 100k --tokenizer CKPT --data TEXT --documents line -o OUT --steps 1 --embeddings word2vec": "gensim",
    "models.finetune CKPT --task classify --data LABELS -o OUT": "torch safetensors accelerate tensorboard peft transformers",
    "models.ngram --tokenizer CKPT --data TEXT --valid TEXT -o OUT": "torch safetensors",
    "models.compare --data TEXT -o OUT": "torch safetensors accelerate tensorboard",
    "models.random_checkpoint lfm2-1.2b -o OUT --layers 1": "torch safetensors",
    "models.train_bench": "torch accelerate tensorboard",
    "models.encoder_bench CKPT": "torch safetensors",
    "models.evaluate CKPT --data TEXT": "torch safetensors",
    "models.evaluate CKPT --task translate --data PAIRS --shots 0": "sacrebleu",
    "models.evaluate CKPT --task summarize --data SUMMARIES --shots 0": "rouge_score nltk",
    "models.what_got_worse CKPT CKPT --data TEXT": "torch safetensors",
    "models.acceptance CKPT CKPT --data TEXT": "torch safetensors",
    "models.lm_eval_adapter CKPT --tasks arc_easy": "torch lm_eval",
    "compress.quantize CKPT -o OUT": "torch safetensors tqdm",
    "compress.quantize CKPT -o OUT --method hqq --no-symmetric": "neural_compressor",
    "compress.quantize CKPT -o OUT --method autoround --data TEXT --windows 1": "neural_compressor auto_round transformers",
    "compress.recover CKPT --teacher CKPT --data TEXT -o OUT": "torch safetensors",
    "compress.foreign CKPT -o OUT": "torch safetensors",
    "compress.prune CKPT -o OUT --data TEXT --what depth --layers 1": "torch safetensors tqdm",
    "compress.distill --teacher CKPT --student CKPT --data TEXT -o OUT": "torch accelerate tensorboard",
    "compress.teacher CKPT --data TEXT -o OUT": "torch safetensors",
    "compress.teacher CKPT --data TEXT -o OUT --ray local": "ray",
    "compress.quantize CKPT -o OUT --method gptq --data TEXT --windows 1 --ray local": "ray",
    "compress.run balanced --model CKPT --data TEXT -o OUT": "torch safetensors",
    "export.onnx CKPT -o OUT": "torch safetensors onnx tqdm",
    "export.onnx CKPT -o OUT --task feature-extraction": "torch transformers onnxscript",
    "export.ort BUNDLE": "onnx",
    "export.draft BUNDLE NGRAMS": "torch safetensors",
    "export.verify CKPT BUNDLE": "torch safetensors",
    "export.trt BUNDLE": "onnx tensorrt_rtx",
    "export.trt BUNDLE --backend trt": "tensorrt",
    "runtime.generate BUNDLE -p Hi --provider cpu": "onnxruntime",
    "runtime.chat BUNDLE --provider cpu": "onnxruntime",
    "runtime.serve BUNDLE --port 0": "fastapi uvicorn httptools prometheus_client",
    "runtime.verify BUNDLE": "",
    "runtime.feedback stats FILE": "",
    "runtime.bench BUNDLE --provider cpu": "onnxruntime",
    "runtime.native.profile BUNDLE": "",
}
CASES = sorted(((line, part) for line, parts in NEEDS.items() for part in parts.split()), key=lambda case: case[1] != "torch")
SERVER = """
import contextlib, io, json, os, runpy, sys, traceback

class Without:
    "A finder that does not find what is taken away."
    def __init__(self, finder, missing):
        self.finder, self.missing = finder, missing
    def find_spec(self, name, *where):
        return None if name.split(".")[0] == self.missing else self.finder.find_spec(name, *where)
    def __getattr__(self, name):
        return getattr(self.finder, name)

def command(words, missing):
    sys.meta_path[:] = [Without(finder, missing) for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        del sys.modules[name]
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 70

for line in sys.stdin:
    words, missing = json.loads(line)
    if missing != "torch" and "torch" not in sys.modules:
        import torch, safetensors.torch
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1), os.dup2(write, 2), os.close(0)
        code = command(words, missing)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def given(tiny_checkpoint, tmp_path_factory):
    """What the words of NEEDS stand for."""
    from compress import quantize
    from export import onnx, ort
    from export.bundle import add_file
    from runtime.bundle import open_bundle
    folder = tmp_path_factory.mktemp("missing")
    checkpoint = tiny_checkpoint("smollm2")
    assert quantize.main([str(checkpoint), "-o", str(folder / "int4"), "--bits", "4", "--group", "32"]) == 0
    assert onnx.main([str(folder / "int4"), "-o", str(folder / "bundle")]) == 0 == ort.main([str(folder / "bundle")])
    manifest = open_bundle(folder / "bundle").manifest
    shapes = {"input_ids": [None, None, [1, 8]], "logits_positions": [None, None, [1, 1]]}
    manifest["engines"].append({"file": "no.engine", "backend": "rtx", "version": "1.7", "capacity": 64, "compute_capabilities": ["86"],
                                "profiles": [{"name": name, "shapes": shapes} for name in ("decode", "prefill")], "bytes": 1})
    add_file(folder / "bundle", manifest, "no.engine", b"x")
    (folder / "text.txt").write_text("The capital of France is Paris. " * 40)
    (folder / "labels.csv").write_text("text,label\n" + "good one,1\nbad one,0\n" * 20)
    (folder / "pairs.tsv").write_text("Good day.\tGuten Tag.\nYes.\tJa.\n")
    (folder / "summaries.jsonl").write_text('{"text": "A long text.", "summary": "A text."}\n' * 2)
    return {"CKPT": str(checkpoint), "BUNDLE": str(folder / "bundle"), "TEXT": str(folder / "text.txt"), "LABELS": str(folder / "labels.csv"),
            "PAIRS": str(folder / "pairs.tsv"), "SUMMARIES": str(folder / "summaries.jsonl"), "folder": folder}


def test_every_command_says_what_is_missing(given):
    assert {line.split()[0] for line in NEEDS} == set(COMMANDS)
    lines = [[[given.get(word, str(given["folder"] / f"out{number}") if word == "OUT" else word) for word in line.split()], part]
             for number, (line, part) in enumerate(CASES)]
    done = subprocess.run([sys.executable, "-W", "ignore::RuntimeWarning", "-c", SERVER], input="".join(json.dumps(line) + "\n" for line in lines),
                          capture_output=True, text=True, cwd=ROOT, timeout=600)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(CASES), done.stderr
    wrong = {}
    for (line, part), (code, said) in zip(CASES, results):
        last = said.splitlines()[-1] if said.strip() else ""
        if code != 2 or not last.startswith("error: ") or "pip install" not in last or "Traceback" in said:
            wrong[f"{line} without {part}"] = (code, said[-600:])
    assert not wrong, json.dumps(wrong, indent=1)
