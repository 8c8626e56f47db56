"""Check a bundle on this machine: `python -m runtime.verify BUNDLE`.

First the sha256 of every file; a changed one is named and the exit code is 1. Then the golden outputs: for each prompt
that `export.verify` stored, PyTorch's tokens are fed again through TensorRT, CUDA, the native core and ONNX Runtime's CPU,
those of them that this machine can have (the first is what an `Engine` runs), and the logits compared with PyTorch's. KL
divergence is taken over the 20 likeliest tokens and the mass of all others, which is a lower bound of the whole; a token
that differs where PyTorch's first two were closer than the noise (twice the largest difference of a logit among the 20)
is a near tie, not an error. The mean KL of a runner must keep the budget that was stored with the golden outputs; past it
the exit code is 1, as it is where no runner ran at all. Kernels differ from machine to machine, which is why this is a
command for the device and not a certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .backend import Backend
from .backends import open_backend
from .bundle import Bundle, changed_files, open_bundle
from .cli import arg, run, table
from .errors import CheckFailed, Unavailable, UserError
from .golden import read_golden
from .machine import cpu_threads
from .text import Tokenizer

EXAMPLES = """examples:
  %(prog)s build/smollm2-135m-int4
  %(prog)s build/smollm2-135m-int4 --exact
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check a bundle on this machine: every file's hash, and the golden outputs through every graph."""
    bundle: Path = arg(positional=True, help="folder of the bundle")
    threads: int | None = arg(None, help="CPU threads; default: the CPUs this process may use")
    exact: bool = arg(False, help="run the portable graph without fused int8 kernels too (slow, much memory)")


@dataclass(frozen=True)
class Comparison:
    """How one graph's logits compare with PyTorch's after one prompt."""
    kl: np.ndarray                    # [tokens]
    differs: np.ndarray               # bool [tokens]: the likeliest token is another
    near_tie: np.ndarray              # bool [tokens]: it is, and the first two were within the noise


def compare(logits: np.ndarray, golden: dict) -> Comparison:
    """Compare float32 logits [tokens, vocab] with a prompt of golden.json."""
    top_ids, top = np.array(golden["top_ids"]), np.array(golden["top_logits"])
    log_p = top - np.array(golden["logsumexp"])[:, None]
    logits = logits.astype(np.float64)
    peak = logits.max(axis=1)
    got = np.take_along_axis(logits, top_ids, axis=1)
    log_q = got - (peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1)))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):        # golden logits that are no one's: an infinite KL, or none
        rest_p, rest_q = (np.maximum(1 - np.exp(log).sum(axis=1), 1e-12) for log in (log_p, log_q))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    # A constant added to all logits changes no probability, so it is no noise either.
    shift = (got - top).mean(axis=1, keepdims=True)
    noise = 2 * np.abs(got - top - shift).max(axis=1)
    differs = logits.argmax(axis=1) != top_ids[:, 0]
    return Comparison(kl, differs, differs & (np.array(golden["margins"]) < noise))


def golden_logits(backend: Backend, golden: dict) -> np.ndarray:
    """float32 logits [tokens, vocab] after the prompt and each golden token but the last."""
    ids = np.array([golden["prompt_ids"] + golden["tokens"][:-1]], np.int64)
    wanted = np.arange(len(golden["prompt_ids"]) - 1, ids.shape[1])[None]
    cache = backend.new_cache(1, ids.shape[1])
    return backend.forward(ids, np.arange(ids.shape[1])[None], np.zeros(1, np.int64), wanted, cache)[0]


def runners(bundle: Bundle, exact: bool = False) -> dict[str, Callable[[int], Backend]]:
    """Ways to run a bundle, best first: name -> how to open it with so many threads. With `exact` also the one that rounds
    nothing but the weights: the portable graph, and in a bundle without graphs the native core."""
    def provider(name: str):
        return lambda threads: open_backend(bundle, name, threads)[0]

    def native_exact(threads: int) -> Backend:
        from .native.backend import NativeBackend
        return NativeBackend(bundle, threads=threads, exact=True)

    def portable(threads: int) -> Backend:
        from .ort_backend import OrtBackend
        return OrtBackend(bundle, threads=threads, role="portable", exact=True)

    found = {name: provider(name) for name in ("tensorrt", "cuda", "native")}
    if bundle.graph("fast") or bundle.graph("portable"):
        found["fast" if bundle.graph("fast") else "portable_fused"] = provider("cpu")
    if exact:
        found |= {"portable": portable} if bundle.graph("portable") else {"native_exact": native_exact}
    return found


def open_runner(bundle: Bundle, runner: str, open_with: Callable[[int], Backend], threads: int) -> Backend | str:
    """The backend of a runner, or the reason why this machine cannot have it."""
    try:
        return open_with(threads)
    except Unavailable as error:
        return str(error)


def verify(options: Options) -> None:
    """Hashes, then golden outputs. Raises CheckFailed."""
    bundle = open_bundle(options.bundle)
    if changed := changed_files(bundle):
        raise CheckFailed(f"{bundle.folder}: changed since the bundle was written: {', '.join(changed)}")
    print(f"{bundle.name}: {len(bundle.manifest['files'])} files have the sha256 of the manifest")
    if bundle.manifest["golden"] is None:
        print(f"{bundle.name}: no golden outputs in it, so its answers were not checked; `python -m export.verify` makes them")
        return
    golden = read_golden(bundle)
    tokenizer = Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
    for prompt in golden["prompts"]:
        if prompt["prompt_ids"] != tokenizer.encode(prompt["text"], control_tokens=True).tolist():
            raise CheckFailed(f"{bundle.folder}: golden prompt {prompt['name']!r} gives other tokens on this machine; is "
                              "another version of `tokenizers` installed?")
    threads, failed, absent, ran = cpu_threads(options.threads), [], [], []
    for runner, open_with in runners(bundle, options.exact).items():
        backend = open_runner(bundle, runner, open_with, threads)
        if isinstance(backend, str):
            print(f"\n{runner}: not run here ({backend})")
            absent.append(f"{runner}: {backend}")
            continue
        try:
            budget = _budget(bundle, golden["budgets"], runner)
            comparisons = {p["name"]: compare(golden_logits(backend, p), p) for p in golden["prompts"]}
        finally:
            backend.close()
        print(table([_row(name, c) for name, c in comparisons.items()], title=f"\n{runner}: mean KL at most {budget:g}"))
        mean = np.concatenate([c.kl for c in comparisons.values()]).mean()
        kept = abs(mean) <= budget                # NaN is not; and a divergence below zero is none
        print(f"mean KL {mean:.2e}: {'kept' if kept else 'EXCEEDED'}")
        ran.append(runner)
        if not kept:
            failed.append(f"{runner} has a mean KL of {mean:.2e} against a budget of {budget:g}")
    if not ran:
        raise CheckFailed(f"{bundle.folder}: nothing ran here, so nothing is proven: {'; '.join(absent)}")
    if failed:
        raise CheckFailed(f"{bundle.folder}: {'; '.join(failed)}")
    print(f"\n{bundle.name}: {', '.join(ran)} kept the budget; an engine here runs {ran[0]}")


def _budget(bundle: Bundle, budgets: dict[str, float], runner: str) -> float:
    """Of a runner; what was not run where the bundle was proven has the budget of what users run there."""
    fused = "fast" if bundle.graph("fast") else "portable_fused"
    budget = budgets.get(runner, budgets.get(fused) if runner in ("tensorrt", "cuda", "native") else None)
    if budget is None:
        raise UserError(f"{bundle.path(bundle.manifest['golden'])}: budgets.{runner} is missing, so it cannot be judged; run "
                        "`python -m export.verify` again, which proves whatever the bundle has now")
    return budget


def _row(name: str, c: Comparison) -> dict:
    first = np.flatnonzero(c.differs)
    return {"prompt": name, "tokens": len(c.kl), "mean KL": f"{c.kl.mean():.1e}", "max KL": f"{c.kl.max():.1e}",
            "same top-1": f"{1 - c.differs.mean():.1%}", "near ties": int(c.near_tie.sum()),
            "differ": int((c.differs & ~c.near_tie).sum()), "first": int(first[0]) if len(first) else None}


def main(argv=None) -> int:
    return run(Options, verify, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
