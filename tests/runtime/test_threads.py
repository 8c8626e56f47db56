"""An engine among threads, closed under them, forked and interrupted: `tests/stress.py`, small."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import stress
import tokenizers

from runtime import Engine
from runtime.errors import DeviceError, UserError

OPTIONS = dict(max_new_tokens=100, ignore_model_stop=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint, bundle) of a tiny model in 4 bits."""
    return stress.make_model(tmp_path_factory.mktemp("stress"))


@pytest.fixture(params=["native", "cpu"])
def engine(tiny, request):
    with Engine(tiny[1], provider=request.param) as engine:
        yield engine


def test_replies_of_eight_threads_are_those_given_alone(tiny):
    for name, engine in stress.engines(tiny[1], tiny[0]):
        assert stress.wrong_replies(engine, threads=8, count=6) == (0, 48), name


def test_a_long_text_of_one_thread_does_not_hold_up_the_tokens_of_others(tiny):
    tokenizer, texts = Engine(tiny[1], threads=1).tokenizer, []
    text, want = "The capital of France is Paris. " * 30_000, tokenizer.decode([5, 6, 7])
    during, longest, begun = 0, 0.0, time.perf_counter()
    last = begun
    long = threading.Thread(target=lambda: texts.append(tokenizer.encode(text)))
    long.start()
    while long.is_alive():
        assert tokenizer.decode([5, 6, 7]) == want
        during, now = during + 1, time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    took = time.perf_counter() - begun
    assert during > 20 and longest < took / 3, (during, longest, took)
    oracle = tokenizers.Tokenizer.from_file(str(tiny[1] / "tokenizer.json"))
    assert texts[0].tolist() == oracle.encode(text).ids


def test_close_under_a_running_reply_is_no_crash(tiny):
    for provider in ("native", "cpu"):
        ends = stress.in_a_process("close_while_generating", tiny[1], provider, 8, 1)
        assert ends.keys() == {"whole", "refused", "other"} and ends["other"] == 0 and ends["refused"] > 0


def test_after_close_everything_is_refused_in_words(tiny, engine):
    cache, stream, late = engine.backend.new_cache(2, 64), engine.stream("a", **OPTIONS), engine.stream("b", **OPTIONS)
    view, zeros = cache.view(0, 1), np.zeros((1, 1), np.int64)
    next(stream)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate("a"), lambda: engine.stream("a"), lambda: list(stream), lambda: list(late),
                 lambda: engine.chat([{"role": "user", "content": "a"}])):
        with pytest.raises(UserError, match="this engine was closed"):
            call()
    with pytest.raises(DeviceError, match="this backend was closed"):
        engine.backend.forward(zeros, zeros, zeros[0], zeros, view)
    if engine.backend.name == "native":
        for call in (lambda: cache.grow(128), lambda: cache.fork(0, 1), lambda: engine.backend.new_cache(1, 64), lambda: cache.nbytes):
            with pytest.raises(DeviceError, match="this backend was closed"):
                call()
    assert stream.reply.text and stream.reply.finish_reason is None


def test_a_cache_of_another_backend_is_refused(tiny):
    one, other = (Engine(tiny[1], provider="native", threads=1) for _ in range(2))
    zeros = np.zeros((1, 1), np.int64)
    with pytest.raises(UserError, match="of another backend"):
        one.backend.forward(zeros, zeros, zeros[0], zeros, other.backend.new_cache(1, 16))


@pytest.mark.parametrize("provider", ["native", "cpu"])
def test_an_exception_of_a_signal_arrives_as_itself_and_leaves_nothing_locked(tiny, provider):
    """At a random moment of a reply, of a text's decoding, of a cache's life."""
    assert stress.in_a_process("interrupt", tiny[1], provider, 30) == {"arrived": 30 + 600 + 600, "lost": 0, "hung": 0}


@pytest.mark.parametrize("provider", ["native", "cpu"])
def test_the_child_of_a_fork_works_or_says_why_not(tiny, provider):
    counts = stress.in_a_process("fork_under_load", tiny[1], provider, 6)
    assert counts == {"right": 6 * (provider == "native"), "refused": 6 * (provider != "native"), "wrong": 0, "hung": 0}


@pytest.mark.parametrize("provider", ["native", "cpu"])
@pytest.mark.parametrize("ending", ["stop in a daemon's reply", "close in a daemon's reply", "exit of a forked child", "Ctrl-C",
                                    "collected in a reply"])
def test_the_process_ends_as_it_should(tiny, provider, ending):
    script = f"""
import gc, os, signal, sys, threading, time
from runtime import Engine
from runtime.errors import UserError
engine = Engine({str(tiny[1])!r}, provider={provider!r})
def generate():
    try:
        for _ in range(1000): engine.generate("a", max_new_tokens=100, ignore_model_stop=True)
    except UserError: pass
class Closer:
    def __init__(self): self.me = self
    def __del__(self): engine.close()
ending = {ending!r}
if ending == "exit of a forked child":
    engine.generate("a", max_new_tokens=5)
    if os.fork() == 0: sys.exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) - 7)
elif ending == "Ctrl-C":
    from runtime import generate
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    generate.show = lambda stream: [list(engine.stream("a", max_new_tokens=100)) for _ in iter(int, 1)]
    sys.exit(generate.main([{str(tiny[1])!r}, "-p", "a", "--provider", {provider!r}]) - 130)
elif ending == "collected in a reply":
    Closer(), gc.set_threshold(1)
    generate()
else:
    for _ in range(2): threading.Thread(target=generate, daemon=True).start()
    time.sleep(0.05)
    if ending.startswith("close"): engine.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ending != "Ctrl-C" or done.stderr == "interrupted\n"
