"""Check a bundle on this machine: `python -m runtime.verify BUNDLE`.

First the sha256 of every file; a changed one is named and the exit code is 1. Then the golden outputs: for each prompt
that `export.verify` stored, PyTorch's tokens are fed again through TensorRT, CUDA and the native core, where this machine
has them, and through every graph on ONNX Runtime's CPU, and the logits compared with PyTorch's. KL divergence is taken over the 20 likeliest tokens and the mass of all others, which is a lower bound
of the whole; a token that differs where PyTorch's first two were closer than the noise (twice the largest difference
of a logit among the 20) is a near tie, not an error. The mean KL of a graph must keep the budget that was stored with
the golden outputs; past it the exit code is 1. Kernels differ from machine to machine, which is why this is a command
for the device and not a certificate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from runtime.backend import Backend
from runtime.backends import PROVIDERS, open_backend
from runtime.bundle import Bundle, changed_files, open_bundle
from runtime.cli import arg, run, table
from runtime.errors import CheckFailed, UserError
from runtime.machine import available_cpus
from runtime.ort_backend import OrtBackend
from runtime.text import Tokenizer

VERSION = 1
EXAMPLES = """examples:
  python -m runtime.verify build/smollm2-135m-int4
  python -m runtime.verify build/smollm2-135m-int4 --exact
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


def rungs(bundle: Bundle, budgets: dict, threads: int, exact: bool) -> Iterator[tuple[str, float, Callable[[], Backend]]]:
    """Ways to run a bundle: name, the mean KL it may have, how to open it. Providers come first; this machine may lack them."""
    fused = "fast" if "fast" in budgets else "portable_fused"
    for provider in PROVIDERS[:-1]:
        if fused in budgets:
            yield provider, budgets[fused]["mean_kl"], partial(_provider, bundle, provider, threads)
    for rung, role in (("fast", "fast"), ("portable_fused", "portable"), ("portable", "portable")):
        graph = bundle.graph(role)
        runs = graph is not None and graph["dtype"] != "bf16"        # which ONNX Runtime's CPU lacks
        if rung in budgets and runs and (exact or rung != "portable"):
            yield rung, budgets[rung]["mean_kl"], partial(OrtBackend, bundle, threads=threads, role=role, exact=rung == "portable")


def verify(options: Options) -> None:
    """Hashes, then golden outputs. Raises CheckFailed."""
    bundle = open_bundle(options.bundle)
    if changed := changed_files(bundle):
        raise CheckFailed(f"{bundle.folder}: changed since the bundle was written: {', '.join(changed)}")
    print(f"{bundle.name}: {len(bundle.manifest['files'])} files have the sha256 of the manifest")
    if bundle.manifest["golden"] is None:
        print(f"{bundle.name}: no golden outputs in it; `python -m export.verify` makes them")
        return
    golden = _read_golden(bundle)
    tokenizer = Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
    for prompt in golden["prompts"]:
        if prompt["prompt_ids"] != tokenizer.encode(prompt["text"]).tolist():
            raise CheckFailed(f"{bundle.folder}: golden prompt {prompt['name']!r} gives other tokens on this machine; is "
                              "another version of `tokenizers` installed?")
    failed = []
    for rung, budget, open_rung in rungs(bundle, golden["budgets"], options.threads or available_cpus(), options.exact):
        try:
            backend = open_rung()
        except UserError as error:
            if rung not in PROVIDERS:
                raise
            print(f"\n{rung}: not run here ({error})")
            continue
        comparisons = {p["name"]: compare(golden_logits(backend, p), p) for p in golden["prompts"]}
        backend.close()
        print(table([_row(name, c) for name, c in comparisons.items()], title=f"\n{rung}: mean KL at most {budget:g}"))
        mean = np.concatenate([c.kl for c in comparisons.values()]).mean()
        print(f"mean KL {mean:.2e}: {'kept' if mean <= budget else 'EXCEEDED'}")
        if not mean <= budget:                    # NaN fails too
            failed.append(f"{rung} has a mean KL of {mean:.2e} against a budget of {budget:g}")
    if failed:
        raise CheckFailed(f"{bundle.folder}: {'; '.join(failed)}")


def _provider(bundle: Bundle, name: str, threads: int) -> Backend:
    return open_backend(bundle, name, threads)[0]


def _row(name: str, c: Comparison) -> dict:
    first = np.flatnonzero(c.differs)
    return {"prompt": name, "tokens": len(c.kl), "mean KL": f"{c.kl.mean():.1e}", "max KL": f"{c.kl.max():.1e}",
            "same top-1": f"{1 - c.differs.mean():.1%}", "near ties": int(c.near_tie.sum()),
            "differ": int((c.differs & ~c.near_tie).sum()), "first": int(first[0]) if len(first) else None}


def _read_golden(bundle: Bundle) -> dict:
    path = bundle.path(bundle.manifest["golden"])
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); run `python -m export.verify` again") from None
    if golden.get("version") != VERSION:
        raise UserError(f"{path}: version {golden.get('version')!r}, but this runtime reads {VERSION}; run "
                        "`python -m export.verify` again")
    return golden


def main(argv=None) -> int:
    return run(Options, verify, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
