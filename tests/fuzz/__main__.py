"""Fuzz what this project opens: `python -m tests.fuzz --minutes 30 --seed 1`.

Small bundles, checkpoints, GGUF files, tokenizers, templates and data files are damaged by seed (mutate.py; the hashes
that would give it away are mended) and used as a user would (trials.py), each in a process of its own with 10 s of CPU and
1 GB. What came of it is counted:

    refused     a UserError: what should come of damage
    ran         the original's result, so what was damaged does not matter
    changed     another result, which the damage may give; an oracle that is not ours agrees where there is one
    wrong, traceback, hang, signal, memory     findings: each is kept in a folder with the line that reproduces it

Exit code 1 where there is a finding. Under EDGEWRIGHT_NATIVE=build/asan/_core.so (make fuzz-asan) a report of
AddressSanitizer or UBSan ends the process and is counted as a signal.
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")                    # a forked child has one thread, and cannot have a pool's
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import faulthandler
import json
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "compress")]

from runtime.cli import arg, run, table          # noqa: E402
from runtime.errors import CheckFailed, UserError          # noqa: E402
from tests.fuzz.kinds import KINDS          # noqa: E402
from tests.fuzz.trials import SANITIZED          # noqa: E402

CPU_S, WALL_S, ORACLE_S, MEMORY_MB = 10, 60, 60, 1024
FINDINGS = ("wrong", "traceback", "hang", "signal", "memory")
OUTCOMES = ("refused", "ran", "changed", *FINDINGS)
WEIGHTS = {"native": 4, "bundle": 3, "checkpoint": 3}         # of the cases; one for every other kind
REPORT = 99                                                    # exit code of a sanitizer


@dataclass(frozen=True)
class Options:
    """Damage files by seed, use them, and count what came of it."""

    minutes: float = arg(1.0, help="how long to go on")
    cases: int | None = arg(None, help="how many cases, in place of minutes")
    seed: int = arg(0, help="of the damage")
    kind: tuple[str, ...] = arg((), help=f"of {', '.join(KINDS)} (default: all)", metavar="KIND")
    only: int | None = arg(None, help="run this one case of the seed and the kind, here, with its traceback", metavar="CASE")
    jobs: int = arg(len(os.sched_getaffinity(0)), help="processes at once")
    work: Path = arg(ROOT / "build" / "fuzz", help="folder for originals and findings")


@dataclass
class Case:
    kind: str
    number: int
    folder: Path
    pid: int = 0
    pipe: int = 0
    said: bytes = b""
    start: float = 0.0
    judging: float | None = None                               # when the trial was over


def fuzz(options: Options) -> None:
    """Run. Raises CheckFailed where something was found."""
    kinds = options.kind or (("native",) if SANITIZED else tuple(KINDS))
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kind {kind}: known are {', '.join(KINDS)}")
    warm_up()
    originals = {kind: _originals(kind, options.work / "originals" / kind) for kind in kinds}
    if options.only is not None:
        return _reproduce(Case(kinds[0], options.only, options.work / "one"), options.seed, originals[kinds[0]])
    counts = {kind: Counter() for kind in kinds}
    running, number, started = {}, 0, time.monotonic()
    order = random.Random(options.seed).choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds], k=1 << 16)
    work = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else options.work
    while True:
        done = number >= options.cases if options.cases is not None else time.monotonic() - started > 60 * options.minutes
        while not done and len(running) < options.jobs:
            kind = order[number % len(order)]
            case = Case(kind, number, work / f"fuzz-{os.getpid()}-{number}", start=time.monotonic())
            _start(case, options.seed, originals[kind])
            running[case.pipe] = case
            number += 1
            done = options.cases is not None and number >= options.cases
        if not running:
            break
        ready = select.select(list(running), [], [], 0.1)[0]
        for case in list(running.values()):
            if case.pipe in ready:
                case.said += (piece := os.read(case.pipe, 1 << 16))
                case.judging = case.judging or (time.monotonic() if b"\n" in case.said else None)
                if not piece:
                    del running[case.pipe]
                    outcome, why = _outcome(case)
                    counts[case.kind][outcome] += 1
                    if outcome in FINDINGS:
                        _keep(case, outcome, why, options)
                    shutil.rmtree(case.folder, ignore_errors=True)
            else:
                _watch(case)
    rows = [{"kind": kind, "tried": count.total(), **{name: count[name] for name in OUTCOMES}} for kind, count in counts.items()]
    total = sum(counts.values(), Counter())
    rows.append({"kind": "all", "tried": total.total(), **{name: total[name] for name in OUTCOMES}})
    print(table(rows, title=f"seed {options.seed}, {time.monotonic() - started:.0f} s"))
    if found := sum(total[name] for name in FINDINGS):
        raise CheckFailed(f"{found} findings, kept in {options.work / 'findings'}")


def warm_up() -> None:
    """Import once what every child would."""
    warnings.simplefilter("ignore")
    import runtime, runtime.verify, runtime.chat_tokens, runtime.native.backend                               # noqa: E401, F401
    if SANITIZED:                                              # which not all of the rest can be imported under
        return
    import compress.foreign, compress.recipe, models.checkpoint, models.get, models.formats.gguf_tokenizer, models.data.corpus          # noqa: E401, F401
    import onnxruntime, torch, transformers                               # noqa: E401, F401
    from transformers import LlamaForCausalLM                               # noqa: F401
    onnxruntime.set_default_logger_severity(4)
    torch.set_num_threads(1)


def _originals(kind: str, place: Path) -> list[tuple[Path, dict]]:
    """(folder, what its trial gives) of every original, made in a child: this process must stay without threads."""
    if SANITIZED:                                              # a run without sanitizers has made them
        return [(Path(folder), result | {"chat": None}) for folder, result in json.loads((place.parent / f"{kind}.json").read_text())]
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with open(place.parent / f"{kind}.log", "w") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                found = []
                for folder in KINDS[kind].originals(place):
                    shutil.rmtree(copy := place.parent / f"{kind}-copy", ignore_errors=True)
                    shutil.copytree(folder, copy)
                    found.append((str(folder), KINDS[kind].trial(copy)))
                    shutil.rmtree(copy)
                (place.parent / f"{kind}.json").write_text(json.dumps(found))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"the originals could not be made: {(place.parent / f'{kind}.log').read_text()[-3000:]}")
    return [(Path(folder), result) for folder, result in json.loads((place.parent / f"{kind}.json").read_text())]


def _damaged(case: Case, seed: int, originals: list[tuple[Path, dict]]) -> tuple[int, list]:
    rng = random.Random(f"{seed} {case.kind} {case.number}")
    chosen = rng.randrange(len(originals))
    shutil.copytree(originals[chosen][0], case.folder)
    return chosen, KINDS[case.kind].damage(rng, case.folder, [folder for folder, _ in originals])


def _start(case: Case, seed: int, originals: list[tuple[Path, dict]]) -> None:
    case.pipe, end = os.pipe()
    case.pid = os.fork()
    if case.pid:
        return os.close(end)
    try:
        chosen, touched = _damaged(case, seed, originals)
        quiet = os.open(case.folder.with_name(case.folder.name + ".err"), os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(quiet, 2)
        say = lambda **what: os.write(end, json.dumps(what).encode() + b"\n")          # noqa: E731
        faulthandler.register(signal.SIGXCPU, chain=True)
        _limit()
        after = _trial(case, say, touched)
        resource.setrlimit(resource.RLIMIT_CPU, (ORACLE_S, ORACLE_S))
        if after is not None:
            verdict = KINDS[case.kind].judge(originals[chosen][0], case.folder, touched, originals[chosen][1], after)
            say(outcome=verdict.split(":")[0], why=verdict, touched=touched)
    except BaseException:
        os.write(end, json.dumps({"outcome": "traceback", "why": "of the fuzzer: " + traceback.format_exc()}).encode())
    finally:
        os._exit(0)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    if not SANITIZED:                                          # whose shadow memory is terabytes
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (MEMORY_MB << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, ORACLE_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _trial(case: Case, say, touched) -> dict | None:
    """The result as plain JSON; None where there is none, and said why."""
    try:
        after = json.loads(json.dumps(KINDS[case.kind].trial(case.folder)))
        say(outcome="oracle gave up", touched=touched)
        return after
    except UserError as error:
        text = str(error)
        say(outcome="refused" if text and "\n" not in text.strip() else "traceback", why=f"a message of several lines: {text}", touched=touched)
    except MemoryError:
        say(outcome="memory", why=traceback.format_exc(), touched=touched)
    except BaseException as error:
        memory = "bad_alloc" in str(error) or "allocate memory" in str(error)
        say(outcome="memory" if memory else "traceback", why=traceback.format_exc(), touched=touched)
    return None


def _watch(case: Case) -> None:
    """End a case that hangs or has grown; its outcome is told by the signal and the stage."""
    now = time.monotonic()
    try:
        mb = int(Path(f"/proc/{case.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):
        return
    if case.judging is None and mb > MEMORY_MB * (4 if SANITIZED else 1):
        os.kill(case.pid, signal.SIGUSR1)
    elif now - (case.judging or case.start) > (WALL_S if case.judging is None else 2 * ORACLE_S):
        os.kill(case.pid, signal.SIGXCPU)


def _outcome(case: Case) -> tuple[str, str]:
    os.close(case.pipe)
    _, status, usage = os.wait4(case.pid, 0)
    said = [json.loads(line) for line in case.said.splitlines()]
    err = case.folder.with_name(case.folder.name + ".err")
    log = err.read_text(errors="replace")[-6000:] if err.exists() else ""
    err.unlink(missing_ok=True)
    if os.WIFSIGNALED(status) and not (said and said[0]["outcome"] == "oracle gave up"):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"SIGXCPU": "hang", "SIGUSR1": "memory"}.get(name, "signal"), f"{name}\n{log}"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        return "signal", f"exit {os.WEXITSTATUS(status)}\n{log}"
    if not said:
        return "signal", f"said nothing\n{log}"
    if said[-1]["outcome"] == "oracle gave up":
        return "changed", ""
    if "Sanitizer" in log or "runtime error:" in log:
        return "signal", log
    return said[-1]["outcome"], f"{said[-1].get('why', '')}\ntouched {said[-1].get('touched')}\n{log}"


def _keep(case: Case, outcome: str, why: str, options: Options) -> None:
    kept = options.work / "findings" / f"{case.kind}-{options.seed}-{case.number}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    line = f"python -m tests.fuzz --kind {' '.join(options.kind) or case.kind} --seed {options.seed} --only {case.number}"
    if len(options.kind) != 1:
        line = f"python -m tests.fuzz --kind {case.kind} --seed {options.seed} --only {case.number}"
    (kept / "finding.txt").write_text(f"{outcome}\n{line}\n{why}\n")
    for file in case.folder.iterdir() if case.folder.is_dir() else ():
        if file.is_file() and not file.is_symlink():
            shutil.copyfile(file, kept / file.name)
    print(f"{outcome}: {line}\n    {[*filter(None, why.strip().splitlines()), ''][0][:200]}", flush=True)


def _reproduce(case: Case, seed: int, originals) -> None:
    shutil.rmtree(case.folder, ignore_errors=True)
    chosen, touched = _damaged(case, seed, originals)
    print(f"{case.folder}: {originals[chosen][0].name}, damaged at {touched}")
    after = json.loads(json.dumps(KINDS[case.kind].trial(case.folder)))
    print(KINDS[case.kind].judge(originals[chosen][0], case.folder, touched, originals[chosen][1], after))


def main(argv=None) -> int:
    return run(Options, fuzz, argv)


if __name__ == "__main__":
    raise SystemExit(main())
