"""Encoders measured: texts a second through `embed` and its like, many at once and one by one.

    sentences_per_s       of TEXTS texts of random tokens together, of 1/8 to all of --prompt-tokens each
    ms_p50, ms_p95        within a run, of one text alone
    load_ms               Encoder(), once, imports not included
    peak_rss_mb           most memory resident in the process (MiB)

Encoders take turns within every round, as decoders do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ..encoder import Encoded, Encoder
from ..errors import UserError
from .conditions import resident_mb
from .report import Samples

TEXTS, ALONE = 64, 24


def encoders(openers: dict[str, Callable[[], Encoder]], tokens: int, rounds: int) -> tuple[Samples, dict[str, str]]:
    """The figures of each encoder by its name, and what to say of the run. openers: what opens each. Raises UserError."""
    samples: Samples = {}
    opened = []
    for name, opener in openers.items():
        start = time.perf_counter()
        encoder = opener()
        opened.append((name, encoder, _texts(encoder, tokens)))
        samples[name] = {"load_ms": [(time.perf_counter() - start) * 1e3]}
    for turn in range(rounds + 1):
        for name, encoder, texts in reversed(opened) if turn % 2 else opened:
            found = _measure(encoder, texts)
            for figure, value in found.items() if turn else ():
                samples[name].setdefault(figure, []).append(value)
    for name, encoder, _ in opened:
        samples[name]["peak_rss_mb"] = [resident_mb(field="VmHWM") or float("nan")]
        encoder.close()
    runs = {f"runs {name}" if len(opened) > 1 else "runs": f"{encoder.bundle.task}, {encoder.runs_as}"
            for name, encoder, _ in opened}
    return samples, {"encoder": ", ".join(openers), **runs,
                     "run": f"{TEXTS} texts of {max(1, tokens // 8)} to {tokens} tokens, {rounds} runs after one to warm up"}


def _texts(encoder: Encoder, tokens: int) -> list[Encoded]:
    bundle, rng = encoder.bundle, np.random.default_rng(0)
    if tokens > bundle.max_tokens:
        raise UserError(f"--prompt-tokens {tokens}: {bundle.folder} takes {bundle.max_tokens}; give at most as many")
    lengths = np.linspace(max(1, tokens // 8), tokens, TEXTS).astype(int)
    ids = [rng.integers(bundle.manifest["model"]["vocab_size"], size=length) for length in lengths]
    return [Encoded(one, np.zeros_like(one), np.zeros((len(one), 2), np.int64), False) for one in ids]


def _measure(encoder: Encoder, texts: list[Encoded]) -> dict[str, float]:
    start = time.perf_counter()
    encoder.run(texts)
    rate, alone = len(texts) / (time.perf_counter() - start), []
    for one in texts[::max(1, len(texts) // ALONE)]:
        start = time.perf_counter()
        encoder.run([one])
        alone.append((time.perf_counter() - start) * 1e3)
    return {"sentences_per_s": rate, "ms_p50": float(np.percentile(alone, 50)), "ms_p95": float(np.percentile(alone, 95))}
