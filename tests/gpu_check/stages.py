"""The stages of `models` and `compress` on the device, each by its command: how fast, and with what result.

Speeds of what trains are those of metrics.jsonl over the second half of its steps, tokens of padding counted; the teacher's and evaluation's
are of the windows that a second, longer call has more than a first one, so that loading the model is not in them.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_check.place import Place, Row
from gpu_check.prepare import command

TARGETS = {"train": 387_000.0, "lora": 40_000.0, "distill": 193_000.0, "teacher": 60_000.0, "gptq": 40.0}     # an H100's; train: 40% of its peak


def _memory(place: Place) -> Iterator[Row]:
    """What this process has had of the device at most."""
    if place.device == "cuda":
        import torch
        yield Row("device memory", torch.cuda.max_memory_allocated() / 1e6, "MB")


def train(place: Place) -> Iterator[Row]:
    from models import train
    sizes = place.sizes
    yield _speed(place, "train", train, "--checkpoint", place.work / "model", "--data", place.work / "text.txt", "--valid", place.work / "held.txt",
                 "--context", sizes.length, "--batch", sizes.batch, "--learning-rate", 1e-5)
    yield from _memory(place)


def lora(place: Place) -> Iterator[Row]:
    from models import finetune
    yield _speed(place, "lora", finetune, place.work / "model", "--task", "chat", "--data", place.work / "chats.jsonl", "--context", 256,
                 "--batch", place.sizes.chats, "--limit", 4000 if place.device == "cuda" else 40)
    yield from _memory(place)


def distill(place: Place) -> Iterator[Row]:
    from compress import distill
    sizes = place.sizes
    yield _speed(place, "distill", distill, "--teacher", place.work / "model", "--layers", sizes.student, "--live", "--data", place.work / "text.txt",
                 "--context", sizes.length, "--batch", sizes.batch // 2, "--teacher-cache", place.work / "teachers")
    yield from _memory(place)


def _speed(place: Place, name: str, module, *words) -> Row:
    out = place.work / f"run-{name}"
    command(module.main, *words, "-o", out, "--steps", place.sizes.steps, "--eval-rows", 2, "--device", place.device)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    shutil.rmtree(out)
    speeds = [line["tokens_per_s"] for line in lines if line["kind"] == "train"]
    speeds = speeds[len(speeds) // 2:]
    return Row("speed", len(speeds) / sum(1 / speed for speed in speeds), "tokens/s", TARGETS[name])


def teacher(place: Place) -> Iterator[Row]:
    from compress import teacher
    def ask(windows: int) -> None:
        command(teacher.main, place.work / "model", "--data", place.work / "text.txt", "-o", place.work / f"teacher-{windows}", "--windows", windows,
                "--length", place.sizes.length, "--device", place.device)
    yield Row("speed", _more(ask, max(1, place.sizes.windows // 4), place.sizes.windows) * place.sizes.length, "tokens/s", TARGETS["teacher"])
    yield from _memory(place)


def evaluate(place: Place) -> Iterator[Row]:
    from models import evaluate
    def score(windows: int) -> None:
        command(evaluate.main, place.work / "model", "--data", place.work / "held.txt", "--max-windows", windows, "--window", place.sizes.length,
                "--device", place.device)
    yield Row("speed", _more(score, max(1, place.sizes.windows // 8), place.sizes.windows) * place.sizes.length, "tokens/s")
    yield from _memory(place)


def _more(work, few: int, many: int) -> float:
    """Windows a second of those that `work(many)` has more than `work(few)`."""
    times = []
    for windows in (few, many):
        start = time.perf_counter()
        work(windows)
        times.append(time.perf_counter() - start)
    return (many - few) / max(times[1] - times[0], 1e-9)


def gptq(place: Place) -> Iterator[Row]:
    from compress import quantize
    sizes, out = place.sizes, place.work / "gptq"
    start = time.perf_counter()
    command(quantize.main, place.work / "model", "-o", out, "--method", "gptq", "--data", place.work / "text.txt", "--windows", sizes.windows,
            "--length", sizes.length, "--sensitivity-windows", min(24, sizes.windows), "--device", place.device)
    yield Row(f"{sizes.windows} x {sizes.length} tokens", time.perf_counter() - start, "s", TARGETS["gptq"])
    yield from _memory(place)
    after, rounded = (_divergence(place, checkpoint) for checkpoint in (out, place.work / "int4"))
    yield Row("KL to the original", after, "nats", ok=after < rounded if place.device == "cuda" else None)
    yield Row("KL of rounding to nearest", rounded, "nats")


def _divergence(place: Place, checkpoint: Path) -> float:
    from models import evaluate
    command(evaluate.main, checkpoint, "--task", "kl", "--reference", place.work / "model", "--data", place.work / "held.txt", "--max-windows",
            place.sizes.judged, "--window", place.sizes.length, "--json", place.work / "kl.json", "--device", place.device)
    return json.loads((place.work / "kl.json").read_text("utf-8"))["kl"]


def rounding(place: Place) -> Iterator[Row]:
    """Codes and scales rounded on the device are the CPU's, to the bit."""
    import torch
    from compress import quantize
    from models.checkpoint import open_checkpoint
    out, start = place.work / "rounded", time.perf_counter()
    command(quantize.main, place.work / "model", "-o", out, "--bits", 4, "--group", 32, "--device", place.device)
    yield Row("rounding to nearest", time.perf_counter() - start, "s")
    before, after = open_checkpoint(place.work / "int4"), open_checkpoint(out)
    names = list(before.names())
    other = [name for name in names if not torch.equal(before.read(name), after.read(name))]
    yield Row("tensors equal to the CPU's", f"{len(names) - len(other)} of {len(names)}" + (f", not {other[0]}" if other else ""), ok=not other)
