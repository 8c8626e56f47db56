"""Measure a bundle on this machine: `python -m runtime.bench BUNDLE`.

Each run generates greedily from random tokens, through `Engine.generate`, past any end-of-text token. One run warms up
and is not counted. Reported is the median over the runs of each figure, with the smallest and largest beside it:

    decode_tokens_per_s   tokens after the first, by the time from the first to the last
    prefill_tokens_per_s  prompt tokens by the time to the first token
    ttft_ms               time to first token
    tpot_ms_p50/p95/p99   percentiles, within a run, of the time from one token to the next
    load_ms               Engine(), once, imports not included
    peak_rss_mb           most memory resident in this process (MiB), imports and tokenizer included

Runs of other processes show in the spread. To compare two systems, run them in turns.
"""

import json
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cli import arg, run, table
from .engine import Engine, Timings
from .errors import UserError
from .files import write
from .generate import EngineOptions
from .machine import available_cpus, cpu_name, peak_rss_mb

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 --prompt-tokens 512 --threads 1 --json bench.json
"""
PACKAGES = ("numpy", "tokenizers", "onnxruntime", "tensorrt", "tensorrt_rtx")     # named where they are in use


@dataclass(frozen=True, kw_only=True)
class Options(EngineOptions):
    """Measure a bundle on this machine: load, prefill, decode, memory."""
    prompt_tokens: int = arg(128, help="tokens of the prompt", least=1)
    new_tokens: int = arg(128, help="tokens to generate", least=2)
    repeat: int = arg(5, help="runs that count", least=1)
    json: Path | None = arg(None, help="write the figures to this file")


def bench(options: Options) -> None:
    """Run, print the table, write the JSON."""
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"{options.json}: no such folder to write it in")
    start = time.perf_counter()
    with options.open() as engine:
        load_ms = (time.perf_counter() - start) * 1e3
        samples = [measure(engine, options) for _ in range(options.repeat + 1)][1:]
        header = describe(engine, options)
    samples = {key: [sample[key] for sample in samples] for key in samples[0]}
    samples |= {"load_ms": [load_ms], "peak_rss_mb": [peak_rss_mb()]}
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    print(table([{"": key, "median": f"{np.median(values):.2f}", "min": f"{min(values):.2f}", "max": f"{max(values):.2f}"}
                 for key, values in samples.items()]))
    if options.json:
        figures = {key: float(np.median(values)) for key, values in samples.items()}
        write(options.json, json.dumps({**figures, "samples": samples, **header}, indent=2) + "\n")


def measure(engine: Engine, options: Options) -> dict[str, float]:
    """The figures of one run. Every run has the same prompt."""
    vocab = engine.bundle.model["config"]["vocab_size"]
    prompt = random.Random(0).choices(range(vocab), k=options.prompt_tokens)
    reply, = engine.generate(prompt, max_new_tokens=options.new_tokens, ignore_model_stop=True, temperature=0, repetition_penalty=1)
    return figures(reply.timings)


def figures(timings: Timings) -> dict[str, float]:
    """What the times of one reply's tokens say."""
    p50, p95, p99 = np.percentile(np.diff(timings.token_ms), (50, 95, 99))
    return {"decode_tokens_per_s": timings.decode_tokens_per_s,
            "prefill_tokens_per_s": timings.prompt_tokens / timings.ttft_ms * 1e3, "ttft_ms": timings.ttft_ms,
            "tpot_ms_p50": float(p50), "tpot_ms_p95": float(p95), "tpot_ms_p99": float(p99)}


def describe(engine: Engine, options: Options) -> dict[str, str]:
    """Machine, versions and what was run."""
    versions = {"python": platform.python_version()}
    versions |= {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
    return {"bundle": engine.bundle.name, "engine": engine.explain().splitlines()[0],
            "machine": f"{cpu_name()}, {available_cpus()} CPUs, {platform.system()} {platform.release()}",
            "versions": ", ".join(f"{package} {number}" for package, number in versions.items()),
            "run": f"{options.prompt_tokens} prompt tokens, {options.new_tokens} new, {options.repeat} runs after one to warm up"}


def main(argv=None) -> int:
    return run(Options, bench, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
