"""Run one check in a process of its own, with a limit of seconds: what hangs, dies or exhausts the memory takes no other check with it.

The child writes a line of JSON to a file for every row as it comes, and a last one with how it ended; what it prints goes into a log. A child
that is past its limit is killed with everything it has started (it leads a process group), and the rows it had written count.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_check.place import Place, Row
from runtime.errors import CheckFailed, Unavailable, UserError

ROOT = Path(__file__).resolve().parents[2]
DIES_WITH_PARENT = 1                   # PR_SET_PDEATHSIG
INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM}
CHILD = ("import sys; sys.path[:0] = [{root!r}, {root!r} + '/tests']; from gpu_check.apart import child; "
         "child(sys.argv[1], sys.argv[2], sys.argv[3])")


@dataclass(frozen=True)
class Check:
    """where: "module:function" of this folder, with arguments after it. needed: on a GPU it must have run."""
    name: str
    where: str
    limit: float                       # seconds
    needed: bool = True


@dataclass
class Outcome:
    """ended: done, failed, hung (past its limit), crashed (a signal), not here (this machine lacks what it needs), or stopped, as the
    whole was."""
    check: str
    ended: str
    seconds: float
    said: str = ""                     # why, in one line
    rows: list[Row] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.ended in ("failed", "hung", "crashed") or any(row.ok is False for row in self.rows)


def run_apart(check: Check, place: Place, seconds: float) -> Outcome:
    """The check's outcome after at most `seconds`."""
    results, log = (place.work / f"{check.name.replace(' ', '-')}.{kind}" for kind in ("jsonl", "log"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1",
                                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    results.write_text("")
    start, stopped, code = time.perf_counter(), False, None
    with open(log, "wb") as output:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)       # or a child that had just begun would be lost
        process = subprocess.Popen([sys.executable, "-c", CHILD.format(root=str(ROOT)), check.where, str(results), json.dumps(place.to_json())],
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            stopped = True
        finally:
            _kill(process)
    outcome = outcome_of(check.name, code, time.perf_counter() - start, results, log)
    if stopped:
        outcome.ended, outcome.said = "stopped", "by a signal to the whole"
    return outcome


def _kill(process: subprocess.Popen) -> None:
    """The child and whatever it has started and left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def outcome_of(name: str, code: int | None, seconds: float, results: Path, log: Path) -> Outcome:
    rows, end = [], None
    for line in results.read_text("utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:                       # killed while it wrote
            break
        if "end" in found:
            end = found
        else:
            rows.append(Row(**found))
    if end is not None:
        return Outcome(name, end["end"], seconds, end["said"], rows)
    if code is None:
        return Outcome(name, "hung", seconds, f"killed after {seconds:.0f} s; {_last(log)}", rows)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome(name, "crashed", seconds, f"{how}; {_last(log)}", rows)


def _last(log: Path) -> str:
    """The last line that was printed."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").replace("\r", "\n").splitlines() if line.strip()]
    return f"it last said: {lines[-1][:200]}" if lines else "it said nothing"


def child(where: str, results: str, place: str) -> None:
    """The other side."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)          # a device must not stay busy when the command is killed
    work(where, results, place)


def work(where: str, results: str, place: str) -> None:
    """Run a check, write what it yields."""
    with open(results, "w", buffering=1, encoding="utf-8") as file:
        def tell(found: dict) -> None:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")

        try:
            module, _, call = where.partition(":")
            function, *arguments = call.split()
            for row in getattr(importlib.import_module(module), function)(Place.from_json(json.loads(place)), *arguments):
                print(f"{row.what}: {row.value} {row.unit}")
                tell(asdict(row))
        except ModuleNotFoundError as error:
            traceback.print_exc()
            tell({"end": "not here", "said": f"{(error.name or '?').split('.')[0]} is not installed"})
        except Unavailable as error:
            tell({"end": "not here", "said": str(error)})
        except (UserError, CheckFailed) as error:
            tell({"end": "failed", "said": str(error)})
        except Exception as error:
            traceback.print_exc()
            tell({"end": "failed", "said": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        else:
            tell({"end": "done", "said": ""})
