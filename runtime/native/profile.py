"""Where the time of a native step goes: microseconds of each part against the bytes it reads and the machine's bandwidth.

The wall of a part is the time its weights (and filled cache) take at the bandwidth measured in the same run: one thread
per CPU summing a buffer several times larger than the caches. A part far above its wall is the next one to improve.
"""

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
"""
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
    threads, speeds = available_cpus(), []
    parts = [np.ones((megabytes << 20) // threads // 8) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            speeds.append(sum(part.nbytes for part in parts) / (time.perf_counter() - start) / 1e9)
    return max(speeds)


def profile(options: Options) -> None:
    bundle = open_bundle(options.bundle)
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
