"""Which backend an engine gets, and how it steps down."""

import logging
import shutil

import pytest
from make_bundle import VOCAB, write_bundle
from mock_backend import MockBackend

from runtime import backends
from runtime.bundle import open_bundle
from runtime.engine import Engine
from runtime.errors import DeviceError, Unavailable, UserError

LADDER = ("tensorrt", "cuda", "native", "cpu")


class Stub:
    graph = "graph.onnx"

    def __init__(self, name):
        self.name, self.closed = name, False

    def close(self):
        self.closed = True


@pytest.fixture
def ladder(monkeypatch):
    """ladder(tensorrt="reason", ...): providers that fail to open, with their reasons."""
    def make(**failing):
        def opener(name):
            def open_(bundle, threads, **options):
                if name in failing:
                    raise failing[name] if isinstance(failing[name], Exception) else Unavailable(failing[name])
                return Stub(name)
            return open_
        monkeypatch.setattr(backends, "_OPEN", {name: opener(name) for name in LADDER})
    return make


@pytest.mark.parametrize("working", range(4))
def test_the_first_that_opens_runs_and_each_step_down_is_one_logged_line(ladder, caplog, working):
    ladder(**{name: f"{name} is\tmissing" for name in LADDER[:working]})
    with caplog.at_level(logging.INFO):
        backend, lines = backends.open_backend(None, None, 1)
    assert backend.name == LADDER[working]
    reasons = [f"no {name}: {name} is\tmissing" for name in LADDER[:working]]
    assert lines[1:] == reasons == [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("provider", LADDER)
def test_a_named_provider_is_insisted_on(ladder, provider):
    ladder(**{provider: "not here"})
    with pytest.raises(UserError, match="not here"):
        backends.open_backend(None, provider, 1)


def test_an_unknown_provider_and_nothing_left(ladder):
    ladder(native="not built", cpu="broken")
    with pytest.raises(UserError, match="'tpu'; known: tensorrt, cuda, native, cpu"):
        backends.open_backend(None, "tpu", 1)
    with pytest.raises(Unavailable, match="^no cpu: broken; no native: not built$"):
        backends.open_backend(None, None, 1, below="cuda")


@pytest.mark.parametrize("provider", [None, *LADDER])
@pytest.mark.parametrize("threads, native, words", [
    (0, {}, "threads is 0"), (1000, {}, "threads is 1000"), (True, {}, "threads is True"), (1, {"cache_dtype": "fp16"}, "cache_dtype='fp16'")])
def test_a_mistake_is_raised_whatever_backend_would_run(ladder, provider, threads, native, words):
    ladder(tensorrt="missing", cuda="missing")
    with pytest.raises(UserError, match=words) as raised:
        backends.open_backend(None, provider, threads, native=native)
    assert not isinstance(raised.value, Unavailable)


@pytest.mark.parametrize("name", LADDER)
def test_damage_that_a_backend_finds_is_raised_and_not_stepped_down_from(ladder, name):
    ladder(**{other: "missing" for other in LADDER[:LADDER.index(name)]}, **{name: UserError("weights.bin is damaged")})
    with pytest.raises(UserError, match="^weights.bin is damaged$"):
        backends.open_backend(None, None, 1)


def test_options_of_the_native_core_where_another_runs(ladder, caplog):
    """Insisted on: a contradiction. Stepped down to: a line."""
    options = {"cache_dtype": "int8", "repack_cache": True, "meanwhile": lambda: None}
    with pytest.raises(UserError, match="cache_dtype and repack_cache: the native core's alone"):
        ladder()
        backends.open_backend(None, "cpu", 1, native=options)
    ladder(tensorrt="missing", cuda="missing", native="missing")
    with caplog.at_level(logging.INFO):
        backend, lines = backends.open_backend(None, None, 1, native=options)
    assert backend.name == "cpu" and lines[-1] == "cache_dtype and repack_cache: without effect here, since cpu has none" == caplog.messages[-1]
    ladder(tensorrt="missing", cuda="missing")
    assert len(backends.open_backend(None, None, 1, native=options)[1]) == 3


class FailingBackend(MockBackend):
    """Its device has memory for `calls` steps and for caches of `most` slots, and fails at the next."""

    def __init__(self, name, calls=None, most=None):
        super().__init__(VOCAB)
        self.name, self.left, self.most = name, calls, most

    def forward(self, *args):
        if self.closed:
            raise DeviceError("closed")
        if self.left == 0:
            raise DeviceError("out of memory")
        self.left = None if self.left is None else self.left - 1
        return super().forward(*args)

    def cache_bytes(self, rows, capacity):
        if self.most is not None and capacity > self.most:
            raise DeviceError(f"{capacity} slots are needed")
        return super().cache_bytes(rows, capacity)


@pytest.fixture
def open_engine(tmp_path, monkeypatch):
    """open_engine(backend, ..., provider=None) -> an engine on the first of these; every other provider has nothing."""
    def make(*made, provider=None):
        def opener(name):
            def open_(bundle, threads, **options):
                backend = next((b for b in made if backends.provider_of(b) == name and not b.closed), None)
                if backend is None:
                    raise Unavailable(f"no {name} here")
                return backend
            return open_
        monkeypatch.setattr(backends, "_OPEN", {name: opener(name) for name in LADDER})
        return Engine(write_bundle(tmp_path / "bundle"), provider=provider)
    return make


PROMPTS = ["Hello", "naïve 日本", "The quick brown fox"]
OPTIONS = {"temperature": 1.1, "seed": 3, "repetition_penalty": 1.2, "max_new_tokens": 30, "stop": "zz"}


def described(replies):
    return [(reply.text, reply.tokens, reply.finish_reason, len(reply.timings.token_ms)) for reply in replies]


@pytest.mark.parametrize("calls", [0, 1, 2, 17, 24])
def test_a_device_that_fails_in_the_middle_of_replies_hands_them_to_the_next(open_engine, caplog, calls):
    """The replies are those of a device that never fails, and each step down is told once, in order."""
    expected = described(open_engine(FailingBackend("native")).generate(PROMPTS, n=2, **OPTIONS))
    failing, second, last = FailingBackend("tensorrt", calls), FailingBackend("onnxruntime-cuda", 3), FailingBackend("native")
    with caplog.at_level(logging.INFO):
        engine = open_engine(failing, second, last)
        assert described(engine.generate(PROMPTS, n=2, **OPTIONS)) == expected
    assert failing.closed and second.closed and engine.backend is last
    reasons = ["no tensorrt: out of memory", "no cuda: out of memory"]
    assert engine.explain().splitlines() == [engine.explain().splitlines()[0], *reasons]
    assert engine.explain().startswith("native runs") and [r.getMessage() for r in caplog.records] == reasons
    assert described(engine.generate(PROMPTS, n=2, **OPTIONS)) == expected and len(caplog.records) == 2


def test_streams_go_on_where_they_were(open_engine):
    """Two at once: the first finds the failure; the second finds its backend closed, and steps down no further."""
    def texts(engine):
        streams = [engine.stream(prompt, max_new_tokens=25) for prompt in PROMPTS[:2]]
        pieces = ["", ""]
        for i in range(60):
            pieces[i % 2] += next(streams[i % 2], "")
        return pieces, [stream.reply.tokens for stream in streams]
    expected = texts(open_engine(FailingBackend("native")))
    engine = open_engine(FailingBackend("tensorrt", 11), FailingBackend("native"), FailingBackend("onnxruntime-cpu"))
    assert texts(engine) == expected
    assert engine.backend.name == "native"


def test_a_request_beyond_an_engines_capacity_steps_down(open_engine):
    engine = open_engine(FailingBackend("tensorrt", most=64), FailingBackend("native"))
    engine.generate("short", max_new_tokens=5)
    assert engine.backend.name == "tensorrt"
    reply, = engine.generate("short", max_new_tokens=100, ignore_model_stop=True)
    assert len(reply.tokens) == 100 and engine.explain().splitlines()[1:] == [
        "no tensorrt: 128 slots are needed", "no cuda: no cuda here"]


@pytest.mark.parametrize("name, provider", [("tensorrt", "tensorrt"), ("onnxruntime-cuda", "cuda")])
def test_a_provider_insisted_on_raises_when_its_device_fails(open_engine, name, provider):
    engine = open_engine(FailingBackend(name, calls=3), FailingBackend("native"), provider=provider)
    with pytest.raises(DeviceError, match="out of memory"):
        engine.generate("Hello", max_new_tokens=30)
    with pytest.raises(DeviceError, match="slots are needed"):
        open_engine(FailingBackend(name, most=10), FailingBackend("native"), provider=provider).generate("Hello")


def test_where_nothing_is_left_the_reason_is_raised(open_engine):
    with pytest.raises(UserError, match="no cpu here"):
        open_engine(FailingBackend("tensorrt", calls=3)).generate("Hello", max_new_tokens=30)
    with pytest.raises(DeviceError, match="out of memory"):
        open_engine(FailingBackend("onnxruntime-cpu", calls=3)).generate("Hello", max_new_tokens=30)


@pytest.mark.parametrize("options, words", [
    ({"cache_dtype": "fp16"}, "cache_dtype='fp16'"), ({"threads": 1000}, "threads is 1000"), ({"threads": 0}, "threads is 0")], ids=str)
@pytest.mark.parametrize("provider", [None, "native", "cpu"])
def test_the_real_backends_raise_mistakes(tiny_bundle, provider, options, words):
    with pytest.raises(UserError, match=words):
        Engine(tiny_bundle("smollm2", 4)[1], provider=provider, **options)


def test_damaged_weights_and_a_damaged_tokenizer_are_raised_not_stepped_down_from(tiny_bundle, tmp_path):
    pytest.importorskip("onnxruntime")
    library = pytest.importorskip("runtime.native.library")
    try:
        library.load()
    except UserError as error:
        pytest.skip(str(error))
    folder = shutil.copytree(tiny_bundle("smollm2", 4)[1], tmp_path / "bundle")
    entry = next(t for t in open_bundle(folder).manifest["weights"]["tensors"] if t["name"] == "layers.1.down.scales")
    whole = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(whole[:entry["offset"]] + b"\xff\xff" + whole[entry["offset"] + 2:])
    with pytest.raises(UserError, match="layers.1.down.*not a finite number"):
        Engine(folder)
    (folder / "weights.bin").write_bytes(whole)
    Engine(folder).close()
    (folder / "tokenizer.json").write_bytes(b"x" * (folder / "tokenizer.json").stat().st_size)
    with pytest.raises(UserError, match="tokenizer.json"):
        Engine(folder)
