"""What has programs or libraries of its own: TensorRT, and the tests that are marked `gpu`."""

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

from gpu_check.apart import ROOT
from gpu_check.place import Place, Row
from runtime.errors import Unavailable

SOME_FAMILIES = ("smollm2", "olmoe", "qwen3_5", "gemma4")        # attention, experts, a recurrence, shared keys
DEVICES_S = 110.0                      # for all files of `devices`, which its limit allows
REFUSED = re.compile(r"UNSUPPORTED_CC|does not support this compute capability", re.I)


def tensorrt(place: Place) -> Iterator[Row]:
    """An engine for this GPU, and the reference through it. A GPU that TensorRT refuses is a result, and no failure."""
    if place.device != "cuda":
        raise Unavailable("TensorRT engines run on an NVIDIA GPU alone")
    from export import trt
    from gpu_check.decode import BUDGETS, parity
    from runtime.bundle import open_bundle
    from runtime.cuda_device import present_gpu
    from runtime.trt_backend import TrtBackend
    capability, said = present_gpu().compute_capability, ""
    for kind in ("rtx", "trt"):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = trt.main([str(place.work / "fp16"), "--backend", kind, "--sm", str(capability), "--capacity", "256", "--rows", "1"])
        print(output.getvalue())
        said = output.getvalue().strip().splitlines()[-1] if output.getvalue().strip() else f"exit code {code}"
        yield Row(f"building with {kind}", "built" if code == 0 else said)
        if code == 0:
            break
    else:
        raise Unavailable(said)
    try:
        backend = TrtBackend(open_bundle(place.work / "fp16"))
    except Unavailable as error:
        if REFUSED.search(str(error)):
            raise Unavailable(f"TensorRT builds for SM{capability} and refuses to run there: {error}") from None
        raise
    yield from parity(place, backend, BUDGETS["fp16"])
    backend.close()


def marked(place: Place) -> Iterator[Row]:
    """pytest -m gpu, in the files that have such tests."""
    tests = sorted(file for file in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", file.read_text("utf-8")))
    yield from _pytest("pytest -m gpu", "-m", "gpu", *(str(file) for file in tests))


def devices(place: Place) -> Iterator[Row]:
    """Every stage on the device and on the CPU: the same result, of four kinds of model. A file at a time, so that what is done is told."""
    from tiny import EVERY_FAMILY
    chosen = f"{' or '.join(SOME_FAMILIES)} or not ({' or '.join(EVERY_FAMILY)})" if place.device == "cuda" else "smollm2 and walk"
    end = time.monotonic() + DEVICES_S
    for file in sorted((ROOT / "tests").rglob("test_*devices*.py")):
        yield from _pytest(file.name, str(file), "-k", chosen, seconds=max(1.0, end - time.monotonic()))


def _pytest(name: str, *words: str, seconds: float | None = None) -> Iterator[Row]:
    """seconds: after which it is stopped, which proves nothing either way."""
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    try:
        run = subprocess.run([sys.executable, "-m", "pytest", "-rfEs", "-p", "no:cacheprovider", *words], cwd=ROOT, capture_output=True, text=True,
                             timeout=seconds)
    except subprocess.TimeoutExpired:
        yield Row(name, f"not finished in {seconds:.0f} s")
        return
    print(run.stdout[-20000:], run.stderr[-4000:])
    found = [(kind.lower(), line) for kind, line in re.findall(r"^(SKIPPED|FAILED|ERROR) (.*)$", run.stdout, re.M)]
    skipped = Counter(re.sub(r"^\[\d+\] \S+: ", "", line) for kind, line in found if kind == "skipped")
    yield from (Row(f"{count} skipped", line) for line, count in skipped.items())
    yield from (Row(kind, line) for kind, line in found if kind != "skipped")
    last = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()][-1:] or ["it said nothing"]
    yield Row(name, last[0].strip("= "), ok=run.returncode in (0, 5))                         # 5: there was none to run
