"""Prove a bundle against its checkpoint: `python -m export.verify CKPT BUNDLE`.

PyTorch writes the golden outputs (`export/golden.py`): eight prompts with greedy continuations. Those tokens are then fed
again, teacher-forced, to PyTorch and to every graph of the bundle, on each of the ways a runtime uses a cache:

    one prefill        the whole sequence in one call
    chunked prefill    16 tokens a call, each on top of the cache so far
    token by token     one token a call (the first tokens of a long prompt at once)
    ragged batch       all prompts together, right-padded, then batched steps at rows of different lengths

and the logits are compared over the whole vocabulary (runtime/compare.py).

Runners. "portable exact": the portable graph as it is, with ONNX Runtime kept from fusing quantized weights into its int8
kernels; from equal codes its mean KL is below 1e-6 (1e-3 where the graph computes in float16). "native exact", in a bundle
without graphs, is the native core with float32 activations and cache. "native", and "fast" or, in a bundle without a fast
graph, "portable fused", are what users run: int8 activations, mean KL below 0.01. A checkpoint that itself
rounds activations to int8 turns the last bit of a float32 sum into a whole step, here and there, and every layer spreads
it: PyTorch fed in other chunks is a KL of 0.01 from itself on SmolLM2-135M. All runners of its bundle may have 0.02; that
each product rounds as PyTorch does is tested on small models, where KL stays below 1e-6. Past a budget, and where no
runner of the bundle can run, the exit code is 1 and the bundle stays as it was; else the golden outputs go into it.

The report ends with every runner of the bundle: what ran here and with what result, what cannot run here and why, and what
needs a GPU (`python -m runtime.verify`, on the device) and was "built, never run".
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from export.golden import batched, golden_outputs, to_json
from models.formats import lineage
from models.progress import progress
from runtime.backend import Backend
from runtime.bundle import Bundle, open_bundle
from runtime.cli import Checked, arg, run, table
from runtime.compare import Comparison, compare
from runtime.decode import logits
from runtime.errors import CheckFailed, Unavailable, UserError
from runtime.files import sole_writer
from runtime.golden import Golden
from runtime.text import Tokenizer
from runtime.verify import opened, runners

EXAMPLES = """example:
  python -m export.verify build/smollm2-135m-int4-checkpoint build/smollm2-135m-int4
"""


@dataclass(frozen=True)
class Options(Checked):
    """Write a bundle's golden outputs and check every graph against PyTorch."""
    checkpoint: Path = arg(positional=True, help="checkpoint the bundle was exported from")
    bundle: Path = arg(positional=True, help="folder of the bundle")
    threads: int | None = arg(None, help="CPU threads; default: the CPUs this process may use", least=1)


def main(argv=None) -> int:
    return run(Options, "verify", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())


from export import bundle as bundles
from export.cuda_on_cpu import CudaOnCpu
from models.checkpoint import Checkpoint, load_decoder, open_checkpoint
from models.network.torch_backend import TorchBackend

EXACT_BUDGETS = {"float32": 1e-6, "float16": 1e-3}         # mean KL in nats, by the type of what is not quantized
FUSED_BUDGET = 0.01               # of what rounds activations on its own account
INT8_BUDGET = 0.02                # of every runner, where the checkpoint rounds its activations
TITLES = {"pytorch": "PyTorch", "portable": "portable exact", "portable_fused": "portable fused", "fast": "fast",
          "cuda_graph": "cuda graph", "native_exact": "native exact", "native": "native"}
NEVER = "built, never run"
CHUNK = 16                        # tokens a call of the chunked prefill
SINGLY = 16                       # tokens at the end of a prompt that go one by one
SHORTEST_CONTEXT = 16


@sole_writer("bundle")
def verify(options: Options) -> None:
    """Run the stage. Raises UserError for input that does not belong together, CheckFailed past a budget."""
    checkpoint, bundle = open_checkpoint(options.checkpoint), open_bundle(options.bundle)
    source = check_source(checkpoint, bundle)
    reference = TorchBackend(load_decoder(options.checkpoint), bundle.max_context)
    tokenizer = Tokenizer(bundle.path(bundle.manifest["tokenizer"]))
    golden = golden_outputs(reference, tokenizer, bundle.max_context)
    budgets = runner_budgets(bundle)
    rows, failures = measure("pytorch", reference, golden, INT8_BUDGET if bundle.model.get("activations") else
                             EXACT_BUDGETS["float32"])
    reference.close()
    absent = {}
    ways = {runner: how for runner, how in runners(bundle, exact=True).items() if runner in budgets}
    for runner, backend in chain(opened(bundle, ways, options.threads), cuda_graph(bundle, options.threads)):
        if isinstance(backend, str):
            absent[runner] = backend
            continue
        more, failed = measure(runner, backend, golden, budgets[runner])
        rows, failures = rows + more, failures + failed
    print(table(rows, title=f"{bundle.name}: {len(golden)} prompts, {len(golden[0].tokens)} tokens each, against PyTorch"))
    print(table(ladder(bundle, budgets, rows, absent), title="\nRunners"))
    if len(absent) == len(budgets):
        raise CheckFailed(f"{bundle.folder}: nothing ran here, so nothing is proven: "
                          + "; ".join(f"{TITLES[runner]}: {reason}" for runner, reason in absent.items()))
    if failures:
        raise CheckFailed("; ".join(failures))
    figures = {f"{row['graph']}, {row['way']}": row["mean KL"] for row in rows}
    stage = lineage.stage("export.verify", options, {"checkpoint": source}, figures)
    manifest = bundles.without_file(bundle.manifest, bundles.GOLDEN)
    manifest |= {"golden": bundles.GOLDEN, "lineage": [*manifest["lineage"], stage]}
    bundles.add_file(options.bundle, manifest, bundles.GOLDEN, to_json(golden, source, budgets))
    ran = ", ".join(TITLES[runner] for runner in budgets if runner not in absent)
    print(f"{options.bundle}: {ran} kept the budget; golden outputs written to {bundles.GOLDEN}")


def check_source(checkpoint: Checkpoint, bundle: Bundle) -> str:
    """The checkpoint's sha256. Raises UserError where the bundle was exported from another one, or is too short."""
    exported = next((stage for stage in reversed(bundle.manifest["lineage"]) if stage["stage"] == "export.onnx"), None)
    source = checkpoint.sha256()
    if exported is None or exported["inputs"]["checkpoint"] != source:
        raise UserError(f"{bundle.folder} was not exported from {checkpoint.path} as it is now: give the checkpoint it came "
                        "from, or export again with python -m export.onnx")
    if bundle.max_context < SHORTEST_CONTEXT:
        raise UserError(f"{bundle.folder} has a context of {bundle.max_context} tokens, and the golden outputs need "
                        f"{SHORTEST_CONTEXT}: export with a larger --max-context")
    return source


def runner_budgets(bundle: Bundle) -> dict[str, float]:
    """The runners to check, exact first, and the mean KL that each may have."""
    tensors = bundle.manifest["weights"]["tensors"]
    exact = EXACT_BUDGETS.get(next(t["dtype"] for t in tensors if t["name"] == "final_norm.weight"))       # None: bfloat16
    budgets = {}
    if bundle.graph("portable"):
        budgets |= {"portable": exact} if exact else {}
        budgets["fast" if bundle.graph("fast") else "portable_fused"] = FUSED_BUDGET
        budgets |= {"cuda_graph": EXACT_BUDGETS["float16"]} if bundle.graph("cuda") else {}
    elif exact and not any(t["name"].endswith(".k_scale") for t in tensors):        # whose rounding is the checkpoint's own
        budgets["native_exact"] = exact
    budgets["native"] = FUSED_BUDGET
    return dict.fromkeys(budgets, INT8_BUDGET) if bundle.model.get("activations") else budgets


def cuda_graph(bundle: Bundle, threads: int | None) -> Iterator[tuple[str, Backend | str]]:
    """The CUDA graph of a bundle that has one, on the CPU, or why it cannot run here."""
    if bundle.graph("cuda"):
        try:
            with contextlib.closing(CudaOnCpu(bundle, threads)) as backend:
                yield "cuda_graph", backend
        except Unavailable as error:
            yield "cuda_graph", str(error)


def ladder(bundle: Bundle, budgets: dict[str, float], rows: list[dict], absent: dict[str, str]) -> list[dict]:
    """Every runner of the bundle, and what is known of it: `rows` are those of the report, `absent` the reasons of others."""
    found = []
    for runner, budget in budgets.items():
        native, role = runner.startswith("native"), {"fast": "fast", "cuda_graph": "cuda"}.get(runner, "portable")
        file = bundle.manifest["weights"]["file"] if native else bundle.graph(role)["file"]
        worst = max((float(row["mean KL"]) for row in rows if row["graph"] == TITLES[runner]), default=None)
        result = f"not run here: {absent[runner]}" if runner in absent else f"run: mean KL at most {worst:.1e}, budget {budget:g}"
        found.append({"runner": TITLES[runner], "file": file, "on": "the CPU" if native else "ONNX Runtime, CPU", "result": result})
    found += [{"runner": "cuda", "file": graph["file"], "on": "ONNX Runtime, CUDA", "result": NEVER}
              for graph in bundle.manifest["graphs"]]
    found += [{"runner": "tensorrt", "file": engine["file"], "on": "SM " + ",".join(engine["compute_capabilities"]), "result": NEVER}
              for engine in bundle.manifest["engines"]]
    return found


def measure(runner: str, backend: Backend, golden: list[Golden], budget: float) -> tuple[list[dict], list[str]]:
    """Every way through one backend: rows of the report, and sentences on budgets that were not kept."""
    rows, failures = [], []
    for name, way in progress(WAYS.items(), label=TITLES[runner], unit="way"):
        found = [compare(output.reference, said) for output, said in zip(golden, way(backend, golden))]
        whole = Comparison.joined(found)
        first = [f"{output.name}, token {one.first}" for output, one in zip(golden, found) if one.first is not None]
        rows.append({"graph": TITLES[runner], "way": name, **whole.row(), "first to differ": first[0] if first else ""})
        if not whole.keeps(budget):
            mean = f"a mean KL of {whole.kl.mean():.2e} against a budget of {budget:g}"
            failures.append(f"{TITLES[runner]}, {name}: {mean}")
    return rows, failures


def _one_by_one(ends: Callable[[Golden], Iterable[int]]):
    """A way that takes each prompt into a cache of its own, in consecutive pieces that end at `ends`."""
    def way(backend: Backend, golden: list[Golden]) -> list[np.ndarray]:
        return [np.concatenate(list(_pieces(backend, output, [0, *ends(output)]))) for output in golden]
    return way


def _pieces(backend: Backend, output: Golden, cuts: list[int]) -> Iterator[np.ndarray]:
    cache, wanted = backend.new_cache(1, len(output.fed)), len(output.prompt) - 1
    for start, end in pairwise(cuts):
        yield logits(backend, output.fed[start:end], min(max(wanted - start, 0), end - start), cache).copy()


def _ragged_batch(backend: Backend, golden: list[Golden]) -> list[np.ndarray]:
    tokens = np.stack([output.tokens for output in golden], axis=1)
    return list(batched(backend, [output.prompt for output in golden], len(tokens), lambda number, _: tokens[number]))


WAYS = {"one prefill": _one_by_one(lambda output: [len(output.fed)]),
        "chunked prefill": _one_by_one(lambda output: [*range(CHUNK, len(output.fed), CHUNK), len(output.fed)]),
        "token by token": _one_by_one(lambda output: range(max(1, len(output.prompt) - SINGLY), len(output.fed) + 1)),
        "ragged batch": _ragged_batch}
