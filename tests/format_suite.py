"""Every format of every role, on every backend of the CPU, by every way through a cache, against PyTorch from the same codes.

    python -m tests.format_suite [--full]      the table of what was compared and what was refused, as `make test` runs it
                                               (tests/test_formats.py); --full: each role alone, and every instruction set

A case is one small checkpoint whose modules have different formats, chosen so that over the cases every role goes through
every format. It is written by the real writer and exported by the real exporters. What a backend cannot run it has to
refuse when it opens the bundle; which those are stands in `refusal` below and nowhere else: a refusal that is not in it
is a failure, and so is a run where it says that there must be none.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from checkpoints import small_config, write_random
from scipy.special import log_softmax, rel_entr

from export import onnx as export_onnx
from export import ort
from models.checkpoint import load_decoder
from models.network.config import ModelConfig
from models.network.quantized import TensorFormat
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.machine import available_cpus
from runtime.native.backend import NativeBackend
from runtime.ort_backend import OrtBackend

ROLES = ("table, tied", "table, untied", "head", "qkv", "q, k, v", "o", "gate_up", "gate, up", "down")
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
WAYS = ("prefill", "chunk", "step", "ragged batch")
SPLIT = {"qkv": "q, k, v", "gate_up": "gate, up"}
GROUPS = (0, 32, 64, 128)
GRAPH = [TensorFormat(bits, group, symmetric) for bits in (4, 8) for group in GROUPS for symmetric in (True, False)]
NATIVE = [TensorFormat(bits, group, symmetric) for bits in (2, 3, 5, 6) for group in GROUPS for symmetric in (True, False)]
FLOAT8 = [TensorFormat(8, group, True, "e4m3") for group in GROUPS]
SMALL = [TensorFormat(bits, 16, symmetric) for bits in (4, 8) for symmetric in (True, False)]
ROWS = {"bits": 8, "per": "row"}
LENGTHS = (44, 21, 33)                                  # of the rows; where there is AMX, passes of 32 tokens are others than shorter ones
ALIKE, CLOSE = 1e-4, 1e-3                               # largest difference of logits whose spread is 1; mean KL, nats, of int8 activations

BACKENDS = {                                            # name -> how to open it, and whether it computes exactly
    "native exact": (lambda bundle: NativeBackend(bundle, threads=1, exact=True), True),
    "native": (lambda bundle: NativeBackend(bundle, threads=min(2, available_cpus())), False),
    "portable exact": (lambda bundle: OrtBackend(bundle, role="portable", exact=True), True),
    "portable": (lambda bundle: OrtBackend(bundle, role="portable"), False),
    "fast unfused": (lambda bundle: OrtBackend(bundle, role="fast", exact=True), False),   # but for a tied table's product
    "fast": (lambda bundle: OrtBackend(bundle, role="fast"), False),
}


def refusal(backend: str, formats: set[TensorFormat]) -> str | None:
    """What a backend has to say when it refuses a bundle with these formats; None: it has to run it."""
    if backend.startswith("native"):
        if any(form.kind == "e4m3" for form in formats):
            return "8-bit floats, which the native core does not run"
        return "groups of 16; the native core has multiples of 32" if any(form.group == 16 for form in formats) else None
    return "bits, which ONNX Runtime does not run" if any(form.bits not in (4, 8) for form in formats) else None


@dataclass(frozen=True)
class Case:
    """One checkpoint."""

    title: str
    config: ModelConfig
    formats: dict[str, TensorFormat]                    # module -> format
    roles: tuple[tuple[str, TensorFormat], ...]         # what is counted as tried
    activations: dict


def config_of(tied: bool, odd: bool = False) -> ModelConfig:
    """Biases everywhere; sizes that groups of 128 divide, or sizes that nothing divides."""
    sizes = dict(hidden_size=63, vocab_size=385, layers=((3, 1, 33),) * 2) if odd else dict(hidden_size=128, layers=((8, 2, 128),) * 2)
    return small_config(tied_embeddings=tied, attention_bias=True, output_bias=True, mlp_bias=True, **sizes)


def slots(tied: bool) -> dict[str, tuple[str, ...]]:
    """Slot -> modules of one format. Layer 0 keeps q, k, v and gate, up together, layer 1 has them apart."""
    found = {"table, tied" if tied else "table, untied": ("model.embed_tokens",)} | ({} if tied else {"head": ("lm_head",)})
    for layer, apart in ((0, False), (1, True)):
        for part, names in (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj", "down_proj"))):
            for name in names:
                role = FUSED.get(name, name.removesuffix("_proj"))
                role = SPLIT.get(role, role) if apart else role
                slot = f"{layer} {role} {name if apart else ''}"
                found[slot] = (*found.get(slot, ()), f"model.layers.{layer}.{part}.{name}")
    return found


def role_of(slot: str) -> str:
    return next(role for role in sorted(ROLES, key=len, reverse=True) if f" {role} " in f" {slot} ")


def case(title: str, tied: bool, chosen: dict[str, TensorFormat], counted=None, odd=False, activations=None) -> Case:
    """`chosen`: slot -> format; `counted`: slots that are tried here, by default all."""
    formats = {module: chosen[slot] for slot, modules in slots(tied).items() for module in modules}
    roles = dict.fromkeys((role_of(slot), chosen[slot]) for slot in counted or chosen)
    return Case(title, config_of(tied, odd), formats, tuple(roles), activations or {})


def cases(full: bool = False) -> Iterator[Case]:
    pools = {"4 and 8 bits": (GRAPH, {}), "other widths": (NATIVE, {}), "8-bit floats": (FLOAT8, {}), "groups of 16": (SMALL, {}),
             "4 and 8 bits, int8 rows": (GRAPH, {"activations": ROWS}),
             "4 and 8 bits, odd sizes": ([form for form in GRAPH if not form.group], {"odd": True}),
             "other widths, odd sizes": ([form for form in NATIVE if not form.group], {"odd": True})}
    for title, (pool, how) in pools.items():
        for tied in (True, False):
            few = "activations" in how and not full     # every other start: untied has a slot more before the linears, which then get the rest
            for first in range(0, len(pool), 1 + few):              # slot after slot, so that q, k and v differ
                yield case(title, tied, {slot: pool[(first + i) % len(pool)] for i, slot in enumerate(slots(tied))}, **how)
    usual = TensorFormat(4, 32)
    for tied in (True, False):                          # one module among others that everything runs
        for slot in slots(tied) if tied or full else ("table, untied", "head"):                 # what else there is, the tied one has
            for form in [*GRAPH, *NATIVE, *FLOAT8, *SMALL] if full else (TensorFormat(3, 32), TensorFormat(8, 0, True, "e4m3")):
                yield case("one apart", tied, dict.fromkeys(slots(tied), usual) | {slot: form}, [slot])


@dataclass
class Tally:
    """Counts of (role, format, backend, way), by role and backend, and sentences on what went wrong."""

    run: Counter
    refused: Counter
    wrong: list[str]
    worst: dict[str, float]
    tried: set                                          # (role, format, backend, way, int8 rows, hidden size, "run" or "refused")
    titles: set

    @classmethod
    def empty(cls) -> "Tally":
        return cls(Counter(), Counter(), [], {}, set(), set())


def ways(backend, ids: np.ndarray) -> Iterator[tuple[str, list[tuple[int, slice, np.ndarray]]]]:
    """Name of a way -> [(row, tokens, logits of these tokens)], with ids [rows, longest] right-padded."""
    def feed(cache, row, start, stop):
        part = ids[row:row + 1, start:stop]
        steps = np.arange(stop - start)[None]
        logits = backend.forward(part, start + steps, np.array([start]), steps, cache)[0].copy()
        cache.lengths[0] = stop
        return row, slice(start, stop), logits

    def pieces(row, ends):
        cache = backend.new_cache(1, 64)
        return [feed(cache, row, start, stop) for start, stop in zip((0, *ends), ends)]

    yield "prefill", pieces(0, (44,))
    yield "chunk", pieces(0, (7, 11, 43, 44))
    yield "step", pieces(1, (15, *range(16, 22)))
    cache, at = backend.new_cache(3, 64), np.array(LENGTHS) - 4
    width = at.max()
    wanted = np.stack([at - 3, at - 1], axis=1)
    logits = backend.forward(ids[:, :width], np.tile(np.arange(width), (3, 1)), np.zeros(3, np.int64), wanted, cache).copy()
    found = [(row, slice(place, place + 1), logits[row, i:i + 1]) for row in range(3) for i, place in enumerate(wanted[row])]
    for step in range(4):
        logits = backend.forward(ids[np.arange(3), at + step][:, None], (at + step)[:, None], at + step, np.zeros((3, 1), np.int64), cache).copy()
        found += [(row, slice(at[row] + step, at[row] + step + 1), logits[row]) for row in range(3)]
    yield "ragged batch", found


def try_case(case: Case, folder: Path, tally: Tally, backends=BACKENDS) -> None:
    """Write, export and run one checkpoint in a new folder."""
    tally.titles.add(case.title)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        checkpoint = write_random(folder / "checkpoint", case.config, case.formats.get, activations=case.activations)
        assert export_onnx.main([str(checkpoint), "-o", str(folder / "bundle")]) == 0
        formats = set(case.formats.values())
        assert ort.main([str(folder / "bundle")]) == (2 if refusal("fast", formats) else 0)
    bundle, decoder = open_bundle(folder / "bundle"), load_decoder(checkpoint)
    ids = np.random.default_rng(0).integers(3, case.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    rounded = oracle(decoder, ids)
    for module in decoder.modules():                    # the core rounds activations by itself, or not at all
        module._forward_pre_hooks.clear()
    plain = oracle(decoder, ids)
    for name, (open_backend, exact) in backends.items():
        where, words = f"{case.title}, {name}, {describe(case)}", refusal(name, formats)
        try:
            backend = open_backend(bundle)
        except UserError as error:
            if words is None or words not in str(error):
                tally.wrong.append(f"{where}: refused with {error}")
            count("refused", tally, case, name, WAYS)
            continue
        if words is not None:
            tally.wrong.append(f"{where}: runs, and has to refuse")
        expected = plain if name.startswith("native") else rounded
        for way, found in ways(backend, ids):
            pairs = [(expected[row, tokens], logits) for row, tokens, logits in found]
            want, got = (np.concatenate(part) for part in zip(*pairs))
            exactly = exact and (expected is plain or not case.activations)
            error = float(np.abs(want - got).max()) if exactly else mean_kl(want, got)
            kind = f"{name}{' (int8 rows)' if case.activations else ''}, {'difference' if exactly else 'KL'}"
            tally.worst[kind] = max(tally.worst.get(kind, 0), error)
            if not error < (ALIKE if exactly else CLOSE):
                tally.wrong.append(f"{where}, {way}: {'logits differ by' if exactly else 'a KL of'} {error:.2g}")
            count("run", tally, case, name, (way,))
        backend.close()


def oracle(decoder, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return decoder(torch.from_numpy(ids)).numpy()


def mean_kl(want: np.ndarray, got: np.ndarray) -> float:
    p, q = (log_softmax(x.astype(np.float64), axis=1) for x in (want, got))
    return float(rel_entr(np.exp(p), np.exp(q)).sum(axis=1).mean())


def describe(case: Case) -> str:
    counts = Counter(f"{form.kind}{form.bits}/{form.group}{'' if form.symmetric else ' with zeros'}" for form in case.formats.values())
    return ("tied, " if case.config.tied_embeddings else "untied, ") + ", ".join(counts)


def count(outcome: str, tally: Tally, case: Case, backend: str, tried: tuple[str, ...]) -> None:
    for role, form in case.roles:
        for way in tried:
            key = (role, form, backend, way, bool(case.activations), case.config.hidden_size, outcome)
            if key not in tally.tried:
                tally.tried.add(key)
                getattr(tally, outcome)[role, backend] += 1


def report(tally: Tally) -> str:
    names = [name for name in dict.fromkeys(backend for _, backend in [*tally.run, *tally.refused])]
    lines = ["combinations of a role, a format, int8 rows or not, a backend and a way: compared with PyTorch / refused",
             f"{'':14}" + "".join(f"{name:>18}" for name in names)]
    for role in ROLES:
        lines.append(f"{role:14}" + "".join(f"{tally.run[role, name]:>10} /{tally.refused[role, name]:>6}" for name in names))
    run, refused = tally.run.total(), tally.refused.total()
    lines += [f"in all {run + refused}: {run} compared, {refused} refused, {len(tally.wrong)} wrong", "largest error of each backend: "
              + "; ".join(f"{name} {error:.1e}" for name, error in sorted(tally.worst.items()))]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="each role alone in each format, and every instruction set (minutes)")
    full = parser.parse_args().full
    torch.set_num_threads(1)                            # matrices this small cost more to share out than to multiply
    backends = dict(BACKENDS)
    for isa in ("avx512-vnni", "avx-vnni", "avx2", "plain", "neon-dotprod") if full else ():
        backends[f"native {isa}"] = (lambda bundle, isa=isa: NativeBackend(bundle, threads=1, isa=isa), False)
    if full:
        backends = {name: how for name, how in backends.items() if not name.startswith("native ") or runs(name.split()[1])}
    tally = Tally.empty()
    for one in cases(full):
        with tempfile.TemporaryDirectory() as folder:
            try_case(one, Path(folder), tally, backends)
    print(report(tally), *tally.wrong, sep="\n")
    return 1 if tally.wrong else 0


def runs(isa: str) -> bool:
    """Whether this CPU has an instruction set."""
    from checkpoints import write_bundle
    if isa == "exact":
        return True
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bundle, _ = write_bundle(Path(folder), small_config())
        try:
            NativeBackend(bundle, threads=1, isa=isa).close()
        except UserError:
            return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
