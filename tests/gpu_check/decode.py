"""A bundle on the GPU through ONNX Runtime: is it right, how fast is it, what does it keep on the host.

`rung` is one graph by itself: logits for the reference's tokens (read at once, then step by step) against the exact CPU run's, decode with every
step's logits on the host, prefill, time to load, memory. `engine` is what an app gets: tokens chosen greedily and drawn among 40, through
`Engine`, with what `explain` says. Neither loads PyTorch, so the memory is the runtime's.
"""

import statistics
import time
from collections.abc import Iterator

import numpy as np

from gpu_check.place import Place, Row
from gpu_check.prepare import PREFILLED
from runtime import Engine
from runtime.bundle import open_bundle
from runtime.compare import compare
from runtime.cuda_backend import CudaBackend
from runtime.decode import logits, prefill, step
from runtime.machine import peak_rss_mb
from runtime.ort_backend import OrtBackend

BUDGETS = {"fp32": 1e-4, "fp16": 1e-3}       # mean KL in nats; seen on an H100: 4e-6 and 2e-5
FUSED_ON_CPU = 0.1                           # of a graph that rounds its activations to int8 there
NEAR = 0.05                                  # of two logits that a kernel may round either way
TARGETS = {"decode": 1200.0, "prefill": 25000.0, "load": 1.0, "memory": 400.0}
FREE_CHOICE = {"temperature": 0.8, "top_k": 40, "seed": 1}
GREEDY = {"temperature": 0, "repetition_penalty": 1}


def rung(place: Place, dtype: str, role: str) -> Iterator[Row]:
    bundle, sizes = open_bundle(place.work / dtype), place.sizes
    start = time.perf_counter()
    backend = open_rung(place, bundle, role)
    yield Row("load", time.perf_counter() - start, "s", TARGETS["load"])
    if place.device == "cuda":
        yield Row("explained", backend.how)
    cache = backend.new_cache(1, sizes.prompt + sizes.new + 8)
    prompt = np.random.default_rng(0).integers(0, bundle.model["config"]["vocab_size"], sizes.prompt)
    token = prefill(backend, cache, [prompt]).argmax(axis=1)
    times = []
    for _ in range(sizes.new):
        before = time.perf_counter()
        token = step(backend, cache, token).argmax(axis=1)
        times.append(time.perf_counter() - before)
    seconds = statistics.median(times[len(times) // 4:])
    yield Row("decode", 1 / seconds, "tokens/s", TARGETS["decode"])
    yield Row("a step", seconds * 1e3, "ms")
    times = []
    for _ in range(8):
        cache.lengths[:] = 0
        before = time.perf_counter()
        prefill(backend, cache, [prompt])
        times.append(time.perf_counter() - before)
    yield Row(f"prefill of {sizes.prompt}", sizes.prompt / statistics.median(times[2:]), "tokens/s", TARGETS["prefill"])
    yield Row("host memory", peak_rss_mb(), "MB", TARGETS["memory"])
    yield from parity(place, backend, BUDGETS[dtype] if place.device == "cuda" else FUSED_ON_CPU)
    backend.close()


def open_rung(place: Place, bundle, role: str):
    if role == "cuda" and place.device == "cpu":
        from export.cuda_on_cpu import CudaOnCpu
        return CudaOnCpu(bundle, threads=None)
    return (CudaBackend if place.device == "cuda" else OrtBackend)(bundle, role=role, threads=None)


def parity(place: Place, backend, budget: float) -> Iterator[Row]:
    """The same tokens read at once and then one by one, against the exact CPU run."""
    reference = np.load(place.work / "reference.npz")
    ids, cache = reference["ids"], backend.new_cache(1, len(reference["ids"]) + 8)
    found = [logits(backend, ids[:PREFILLED], cache=cache).copy()]
    found += [logits(backend, ids[n:n + 1], cache=cache).copy() for n in range(PREFILLED, len(ids))]
    compared = compare(reference["logits"], np.concatenate(found))
    yield Row("KL to the exact CPU run", float(compared.kl.mean()), "nats", ok=compared.keeps(budget))
    wrong = int((compared.differs & ~compared.near_tie).sum())
    yield Row("same likeliest token", f"{1 - compared.differs.mean():.1%}, {wrong} of {len(ids)} wrong beyond near ties",
              ok=wrong == 0 if place.device == "cuda" else None)


def engine(place: Place, dtype: str) -> Iterator[Row]:
    sizes, start = place.sizes, time.perf_counter()
    with Engine(place.work / dtype, provider=place.device) as opened:
        yield Row("load", time.perf_counter() - start, "s", TARGETS["load"])
        prompt = np.random.default_rng(0).integers(0, opened.bundle.model["config"]["vocab_size"], sizes.prompt).tolist()
        for name, choice in (("greedy", GREEDY), ("among 40", FREE_CHOICE)):
            speeds, first = [], []
            for _ in range(4):
                reply, = opened.generate(prompt, max_new_tokens=sizes.new, ignore_model_stop=True, **choice)
                speeds.append(reply.timings.decode_tokens_per_s)
                first.append(reply.timings.ttft_ms)
            yield Row(f"decode, {name}", statistics.median(speeds[1:]), "tokens/s", TARGETS["decode"])
            if name == "greedy":
                yield _greedy(opened.backend, prompt, reply.tokens)
        yield Row(f"prefill of {sizes.prompt}", sizes.prompt / statistics.median(first[1:]) * 1e3, "tokens/s", TARGETS["prefill"])
        yield Row("host memory", peak_rss_mb(), "MB", TARGETS["memory"])
        yield Row("explained", " / ".join(opened.explain().splitlines()))


def _greedy(backend, prompt: list[int], tokens: list[int]) -> Row:
    """What was chosen, perhaps on the device, against the logits of the same steps on the host."""
    cache, behind = backend.new_cache(1, len(prompt) + len(tokens) + 8), 0.0
    found = prefill(backend, cache, [np.array(prompt)])[0]
    for token in tokens:
        behind = max(behind, float(found.max() - found[token]))
        found = step(backend, cache, np.array([token]))[0]
    return Row("greedy ids behind the largest logit, at most", behind, ok=behind < NEAR)
