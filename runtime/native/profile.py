"""Where the time of a native step goes: microseconds of each part against the bytes it reads and the machine's bandwidth.

The wall of a part is the time its weights (and filled cache) take at the bandwidth measured in the same run: one thread
per CPU summing a buffer several times larger than the caches. A part far above its wall is the next one to improve.
"""

import itertools
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
  %(prog)s build/smollm2-135m-int4 --tokens 8                     # as seven guesses are checked
"""
_PARTS = {"qkv": ("q", "k", "v", "qkv", "attn_gate", "delta_in", "delta_qkv", "delta_z", "delta_b", "delta_a", "mamba_in", "mamba_z",
                  "mamba_xbc", "mamba_dt"),
          "attention": ("conv_in", "conv_b", "conv_c", "conv_x"), "output": ("o", "conv_out", "delta_out", "mamba_out"),
          "gate_up": ("router", "gate", "up", "gate_up"), "down": ("down",), "other": ("per_layer_gate", "per_layer_proj")}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}


@dataclass(frozen=True)
class Options(Checked):
    """Print the microseconds of each part of a decoding step against bytes moved and bandwidth."""

    bundle: Path = arg(positional=True, help="folder of the bundle")
    threads: int | None = arg(None, help="threads of the core (default: every available CPU)", least=1)
    context: int = arg(128, help="filled slots of the cache at the first step", least=1)
    rows: int = arg(1, help="rows decoded together", least=1)
    tokens: int = arg(1, help="tokens that each of them takes in a step, all with logits, as guesses are checked", least=1, most=31)
    steps: int = arg(64, help="steps to average over", least=1)
    cache_dtype: str = arg("float16", help="dtype of the KV cache", choices=CACHE_DTYPES)


def part_bytes(bundle: Bundle, backend: NativeBackend, slots: int, rows: int) -> dict[str, int]:
    """Bytes that a step of `rows` rows must read: weights once (of experts those that a token chooses), each row's filled cache once,
    and its recurrent states, which are written too."""
    moved = dict.fromkeys((*_PARTS, "head"), 0)
    tensors, layers = bundle.manifest["weights"]["tensors"], bundle.model["config"]["layers"]
    head = "head." if any(t["name"].startswith("head.") for t in tensors) else "embed."
    for t in tensors:
        words = t["name"].split(".")
        if words[0] == "layers" and (part := _PART_OF.get(words[-2])):
            layer = layers[int(words[1])]
            moved[part] += t["bytes"] * layer["experts_per_token"] // layer["experts"] if words[2] == "experts" else t["bytes"]
        elif t["name"].startswith(head):
            moved["head"] += t["bytes"]
    moved["attention"] += backend.cache_bytes(rows, slots)
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
    cache = backend.new_cache(options.rows, options.context + (options.steps + 8) * options.tokens)
    tokens, zeros = np.ones((options.rows, options.tokens), np.int64), np.zeros((options.rows, 1), np.int64)
    slot, wanted = itertools.count(options.context, options.tokens), np.tile(np.arange(options.tokens), (options.rows, 1))

    def steps(count: int) -> None:
        for i in range(count):
            backend.forward(tokens, None, np.full(options.rows, next(slot)), wanted, cache)

    backend.forward(np.ones((options.rows, options.context), np.int64), None, zeros[:, 0], zeros, cache)
    steps(8)
    backend.profile(True)
    steps(options.steps)
    spent = backend.profile(False)
    moved = part_bytes(bundle, backend, options.context + options.steps * options.tokens // 2, options.rows)
    lines = []
    for part, total in [*spent.items(), ("step", sum(spent.values()))]:
        size = sum(moved.values()) if part == "step" else moved.get(part, 0)
        us = total / options.steps
        lines.append({"part": part, "us": f"{us:.1f}", "MB": f"{size / 1e6:.2f}", "GB/s": f"{size / us / 1e3:.1f}" if us else "",
                      "wall us": f"{size / speed / 1e3:.1f}", "of the wall": f"{size / speed / 1e3 / us:.0%}" if us else ""})
    print(f"{cpu_name()}, {backend.threads} threads, {backend.isa}, {speed:.0f} GB/s measured; {options.rows} rows of "
          f"{options.tokens} tokens at {options.context} slots, {options.cache_dtype} cache")
    print(table(lines))
    backend.close()


def main(argv=None) -> int:
    return run(Options, profile, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
