"""Where the time of a native step goes: microseconds of each part against the bytes it reads and the machine's bandwidth.

The wall of a part is the time its weights (and filled cache) take at the bandwidth measured in the same run: one thread
per CPU summing a buffer several times larger than the caches. A part far above its wall is the next one to improve.

`--beside N` measures how it slows on a busy machine instead: steps per second with N single-threaded processes that
never rest, against the fair share. Of C CPUs, processes that want n_i of them get equal parts, and what one does not
want goes to the others; so the engine's share beside N such processes is C - N CPUs, at least C / (N + 1) and one, and
its fair speed that of so many threads on the machine alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import Bundle, open_bundle
from ..cli import Checked, arg, run, table
from ..machine import available_cpus, cpu_name
from .backend import CACHE_DTYPES, NativeBackend

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 --threads 1 --context 4000
  %(prog)s build/smollm2-135m-int4 --beside 1"""
_PART_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "qkv": "qkv", "o": "output", "gate": "gate_up", "up": "gate_up",
            "gate_up": "gate_up", "down": "down"}


@dataclass(frozen=True)
class Options(Checked):
    """Print the microseconds of each part of a decoding step against bytes moved and bandwidth."""

    bundle: Path = arg(positional=True, help="folder of the bundle")
    threads: int | None = arg(None, help="threads of the core (default: every available CPU)", least=1)
    context: int = arg(128, help="filled slots of the cache at the first step", least=1)
    rows: int = arg(1, help="rows decoded together", least=1)
    steps: int = arg(64, help="steps to average over", least=1)
    cache_dtype: str = arg("float16", help="dtype of the KV cache", choices=CACHE_DTYPES)
    beside: int = arg(0, help="measure the share kept beside this many busy processes", least=0)


def part_bytes(bundle: Bundle, backend: NativeBackend, slots: int, rows: int) -> dict[str, int]:
    """Bytes that a step of `rows` rows must read: weights once, each row's filled cache once."""
    names = {t["name"]: t["bytes"] for t in bundle.manifest["weights"]["tensors"]}
    moved = dict.fromkeys(("qkv", "attention", "output", "gate_up", "down", "head"), 0)
    head = "head." if any(name.startswith("head.") for name in names) else "embed."
    for name, size in names.items():
        if name.startswith("layers."):
            if part := _PART_OF.get(name.split(".")[2]):
                moved[part] += size
        elif name.startswith(head):
            moved["head"] += size
    moved["attention"] = backend.cache_bytes(rows, slots)
    return moved


def bandwidth(megabytes: int = 512) -> float:
    """GB/s of reading memory with a thread on every available CPU."""
    threads, parts = available_cpus(), []
    for _ in range(threads):
        parts.append(np.ones((megabytes << 20) // threads // 8))
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(lambda: list(pool.map(np.max, parts))) for _ in range(5))
    return sum(part.nbytes for part in parts) / best / 1e9


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def steps_per_s(bundle: Bundle, options: Options, threads: int | None, seconds: float) -> float:
    """Median of the steps of one row in each tenth of the time."""
    backend, counts = NativeBackend(bundle, threads=threads, cache_dtype=options.cache_dtype), []
    cache, zeros = backend.new_cache(1, options.context + 1), np.zeros((1, 1), np.int64)
    for _ in range(10):
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds / 10:
            backend.forward(zeros + 1, None, np.array([options.context]), zeros, cache)
            count += 1
        counts.append(count / elapsed)
    backend.close()
    return float(np.median(counts))


def share(options: Options, bundle: Bundle, rounds: int = 3, seconds: float = 2.0) -> None:
    """Print the speed beside busy processes against the fair one, in turns."""
    cpus = available_cpus()
    threads = min(options.threads or cpus, max(1, cpus - options.beside, cpus // (options.beside + 1)))
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(steps_per_s(bundle, options, threads, seconds))
        busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(options.beside)]
        try:
            beside.append(steps_per_s(bundle, options, options.threads, seconds))
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(f"{cpu_name()}, {cpus} CPUs: {np.median(beside):.0f} steps/s beside {options.beside} busy processes "
          f"({min(beside):.0f} to {max(beside):.0f}); fair: {np.median(alone):.0f}, of {threads} threads alone "
          f"({min(alone):.0f} to {max(alone):.0f}); share kept: {np.median(beside) / np.median(alone):.2f}")


def profile(options: Options) -> None:
    bundle = open_bundle(options.bundle)
    if options.beside:
        share(options, bundle)
        return
    speed = bandwidth()
    backend = NativeBackend(bundle, threads=options.threads, cache_dtype=options.cache_dtype)
    cache = backend.new_cache(options.rows, options.context + options.steps + 1)
    tokens, zeros = np.ones((options.rows, 1), np.int64), np.zeros((options.rows, 1), np.int64)

    def steps(count: int) -> None:
        for i in range(count):
            backend.forward(tokens, None, np.full(options.rows, options.context + i), zeros, cache)

    steps(8)
    backend.profile(True)
    steps(options.steps)
    spent = backend.profile(False)
    moved = part_bytes(bundle, backend, options.context + options.steps // 2, options.rows)
    lines = []
    for part, total in [*spent.items(), ("step", sum(spent.values()))]:
        size = sum(moved.values()) if part == "step" else moved.get(part, 0)
        us = total / options.steps
        lines.append({"part": part, "us": f"{us:.1f}", "MB": f"{size / 1e6:.2f}", "GB/s": f"{size / us / 1e3:.1f}" if us else "",
                      "wall us": f"{size / speed / 1e3:.1f}", "of the wall": f"{size / speed / 1e3 / us:.0%}" if us else ""})
    print(f"{cpu_name()}, {backend.threads} threads, {backend.isa}, {speed:.0f} GB/s measured; {options.rows} rows at "
          f"{options.context} slots, {options.cache_dtype} cache")
    print(table(lines))
    backend.close()


def main(argv=None) -> int:
    return run(Options, profile, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
