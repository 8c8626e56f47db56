"""The whole road on one random model of every family, and the README's tables of what works, made from what happened.

    python -m tests.families             # walk the roads and print the tables
    python -m tests.families --write     # and put them into README.md, where tests/test_families.py holds them

A step is done by the command that a user would type, in this process. What a command refuses (exit code 2) is "no" in the
table; a number that is off, or any other failure, is an AssertionError that names the step.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

import compress.distill
import compress.run
import export.onnx
import export.ort
import export.trt
import export.verify
import models.finetune
import models.get
import runtime.chat
from models.checkpoint import load_decoder
from models.info import ROADS
from runtime.bundle import open_bundle
from runtime.cuda_backend import CudaBackend
from runtime.errors import Unavailable, UserError
from runtime.golden import read_golden
from runtime.native.backend import NativeBackend
from runtime.ort_backend import OrtBackend
from runtime.trt_backend import TrtBackend
from runtime.verify import replay

sys.path.append(str(Path(__file__).parent))
from tiny import EVERY_FAMILY, SENTENCES, tiny_model, tiny_tokenizer, write_tiny     # noqa: E402
from tiny_gguf import SAID, write_gguf                                            # noqa: E402

# Of these, families that together have every kind of layer, of norm and of position: for tests that would take long with all.
KINDS = ("smollm2", "gpt2", "phi3", "gemma2", "lfm2_moe", "qwen3_5", "granite4_tiny", "gemma4")

README = Path(__file__).parents[1] / "README.md"
MARKS = {"families": ("<!-- families: python -m tests.families --write -->", "<!-- end of families -->"),
         "hardware": ("<!-- hardware: python -m tests.families -->", "<!-- end of hardware -->")}
IDS = torch.arange(3, 103)[None]


RECIPE = """
[[stages]]
stage = "quantize"
method = "gptq"
windows = 4
length = 32
"""                                                     # what "balanced" is, in little
TARGET = "target_bpw = 12.0\nsensitivity_windows = 2\n"           # for KINDS: it tries every format on every layer, which takes seconds


def command(main: Callable, *argv, typed: str = "") -> str:
    """"yes" where a command did its work; where it refused, its sentence. typed: at its prompt."""
    output, keyboard = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main([str(word) for word in argv])
    finally:
        sys.stdin = keyboard
    assert code in (0, 2), f"{main.__module__} {argv} ended with {code}: {output.getvalue()[-2000:]}"
    return "yes" if code == 0 else output.getvalue().strip().splitlines()[-1]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(IDS)
    return getattr(out, "logits", out)


def same(folder: Path, theirs) -> str:
    difference = (logits(load_decoder(folder)) - logits(theirs)).abs().max().item()
    assert difference < 1e-4, f"{folder}: logits are {difference} from those of transformers"
    return "yes"


def walk(family: str, work: Path) -> dict[str, str]:
    """Step of the road -> "yes", or the sentence that refused it."""
    checkpoint, coded, bundle = work / "checkpoint", work / "coded", work / "bundle"
    write_tiny(checkpoint, family, 0)
    done = {"same logits as transformers": same(checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint))}

    done["models.get"] = command(models.get.main, checkpoint, "-o", work / "own")
    same(work / "own", AutoModelForCausalLM.from_pretrained(work / "own"))
    model, pre = tiny_model(family, **SAID.get(family, {})), "qwen2" if family == "qwen2" else "smollm"
    gguf = write_gguf(work / "model.gguf", model, tiny_tokenizer(pre), pre=pre)
    done["from GGUF"] = command(models.get.main, gguf, "-o", work / "got")
    if done["from GGUF"] == "yes":
        same(work / "got", model)

    chats, text, recipe, tuned = work / "chats.jsonl", work / "text.txt", work / "recipe.toml", work / "tuned"
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "Say it."}, {
        "role": "assistant", "content": sentence}]}) + "\n" for sentence in SENTENCES), "utf-8")
    text.write_text("\n".join(SENTENCES * 20), "utf-8")
    recipe.write_text(RECIPE + TARGET * (family in KINDS), "utf-8")
    learning = ("--steps", 1, "--batch", 2, "--precision", "fp32", "--learning-rate", 0.01)
    done["LoRA"] = command(models.finetune.main, checkpoint, "-o", tuned, "--task", "chat", "--data", chats, "--context", 128, *learning)
    done["distilling"] = command(compress.distill.main, "--teacher", checkpoint, "--student", checkpoint, "-o", work / "taught", "--data", text,
                                 "--context", 32, "--eval-rows", 2, *learning)
    for step, folder in {"LoRA": tuned, "distilling": work / "taught"}.items():
        assert done[step] != "yes" or not torch.equal(logits(load_decoder(folder / "last")), logits(load_decoder(checkpoint)))

    with mock.patch("compress.run.measure_speed", lambda *_: {"decode_tokens_per_s": None}):      # four processes, and of no family
        done["compress.run"] = command(compress.run.main, recipe, "--model", checkpoint, "--data", text, "-o", coded, "--backend", "onnx",
                                       "--eval-windows", 2)
    done["portable graph"] = command(export.onnx.main, coded / "model", "-o", bundle)
    done["fast graph"] = command(export.ort.main, bundle)
    proof = command(export.verify.main, coded / "model", bundle, "--threads", 1)
    ran = json.loads((bundle / "golden.json").read_text())["budgets"]         # each was run, and kept its budget
    for step, runner in {"portable graph": "portable", "fast graph": "fast", "native core": "native"}.items():
        if done.setdefault(step, "yes") == "yes" and runner not in ran:
            done[step] = f"did not run: {proof}"
    done["runtime.chat"] = command(runtime.chat.main, bundle, "--threads", 1, "--max-new-tokens", 4, typed="Hello.\n")
    done["TensorRT builds"] = command(export.trt.main, bundle, "--sm", 89, "--capacity", 64, "--chunk", 32, "--one-profile")
    return done


def table(roads: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for the families that came equally far."""
    steps, rows = list(next(iter(roads.values()))), {}
    for family, road in roads.items():
        rows.setdefault(" | ".join("yes" if road[step] == "yes" else "no" for step in steps), []).append(family)
    lines = [f"| {', '.join(families)} | {found} |" for found, families in rows.items()]
    return "\n".join(["| family | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|", *lines])


# What runs a bundle, and with which kernels of the native core. "yes": a bundle ran on it and kept its budget of KL.
HARDWARE = {"native core, AMX": "avx512-amx", "native core, AVX-512 VNNI": "avx512-vnni", "native core, AVX-VNNI": "avx-vnni",
            "native core, AVX2": "avx2", "native core, ARM i8mm": "neon-i8mm", "native core, ARM dotprod": "neon-dotprod",
            "native core, any CPU": "plain"}


def hardware(bundle: Path) -> dict[str, str]:
    """Engine -> "yes" where it answers a verified bundle's first golden prompt as PyTorch does, or why it did not run here."""
    opened = open_bundle(bundle)
    _, prompts = read_golden(opened)
    ways = {name: partial(NativeBackend, opened, threads=1, isa=isa) for name, isa in HARDWARE.items()}
    ways |= {"ONNX Runtime, CPU": partial(OrtBackend, opened, threads=1),
             "ONNX Runtime, CUDA": partial(CudaBackend, opened), "TensorRT engines": partial(TrtBackend, opened)}
    found = {}
    for name, way in ways.items():
        try:
            backend = way()
        except (UserError, Unavailable) as error:
            found[name] = str(error)
            continue
        with contextlib.closing(backend):
            compared = replay(backend, prompts[0])
        assert compared.keeps(0.02), f"{name}: a mean KL of {compared.kl.mean()}"
        found[name] = "yes"
    return found


def shown(block: str) -> str:
    """A table as the README has it."""
    begin, end = MARKS[block]
    return README.read_text("utf-8").split(begin)[1].split(end)[0].strip()


def write(block: str, made: str) -> None:
    begin, end = MARKS[block]
    before, rest = README.read_text("utf-8").split(begin)
    README.write_text(f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}", "utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        roads = {family: walk(family, Path(work, family)) for family in EVERY_FAMILY}
        made, machine = table(roads), hardware(Path(work, "smollm2/bundle"))
    print(made, *(f"{name}: {result}" for name, result in machine.items()), sep="\n")
    if "--write" in sys.argv:
        write("families", made)
        ROADS.write_text(json.dumps(roads, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
