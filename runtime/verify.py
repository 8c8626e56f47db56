"""Check a bundle on this machine: `python -m runtime.verify BUNDLE`.

First the sha256 of every file; a changed one is named and the exit code is 1. Then the golden outputs: for each prompt
that `export.verify` stored, PyTorch's tokens are fed again through TensorRT, CUDA, the native core and ONNX Runtime's CPU,
those of them that this machine can have (the first is what an `Engine` runs), and the logits compared with the 20
largest of PyTorch's (compare.py). The mean KL of a runner must keep the budget that was stored with the golden outputs; past it
the exit code is 1, as it is where no runner ran at all. Kernels differ from machine to machine, which is why this is a
command for the device and not a certificate.

An encoder's bundle (encoder_bundle.py) is checked by the outputs that export.onnx stored with it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .backend import Backend
from .backends import open_backend
from .bundle import Bundle, open_bundle
from .cli import arg, run, table
from .compare import Comparison, compare, cosine
from .decode import logits
from .encoder import Encoder
from .encoder_bundle import is_encoder_bundle, open_encoder
from .encoder_bundle import read_golden as read_encoder_golden
from .errors import CheckFailed, Unavailable, UserError
from .golden import Golden, read_golden
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


def runners(bundle: Bundle, exact: bool = False) -> dict[str, dict]:
    """Ways to run a bundle, best first: name -> options of `open_backend`. With `exact` also the one that rounds nothing
    but the weights: the portable graph, and in a bundle without graphs the native core."""
    found: dict[str, dict] = {name: {"provider": name} for name in ("tensorrt", "cuda", "native")}
    if bundle.graph("fast") or bundle.graph("portable"):
        found["fast" if bundle.graph("fast") else "portable_fused"] = {"provider": "cpu"}
    if exact and bundle.graph("portable"):
        found["portable"] = {"provider": "cpu", "cpu": {"exact": True}}
    elif exact:
        found["native_exact"] = {"provider": "native", "native": {"exact": True}}
    return found


def opened(bundle: Bundle, ways: dict[str, dict], threads: int | None) -> Iterator[tuple[str, Backend | str]]:
    """Each of some `runners`, opened while it is looked at, or the reason why this machine cannot have it."""
    for runner, how in ways.items():
        try:
            backend, _ = open_backend(bundle, threads=threads, **how)
        except Unavailable as error:
            yield runner, str(error)
            continue
        with contextlib.closing(backend):
            yield runner, backend


def replay(backend: Backend, golden: Golden) -> Comparison:
    """Feed a golden prompt and its tokens in one call, and compare what is said at each of them."""
    return compare(golden.reference, logits(backend, golden.fed, len(golden.prompt) - 1))


def verify(options: Options) -> None:
    """Hashes, then golden outputs. Raises CheckFailed."""
    if is_encoder_bundle(options.bundle):
        return verify_encoder(options)
    bundle = open_bundle(options.bundle, verify=True)
    print(f"{bundle.name}: {len(bundle.manifest['files'])} files have the sha256 of the manifest")
    if bundle.manifest["golden"] is None:
        print(f"{bundle.name}: no golden outputs in it, so its answers were not checked; `python -m export.verify` makes them")
        return
    budgets, prompts = read_golden(bundle)
    tokenizer = Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
    for prompt in prompts:
        if prompt.prompt.tolist() != tokenizer.encode(prompt.text, control_tokens=True).tolist():
            raise CheckFailed(f"{bundle.folder}: golden prompt {prompt.name!r} gives other tokens on this machine; is "
                              "another version of `tokenizers` installed?")
    failed, absent, ran = [], [], []
    for runner, backend in opened(bundle, runners(bundle, options.exact), options.threads):
        if isinstance(backend, str):
            print(f"\n{runner}: not run here ({backend})")
            absent.append(f"{runner}: {backend}")
            continue
        budget = _budget(bundle, budgets, runner)
        comparisons = {prompt.name: replay(backend, prompt) for prompt in prompts}
        rows = [{"prompt": name, "tokens": len(c.kl), **c.row(), "first": c.first} for name, c in comparisons.items()]
        print(table(rows, title=f"\n{runner}: mean KL at most {budget:g}"))
        whole = Comparison.joined(comparisons.values())
        print(f"mean KL {whole.kl.mean():.2e}: {'kept' if whole.keeps(budget) else 'EXCEEDED'}")
        ran.append(runner)
        if not whole.keeps(budget):
            failed.append(f"{runner} has a mean KL of {whole.kl.mean():.2e} against a budget of {budget:g}")
    if not ran:
        raise CheckFailed(f"{bundle.folder}: nothing ran here, so nothing is proven: {'; '.join(absent)}")
    if failed:
        raise CheckFailed(f"{bundle.folder}: {'; '.join(failed)}")
    print(f"\n{bundle.name}: {', '.join(ran)} kept the budget; an engine here runs {ran[0]}")


def verify_encoder(options: Options) -> None:
    """The same of an encoder's bundle: the outputs of each graph and of the engine beside PyTorch's, by their cosine. Raises CheckFailed."""
    bundle = open_encoder(options.bundle, verify=True)
    print(f"{bundle.name}: {len(bundle.manifest['files'])} files have the sha256 of the manifest")
    if not (golden := read_encoder_golden(bundle)):
        print(f"{bundle.name}: no golden outputs in it, so its answers were not checked; export the model again")
        return
    failed, engines = [], [("tensorrt", "tensorrt", "portable")] if bundle.manifest["engines"] else []
    for runner, provider, role in [*((graph["role"], "cpu", graph["role"]) for graph in bundle.manifest["graphs"]), *engines]:
        try:
            with Encoder(bundle.folder, provider=provider, threads=options.threads, role=role) as encoder:
                outputs = [output.ravel() for output in encoder.outputs([one.text for one in golden])]
        except Unavailable as error:
            print(f"{runner}: not run: {error}")
            continue
        shapes = all(len(output) == len(one.output) for output, one in zip(outputs, golden))
        worst = max(1 - cosine(output, one.output) for output, one in zip(outputs, golden)) if shapes else float("inf")
        budget = golden[0].budgets.get(role, 0.0)
        print(f"{runner}: 1 - cosine to PyTorch's outputs {worst:.1e}, at most {budget:g}: {'kept' if worst <= budget else 'EXCEEDED'}")
        if not worst <= budget:
            failed.append(f"{runner} differs by a cosine of 1 - {worst:.1e} against a budget of {budget:g}")
    if failed:
        raise CheckFailed(f"{bundle.folder}: {'; '.join(failed)}")


def _budget(bundle: Bundle, budgets: dict[str, float], runner: str) -> float:
    """Of a runner; what was not run where the bundle was proven has the budget of what users run there."""
    fused = "fast" if bundle.graph("fast") else "portable_fused"
    budget = budgets.get(runner, budgets.get(fused) if runner in ("tensorrt", "cuda", "native") else None)
    if budget is None:
        raise UserError(f"{bundle.path(bundle.manifest['golden'])}: budgets.{runner} is missing, so it cannot be judged; run "
                        "`python -m export.verify` again, which proves whatever the bundle has now")
    return budget


def main(argv=None) -> int:
    return run(Options, verify, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
