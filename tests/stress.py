"""Many threads, closes, forks and Ctrl-C on one engine: `python -m tests.stress` (also `make stress`), minutes, a table, exit 1 if any is wrong.

Replies: threads that share an engine, on every backend, against the same replies made alone, to the token, text and log
probability. Closes: an engine is closed, by another thread or by one in the middle of a reply, while two threads
generate; the process must live, and every reply end whole or with a sentence. Forks: a child of a process whose other
threads are in the core gives the reply it gives alone, or (ONNX Runtime) refuses in words. Interrupts: an exception of
a signal handler, at a random moment of a reply, of a text's decoding or of a cache's life, arrives as itself and leaves
nothing locked. Closes, forks and interrupts have processes of their own, since what they break may be the process. A
small tiny model is made; give a bundle to take another (the TensorRT double and PyTorch are then left out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "runtime")]      # when run by itself

from runtime import Engine                                                  # noqa: E402
from runtime.cli import table                                               # noqa: E402
from runtime.errors import UserError                                        # noqa: E402
from runtime.machine import available_cpus                                  # noqa: E402
from runtime.ort_backend import OrtBackend                                  # noqa: E402

KINDS = ({}, {"temperature": 1.0}, {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2}, {"temperature": 0.8, "top_p": 0.9},
         {"logprobs": 3}, {"temperature": 1.0, "logprobs": 0, "min_p": 0.02})
HANG_S = 30


def reply(engine: Engine, number: int, tokens: int = 24):
    """Reply `number`, of a kind that follows from it: sampled or greedy, streamed, a chat or a batch."""
    options = dict(KINDS[number % len(KINDS)], seed=number, max_new_tokens=tokens)
    text = f"request number {number}, a text of its own"
    if number % 4 == 0:
        stream = engine.stream(text, **options)
        assert "".join(stream) == stream.reply.text
        made = [stream.reply]
    elif number % 4 == 1:
        made = [engine.chat([{"role": "user", "content": text}], **options)]
    elif number % 4 == 2:
        made = engine.generate([text, text * 3], n=2, **options)
    else:
        made = engine.generate(text * (1 + number % 3), **options)
    return [(r.text, r.tokens, r.finish_reason, r.logprobs) for r in made]


def wrong_replies(engine: Engine, threads: int, count: int) -> tuple[int, int]:
    """How many of threads x count replies made together differ from those made alone; and how many there were."""
    alone = [reply(engine, number) for number in range(count)]
    orders = [random.Random(thread).sample(range(count), count) for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(lambda order: [reply(engine, number) == alone[number] for number in order], orders))
    return sum(not right for thread in made for right in thread), threads * count


def close_while_generating(bundle: Path, provider: str, rounds: int, seed: int = 0) -> dict[str, int]:
    """Engines closed under two threads' replies; how these ended."""
    chance, ends = random.Random(seed), {"whole": 0, "refused": 0, "other": 0}
    for _ in range(rounds):
        engine = Engine(bundle, provider=provider)
        closer, delay = chance.choice(("another thread", "in a stream", "twice")), chance.random() * 0.02

        def generate(number: int) -> None:
            try:
                for n, _ in enumerate(engine.stream(f"text {number}", max_new_tokens=100, ignore_model_stop=True, seed=1,
                                                    temperature=float(number))):
                    if closer == "in a stream" and n == 3:
                        engine.close()
                ends["whole"] += 1
            except UserError as error:
                ends["refused" if "closed" in str(error) else "other"] += 1
            except BaseException:
                ends["other"] += 1

        working = [threading.Thread(target=generate, args=[number]) for number in range(2)]
        for thread in working:
            thread.start()
        time.sleep(delay)
        if closer != "in a stream":
            engine.close()
        if closer == "twice":
            engine.close()
        for thread in working:
            thread.join()
    return ends


def fork_under_load(bundle: Path, provider: str, rounds: int, seed: int = 0) -> dict[str, int]:
    """Children forked while two threads generate: those that gave the reply it is alone, refused, were wrong or hung."""
    with Engine(bundle, provider=provider) as engine:
        expected, counts, ends = reply(engine, 3), {"right": 0, "refused": 0, "wrong": 0, "hung": 0}, threading.Event()

        def work(thread: int) -> None:
            while not ends.is_set():
                reply(engine, thread)

        def in_the_child() -> int:
            try:
                same = reply(engine, 3) == expected
                engine.close()
                return 0 if same else 2
            except UserError as error:
                return 1 if "fork" in str(error) else 2

        working = [threading.Thread(target=work, args=[thread]) for thread in range(2)]
        for thread in working:
            thread.start()
        try:
            for n in range(rounds):
                time.sleep(0.003 * (n % 7))
                counts[forked(in_the_child)] += 1
        finally:
            ends.set()
            for thread in working:
                thread.join()
    return counts


def forked(work) -> str:
    """How a child does that does this and ends with what it gives; one that hangs is killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")               # Python warns of forking with threads: that is the point
        child = os.fork()
    if child == 0:
        code = 2
        with contextlib.suppress(BaseException):
            code = work()
        os._exit(code)
    until = time.monotonic() + HANG_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.001)
    return ("right", "refused", "wrong")[os.waitstatus_to_exitcode(ended[1])] if os.WIFEXITED(ended[1]) else "wrong"


class Interrupted(BaseException):
    """What the signal handler raises."""


def interrupt(bundle: Path, provider: str, rounds: int, seed: int = 0) -> dict[str, int]:
    """Replies, texts and caches made over and over until a signal comes, at a random moment: its exception arrived, or was lost
    (whatever came in its place). Then another thread forks, which waits for what an interrupted one has left locked."""
    counts, chance, armed, forks = {"arrived": 0, "lost": 0, "hung": 0}, random.Random(seed), [], []

    def handler(*_):
        if armed:
            armed.clear()
            raise Interrupted

    with Engine(bundle, provider=provider) as engine:
        acts = [(0.02, rounds, lambda n: engine.generate("text " * (20 if n % 2 else 1), max_new_tokens=150, ignore_model_stop=True,
                                                         temperature=float(n % 3 > 1), top_k=20)),
                (0.0003, 20 * rounds, lambda n: engine.tokenizer.decode([5, 6, 7])),
                (0.0003, 20 * rounds, lambda n: engine.backend.new_cache(1, 64))]
        signal.signal(signal.SIGALRM, handler)
        for longest, times, act in acts:
            for n in range(times):
                try:
                    armed.append(1)
                    signal.setitimer(signal.ITIMER_REAL, 0.00005 + chance.random() * longest)
                    while armed:
                        act(n)
                    counts["lost"] += 1
                except Interrupted:
                    counts["arrived"] += 1
                except Exception as error:
                    armed.clear()
                    counts["lost"] += 1
                    print(f"in place of the signal's exception: {error!r}", file=sys.stderr)
        other = threading.Thread(target=lambda: forks.append(forked(lambda: 0)), daemon=True)
        other.start()
        other.join(HANG_S)
        counts["hung"] = int(forks != ["right"])
    return counts


def make_model(folder: Path) -> tuple[Path, Path]:
    """A tiny random model in 4 bits: checkpoint and bundle."""
    from compress import quantize
    from export import onnx, ort
    from tiny import write_tiny
    write_tiny(folder / "model", "smollm2")
    assert quantize.main([str(folder / "model"), "-o", str(folder / "ckpt"), "--bits", "4", "--group", "32"]) == 0
    assert onnx.main([str(folder / "ckpt"), "-o", str(folder / "bundle")]) == 0
    assert ort.main([str(folder / "bundle")]) == 0
    return folder / "ckpt", folder / "bundle"


def engines(bundle: Path, checkpoint: Path | None):
    """name -> an engine on each backend that this installation has."""
    cpus = available_cpus()
    for threads in sorted({1, cpus}):
        yield f"native, {threads} threads", Engine(bundle, provider="native", threads=threads)
    yield "ONNX Runtime, fast graph", Engine(bundle, provider="cpu")

    def over(backend):
        engine = Engine(bundle, provider="cpu", threads=1)
        engine.backend = backend
        return engine

    yield "ONNX Runtime, portable graph", over(OrtBackend(Engine(bundle, provider="cpu", threads=1).bundle, role="portable", threads=cpus))
    if checkpoint is None:
        return
    from models.checkpoint import load_decoder
    from models.network.torch_backend import TorchBackend
    yield "PyTorch", over(TorchBackend(load_decoder(checkpoint)))
    try:
        import cuda.bindings.runtime  # noqa: F401
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return
    import test_trt_backend as trt
    from export import onnx
    from runtime.bundle import open_bundle
    other = bundle.parent / "engines"
    if not other.exists():
        assert onnx.main([str(checkpoint), "-o", str(other)]) == 0
        trt.add_engine(other, "engines/c128.engine", 128)
        trt.add_engine(other, "engines/c256.engine", 256)
    yield "TensorRT (a double)", over(trt.opened(open_bundle(other))[0])


def in_a_process(part: str, bundle: Path, provider: str, rounds: int, seed: int = 0) -> dict[str, int]:
    """A part in a process of its own, whose end by a signal is counted. Where it hangs, it ends and its threads' stacks are printed."""
    limit = 60 + 2 * rounds
    script = (f"import faulthandler; faulthandler.dump_traceback_later({limit}, exit=True)\nimport json, stress, pathlib\n"
              f"print(json.dumps(stress.{part}(pathlib.Path({str(bundle)!r}), {provider!r}, {rounds}, {seed})))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=limit + 60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])})
    if done.stderr:
        print(done.stderr[-4000:], file=sys.stderr)
    return json.loads(done.stdout) if done.returncode == 0 else {"signals": int(done.returncode < 0), "other": int(done.returncode > 0)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__.split("\n\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle; default: a tiny one is made")
    for name, default in (("threads", 8), ("replies", 96), ("closes", 200), ("forks", 100), ("interrupts", 200)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options, rows, bad = parser.parse_args(argv), [], 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = (None, options.bundle) if options.bundle else make_model(Path(folder))
        for name, engine in engines(bundle, checkpoint):
            wrong, count = wrong_replies(engine, options.threads, options.replies)
            rows.append({"what": f"{options.threads} threads x {options.replies} replies", "backend": name, "tried": count, "found": f"{wrong} wrong"})
            bad += wrong
            engine.backend.close()
        for provider in ("native", "cpu"):
            total: dict[str, int] = {}
            for seed in range(-(-options.closes // 20)):
                for key, n in in_a_process("close_while_generating", bundle, provider, min(20, options.closes - 20 * seed), seed).items():
                    total[key] = total.get(key, 0) + n
            rows.append({"what": "closes during generation", "backend": provider, "tried": options.closes,
                         "found": f"{total.get('signals', 0)} signals, {total.get('other', 0)} raw errors; replies {total.get('whole', 0)} whole, "
                                  f"{total.get('refused', 0)} refused"})
            bad += total.get("signals", 0) + total.get("other", 0)
            for what, part, tried in (("forks under load", "fork_under_load", options.forks), ("interrupts", "interrupt", options.interrupts)):
                counts = in_a_process(part, bundle, provider, tried)
                rows.append({"what": what, "backend": provider, "tried": tried, "found": ", ".join(f"{n} {key}" for key, n in counts.items())})
                good = "arrived" if part == "interrupt" else "right" if provider == "native" else "refused"
                bad += sum(n for key, n in counts.items() if key != good)
    print(table(rows))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
