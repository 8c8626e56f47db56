"""Kill every command that writes, at random moments: `python -m tests.kill --kills 200 --seed 1`.

A command runs on a tiny model in a process of its own, which dies by SIGKILL: after a random part of its time, or just
before its n-th change to the file system. Half of the runs find an older result in place. Afterwards

    half-written    the output is there, and neither the old one nor the new one whole
    not again       the same command (training: with --resume) does not run to its end, or gives another result than unkilled
    left behind     after that run the folder holds other names than an unkilled run leaves

are findings: each is printed with the line that reproduces it, and the exit code is 1.
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")                    # a forked child has one thread, and cannot have a pool's
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import hashlib
import importlib
import json
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runtime.cli import arg, run, table          # noqa: E402
from runtime.errors import CheckFailed, UserError          # noqa: E402

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "ctypes.dlsym"}      # and open, to write
# What differs between two runs of one command by rights: times, and TensorRT's choice of kernels.
VOLATILE = ("lineage.json", "manifest.json", "metrics.jsonl", "figures.json", "report.json", "logs", ".engine.gz", ".engine.json", "state.json")
OUTCOMES = ("finished first", "fine", "half-written", "not again", "left behind")


@dataclass(frozen=True)
class Options:
    """Kill commands while they write, and see what is left."""

    kills: int = arg(50, help="how many")
    seed: int = arg(0, help="of the commands and the moments")
    command: tuple[str, ...] = arg((), help="only these (default: all)", metavar="NAME")
    only: int | None = arg(None, help="only this one of the kills", metavar="NUMBER")
    work: Path = arg(ROOT / "build" / "kill", help="folder to work in")


@dataclass(frozen=True)
class Command:
    """words: of `python -m`, where {in} is the folder of inputs and {out} an empty one. opens: raises where OUT is not whole."""

    words: str
    opens: Callable[[Path], None]
    older: str | None = None                # words that make an older result; None: a command that refuses one
    resume: bool = False


def opens_checkpoint(out: Path) -> None:
    from models.checkpoint import open_checkpoint
    if (out / "model").exists():
        checkpoint = open_checkpoint(out / "model")
        for name in checkpoint.names():
            checkpoint.read(name)


def opens_run(out: Path) -> None:
    for name in ("last", "best"):
        if (out / "run" / name).exists():
            opens_checkpoint_at(out / "run" / name)


def opens_checkpoint_at(folder: Path) -> None:
    from models.checkpoint import open_checkpoint
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.read(name)


def opens_bundle(out: Path) -> None:
    from runtime.bundle import open_bundle
    if (out / "bundle").exists():
        open_bundle(out / "bundle", verify=True)


def opens_json(out: Path) -> None:
    if (out / "report.json").exists():
        json.loads((out / "report.json").read_text())


def opens_tokenizer(out: Path) -> None:
    if (out / "tokenizer").exists():
        from runtime.text import Tokenizer
        Tokenizer(out / "tokenizer" / "tokenizer.json"), json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())


def opens_cache(out: Path) -> None:
    for state in (out / "teacher").glob("*/state.json"):
        json.loads(state.read_text())


TEXT = "--data {in}/text.txt --cache {out}/corpus"
STEPS = "--steps 4 --batch 2 --eval-every 2 --eval-rows 2"
GPTQ = f"compress.quantize {{in}}/dense -o {{out}}/model --method gptq --bits 3 {TEXT} --windows 4 --length 32"
COMMANDS = {
    "get": Command("models.get {in}/plain -o {out}/model", opens_checkpoint, "models.get {in}/gpt2 -o {out}/model"),
    "get-gguf": Command("models.get {in}/model.gguf -o {out}/model", opens_checkpoint, "models.get {in}/gpt2 -o {out}/model"),
    "train": Command(f"models.train --checkpoint {{in}}/dense -o {{out}}/run {TEXT} --valid {{in}}/text.txt --context 32 {STEPS}", opens_run, resume=True),
    "finetune": Command(f"models.finetune {{in}}/dense --task chat -o {{out}}/run --data {{in}}/chat.jsonl {STEPS}", opens_run, resume=True),
    "distill": Command(f"compress.distill --teacher {{in}}/dense --student {{in}}/plain -o {{out}}/run {TEXT} --valid {{in}}/text.txt --context 32 {STEPS} --teacher-cache {{out}}/teacher",
                       opens_run, resume=True),
    "rtn": Command("compress.quantize {in}/dense -o {out}/model", opens_checkpoint, "models.get {in}/gpt2 -o {out}/model"),
    "gptq": Command(GPTQ, opens_checkpoint, "models.get {in}/gpt2 -o {out}/model"),
    "recover": Command(f"compress.recover {{in}}/int4 --teacher {{in}}/dense -o {{out}}/run {TEXT} {STEPS} --train weights --block-steps 2 --windows 8 --length 32 "
                       "--teacher-cache {out}/teacher", opens_run, resume=True),
    "prune": Command(f"compress.prune {{in}}/dense --what depth -o {{out}}/model {TEXT} --layers 1 --windows 4 --length 32", opens_checkpoint),
    "prune-vocabulary": Command(f"compress.prune {{in}}/dense --what vocabulary --tokens 300 -o {{out}}/model {TEXT}", opens_checkpoint,
                                "models.get {in}/gpt2 -o {out}/model"),
    "teacher": Command(f"compress.teacher {{in}}/dense -o {{out}}/teacher {TEXT} --windows 6 --length 32", opens_cache),
    "run": Command(f"compress.run {{in}}/recipe.toml --model {{in}}/dense -o {{out}}/run {TEXT} --eval-windows 1 --no-speed", opens_run),
    "onnx": Command("export.onnx {in}/int4 -o {out}/bundle", opens_bundle, "export.onnx {in}/dense -o {out}/bundle"),
    "ort": Command("export.ort {out}/bundle", opens_bundle, "export.onnx {in}/int4 -o {out}/bundle"),
    "verify": Command("export.verify {in}/int4 {out}/bundle --threads 1", opens_bundle, "export.onnx {in}/int4 -o {out}/bundle"),
    "trt": Command("export.trt {out}/bundle --sm 89 --capacity 64", opens_bundle, "export.onnx {in}/int4 -o {out}/bundle"),
    "tokenizer": Command("models.tokenizer train --data {in}/text.txt -o {out}/tokenizer --vocab-size 300 --cache {out}/corpus", opens_tokenizer),
    "ngram": Command("models.ngram --tokenizer {in}/dense --data {in}/text.txt --valid {in}/text.txt --order 3 -o {out}/ngram --cache {out}/corpus",
                     opens_tokenizer),
    "worse": Command("models.what_got_worse {in}/dense {in}/int4 --data {in}/text.txt --windows 1 --json {out}/report.json --html {out}/report.html",
                     opens_json),
    "evaluate": Command("models.evaluate {in}/dense --data {in}/text.txt --max-windows 2 --json {out}/report.json", opens_json),
    "bench": Command("runtime.bench {in}/bundle --prompt-tokens 8 --new-tokens 4 --repeat 1 --threads 1 --json {out}/report.json", opens_json),
}
NEEDS_OLDER = ("ort", "verify", "trt")                         # what they add to


def kill(options: Options) -> None:
    """Run. Raises CheckFailed where something was found."""
    names = options.command or tuple(COMMANDS)
    if unknown := [name for name in names if name not in COMMANDS]:
        raise UserError(f"--command {unknown[0]}: known are {', '.join(COMMANDS)}")
    work, inputs = options.work.absolute(), options.work.absolute() / "inputs"
    shutil.rmtree(work, ignore_errors=True)
    inputs.mkdir(parents=True)
    warm_up()
    _child(lambda: _make_inputs(inputs), inputs.with_suffix(".log"))
    whole, counts = {}, {name: Counter() for name in names}
    for number in range(options.kills):
        rng = random.Random(f"{options.seed} {number}")
        name = names[number % len(names)]
        older = COMMANDS[name].older is not None and (name in NEEDS_OLDER or rng.random() < 0.5)
        by_event, moment = rng.random() < 0.6, rng.random()
        if options.only not in (None, number):
            continue
        if (name, older) not in whole:
            whole[name, older] = _whole(name, older, inputs, work / f"{name}-{'over' if older else 'new'}")
        outcome, why = _kill(name, older, inputs, work / "out", whole[name, older], by_event, moment)
        counts[name][outcome] += 1
        if outcome not in OUTCOMES[:2]:
            print(f"{outcome}: python -m tests.kill --seed {options.seed} --kills {number + 1} --only {number}"
                  f"{' --command ' + ' '.join(options.command) if options.command else ''}    # {name}\n    {why}", flush=True)
            shutil.rmtree(work / f"finding-{number}", ignore_errors=True)
            shutil.copytree(work / "out", work / f"finding-{number}", symlinks=True)
    rows = [{"command": name, "kills": count.total(), **{outcome: count[outcome] for outcome in OUTCOMES}} for name, count in counts.items()]
    total = sum(counts.values(), Counter())
    print(table([*rows, {"command": "all", "kills": total.total(), **{outcome: total[outcome] for outcome in OUTCOMES}}], title=f"seed {options.seed}"))
    if found := sum(total[outcome] for outcome in OUTCOMES[2:]):
        raise CheckFailed(f"{found} findings, kept in {work}")


def warm_up() -> None:
    """Import once what every child would."""
    warnings.simplefilter("ignore")
    for module in {words.words.split()[0] for words in COMMANDS.values()} - {"export.trt"}:
        importlib.import_module(module)
    import torch
    torch.set_num_threads(1)


def _make_inputs(place: Path) -> None:
    from tiny import SENTENCES, tiny_model, tiny_tokenizer, write_tiny
    from tiny_gguf import write_gguf
    write_tiny(place / "plain", "smollm2"), write_tiny(place / "gpt2", "gpt2")
    write_gguf(place / "model.gguf", tiny_model("smollm2"), tiny_tokenizer(), "Q8_0")
    (place / "text.txt").write_text("\n\n".join(f"{i}. {sentence}" for i in range(40) for sentence in SENTENCES))
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{i}: {sentence}"}, {
        "role": "assistant", "content": sentence}]}) + "\n" for i in range(4) for sentence in SENTENCES))
    (place / "recipe.toml").write_text('about = "two stages"\n[[stages]]\nstage = "quantize"\nmethod = "gptq"\nbits = 4\nwindows = 4\nlength = 32\n'
                                       '[[stages]]\nstage = "recover"\nsteps = 2\nbatch = 1\nwindows = 2\nlength = 32\n')
    for words in (f"models.get {place}/plain -o {place}/dense", f"compress.quantize {place}/dense -o {place}/int4", f"export.onnx {place}/int4 -o {place}/bundle"):
        assert _main(words) == 0, words


def _main(words: str) -> int:
    module, *argv = words.split()
    return importlib.import_module(module).main(argv) or 0


def _words(name: str, inputs: Path, out: Path, which: str = "words") -> str:
    return getattr(COMMANDS[name], which).replace("{in}", str(inputs)).replace("{out}", str(out))


def _child(work: Callable[[], int | None], log: Path, moment: Callable[[], None] = lambda: None) -> int:
    """Run `work` in a fork with its output in `log`; its exit code, or less than 0: died of that signal."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1), os.dup2(handle, 2)
            os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = str(log.parent)
            moment()
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fresh(name: str, older: bool, inputs: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if older and _child(lambda: _main(_words(name, inputs, out, "older")), out.with_suffix(".log")):
        raise RuntimeError(f"{name}: the older result could not be made: {out.with_suffix('.log').read_text()[-2000:]}")


def _whole(name: str, older: bool, inputs: Path, out: Path) -> dict:
    """What an unkilled run takes and leaves: seconds, changes to the file system, names and contents."""
    _fresh(name, older, inputs, out)
    count, start = out.with_suffix(".count"), time.monotonic()
    before = _contents(out)

    def moment():
        events = [0]

        def hook(event, arguments):
            if _changes(event, arguments):
                events[0] += 1
                handle = os.open(count, os.O_RDWR | os.O_CREAT)          # os.open: not counted, its flags are not a mode
                os.write(handle, str(events[0]).encode()), os.close(handle)
        sys.addaudithook(hook)
    if _child(lambda: _main(_words(name, inputs, out)), out.with_suffix(".log"), moment):
        raise RuntimeError(f"{name} fails by itself: {out.with_suffix('.log').read_text()[-3000:]}")
    COMMANDS[name].opens(out)
    return {"seconds": time.monotonic() - start, "events": int(count.read_text()), "contents": _contents(out), "older": before}


def _changes(event: str, arguments: tuple) -> bool:
    if event == "open":
        return isinstance(arguments[1], str) and arguments[1][:1] in ("w", "a", "x") or arguments[1] is not None and "+" in arguments[1]
    return event in EVENTS and (event != "ctypes.dlsym" or arguments[1] == "renameat2")


def _contents(out: Path) -> dict[str, str]:
    """Names under `out`, with a hash where runs give equal bytes."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if "/logs/" in name:
            continue
        volatile = any(part == name.rsplit("/", 1)[-1] or part.startswith(".") and name.endswith(part) for part in VOLATILE)
        found[name] = "" if volatile or path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _kill(name: str, older: bool, inputs: Path, out: Path, whole: dict, by_event: bool, moment: float) -> tuple[str, str]:
    """Kill one run; (outcome, why)."""
    # The same place for every run: its name is in nothing that is compared, except the seeds of hidden folders' names.
    _fresh(name, older, inputs, out)
    at = 1 + int(moment * whole["events"])

    def die():
        left = [at]

        def hook(event, arguments):
            if _changes(event, arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        if by_event:
            return sys.addaudithook(hook)
        timer = threading.Timer(moment * whole["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    log = out.with_suffix(".log")
    when = f"killed before change {at} of {whole['events']}" if by_event else f"killed at {moment:.0%} of {whole['seconds']:.1f} s"
    code = _child(lambda: _main(_words(name, inputs, out)), log, die)
    if code >= 0:
        return ("finished first", "") if code == 0 else ("not again", f"{when}: exit {code} before the kill: {log.read_text()[-300:]}")
    left = _contents(out)
    try:
        COMMANDS[name].opens(out)
    except BaseException as error:
        return "half-written", f"{when}: {type(error).__name__}: {error}"
    if older and (missing := [path for path in whole["older"] if "/" not in path and path not in left]):
        return "half-written", f"{when}: {missing} was there before and is gone"
    words = _words(name, inputs, out)
    if COMMANDS[name].resume and (out / "run" / "last").exists():
        words += " --resume"
    if COMMANDS[name].older is None and not COMMANDS[name].resume and name not in ("run", "teacher") and whole["contents"].keys() <= left.keys():
        return "fine", ""                                    # the new one is there, and would be refused as a place to write to
    if code := _child(lambda: _main(words), log):
        return "not again", f"{when}: exit {code}: {log.read_text()[-600:].strip()}"
    after = _contents(out)
    if after.keys() != whole["contents"].keys():
        return "left behind", f"{when}: too many {sorted(after.keys() - whole['contents'].keys())}, too few {sorted(whole['contents'].keys() - after.keys())}"
    if different := [path for path in after if after[path] != whole["contents"][path]]:
        return "not again", f"{when}: other contents in {different}"
    return "fine", ""


def main(argv=None) -> int:
    return run(Options, kill, argv)


if __name__ == "__main__":
    raise SystemExit(main())
