"""A bundle as a system to be measured; several bundles each in a process of its own, so that their memory is told apart.

A system has a `name`, and measures one part at a time, each giving {figure: value}, or nothing where it cannot:

    single(prompt_tokens, new_tokens)           one sequence from an empty cache: speed of both, latency, each token's time
    context(context, new_tokens)                decode speed up to so many tokens in the cache
    streams(count, prompt_tokens, new_tokens)   that many sequences at once, from different prompts of that length
    finish() -> what was measured once          time to load, memory;  and closes it
    described() -> {what: text}                 program, versions, model
"""

import concurrent.futures
import multiprocessing
import platform
import random
import sys
import time

import numpy as np

from ..engine import Engine, Timings
from ..machine import peak_rss_mb
from .conditions import energy_joules
from .statistics import percentiles

PACKAGES = ("numpy", "tokenizers", "onnxruntime", "tensorrt", "tensorrt_rtx")     # named where they are in use
GREEDY = {"ignore_model_stop": True, "temperature": 0, "repetition_penalty": 1}


class Bundle:
    """name: to call it by; open: gives its engine; rows: sequences at once, at most."""

    def __init__(self, name: str, open, rows: int = 1):
        self.name, start = name, time.perf_counter()
        self._engine: Engine = open()
        self._load_ms = (time.perf_counter() - start) * 1e3
        self._engine.serve_with(rows=max(rows, 16), queue=max(rows, 16))
        self._random = random.Random(0)

    def described(self) -> dict[str, str]:
        versions = {"python": platform.python_version()}
        versions |= {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
        return {"engine": self._engine.explain().splitlines()[0],
                "versions": ", ".join(f"{package} {number}" for package, number in versions.items())}

    def single(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Encoding as many tokens' text is in the time to the first token, choosing and decoding tokens are in all times."""
        prompt, before = self._prompt(prompt_tokens), energy_joules()
        text, start = self._engine.tokenizer.decode(prompt), time.perf_counter()
        self._engine.tokenizer.encode(text)
        encoding = (time.perf_counter() - start) * 1e3
        reply, = self._engine.generate(prompt, max_new_tokens=new_tokens, **GREEDY)
        after, times = energy_joules(), [encoding + ms for ms in reply.timings.token_ms]
        energy = {"joules": after - before} if after and before and after > before else {}
        return figures(Timings(prompt_tokens, times)) | energy

    def context(self, context: int, new_tokens: int) -> dict[str, float]:
        reply, = self._engine.generate(self._prompt(context - new_tokens), max_new_tokens=new_tokens, **GREEDY)
        return {f"at_{context}_tokens_per_s": reply.timings.decode_tokens_per_s}

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Through the scheduler. Decode speed is counted while all are at it: from the last one's first token to the first one's
        last; the whole is prompts and replies by the time that all of it took."""
        start = time.perf_counter()
        pending = [self._engine.submit(self._prompt(prompt_tokens), max_new_tokens=new_tokens, **GREEDY) for _ in range(count)]
        replies = [one.result() for one in pending]
        whole = time.perf_counter() - start
        times = [one.draft.start + np.array(reply.timings.token_ms) / 1e3 for one, reply in zip(pending, replies)]
        first, last = max(each[0] for each in times), min(each[-1] for each in times)
        found = {f"streams_{count}_whole_tokens_per_s": count * (prompt_tokens + new_tokens) / whole}
        if first < last:
            found[f"streams_{count}_tokens_per_s"] = sum(((each > first) & (each <= last)).sum() for each in times) / (last - first)
        return dict(reversed(found.items()))

    def finish(self) -> dict[str, float]:
        self._engine.close()
        return {"load_ms": self._load_ms, "peak_rss_mb": peak_rss_mb()}

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(self._engine.bundle.model["config"]["vocab_size"]), k=tokens)


class Apart:
    """The same in a process of its own."""

    def __init__(self, name: str, open, rows: int = 1):
        self.name = name
        self._process = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._do(_open, name, open, rows)

    def _do(self, *call):
        try:
            return self._process.submit(*call).result()
        except BaseException:
            self._process.shutdown(wait=False, cancel_futures=True)
            raise

    def described(self) -> dict[str, str]:
        return self._do(_call, "described")

    def single(self, *sizes: int) -> dict[str, float]:
        return self._do(_call, "single", *sizes)

    def context(self, *sizes: int) -> dict[str, float]:
        return self._do(_call, "context", *sizes)

    def streams(self, *sizes: int) -> dict[str, float]:
        return self._do(_call, "streams", *sizes)

    def finish(self) -> dict[str, float]:
        found = self._do(_call, "finish")
        self._process.shutdown()
        return found


_opened: Bundle | None = None     # of the process that is apart


def _open(*bundle) -> None:
    global _opened
    _opened = Bundle(*bundle)


def _call(name: str, *sizes: int) -> dict:
    return getattr(_opened, name)(*sizes)


def figures(timings: Timings) -> dict[str, float]:
    """What the times of one reply's tokens say."""
    return {"decode_tokens_per_s": timings.decode_tokens_per_s,
            "prefill_tokens_per_s": timings.prompt_tokens / timings.ttft_ms * 1e3, "ttft_ms": timings.ttft_ms,
            **percentiles("tpot_ms", np.diff(timings.token_ms))}
