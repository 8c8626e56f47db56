"""Take every ONNX model under some folders to TensorRT: `python tests/export/trt_tour.py FOLDER... [--fix sr=16000]`.

Each runs as a user would run it: `export.trt MODEL`; where that asks for shapes, again with the printed example as it is;
where it asks for an input's value, again with `--fix` if one was given here. The table says for each whether it was built
(the engine is there and `inspect` shows the model's outputs), refused (exit code 2 and a sentence with a mend), or wrong:
a traceback, a signal, a check that failed, TensorRT's raw words, more than 5 minutes. Exit code 1 where any is wrong.
Models run in forked children of this process; nothing is written but in a temporary folder.
"""

import argparse
import collections
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[2]))
import onnxscript.optimizer                                          # noqa: E402, F401: once, before the children
from export import trt                                               # noqa: E402
from export.tensorrt.build import load_backend                            # noqa: E402

RAW = re.compile(r"Traceback|Assert|Error Code|\.cpp|&&|\[TRT\]|Unsupported ONNX data type|ERROR:|/_src/")
LIMIT_S = 300


def in_a_fork(argv: list[str]) -> tuple[int, str]:
    """Exit code and output of `export.trt` with these arguments."""
    with tempfile.TemporaryFile() as kept:
        pid = os.fork()
        if pid == 0:
            os.dup2(kept.fileno(), 1)
            os.dup2(kept.fileno(), 2)
            sys.stdout = sys.stderr = open(kept.fileno(), "w", closefd=False)
            signal.alarm(LIMIT_S)
            code = 99
            try:
                code = trt.main(argv)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        kept.seek(0)
        return code, kept.read().decode(errors="replace")


def visit(path: Path, fixes: list[str], target: str) -> tuple[str, str]:
    """("built" | "refused" | "wrong", what was said last)."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [str(path), "--sm", target, "-o", f"{folder}/x.engine"]
        code, text = in_a_fork(argv)
        for _ in range(2):
            asked = re.search(r"--fix (\S+)=VALUE", text)
            known = [fix for fix in fixes if asked and fix.startswith(asked[1] + "=")]
            if code == 2 and known and "--fix" not in argv:
                argv += ["--fix", *known]
                argv = argv[:5] + argv[argv.index("--fix"):]          # other shapes may fit then
                code, text = in_a_fork(argv)
            example = re.search(r"add for example (--shapes .*)", text)
            if code == 2 and example:
                argv += example[1].split()
                code, text = in_a_fork(argv)
        said = " ".join(text.split())
        if code == 0:
            shown = in_a_fork(["inspect", f"{folder}/x.engine"])[1]
            outputs = [o.name for o in onnx.load(str(path), load_external_data=False).graph.output]
            good = Path(folder, "x.engine").stat().st_size > 1000 and all(f'"{name}"' in shown for name in outputs)
            return "built" if good and not RAW.search(text) else "wrong", said.replace(f"{folder}/", "")
        sentence = re.match(r"(?:note: .*\n)*error: ", text) and not RAW.search(text) and ";" in text
        return ("refused" if code == 2 and sentence else "wrong"), (f"exit {code}: " if code != 2 else "") + said.replace(f"{path}: ", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--fix", nargs="*", default=[])
    parser.add_argument("--sm", default="86")
    parser.add_argument("--only-wrong", action="store_true", help="leave the others out of the table")
    options = parser.parse_args()
    load_backend("rtx")
    counts, started = collections.Counter(), time.monotonic()
    for path in sorted(p for folder in options.folders for p in folder.rglob("*.onnx")):
        verdict, said = visit(path, options.fix, options.sm)
        counts[verdict] += 1
        if verdict == "wrong" or not options.only_wrong:
            print(f"{verdict:8} {path}: {said[:400]}", flush=True)
    print(f"{sum(counts.values())} models in {time.monotonic() - started:.0f} s: "
          + ", ".join(f"{counts[k]} {k}" for k in ("built", "refused", "wrong")))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
