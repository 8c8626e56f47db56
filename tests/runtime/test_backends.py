"""Which backend an engine gets, and how it steps down."""

import logging

import pytest

from runtime import backends
from runtime.engine import Engine
from runtime.errors import DeviceError, UserError

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
            def open_(bundle, threads):
                if name in failing:
                    raise UserError(failing[name])
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
    with pytest.raises(UserError, match="broken"):
        backends.open_backend(None, None, 1, below="cuda")


def test_a_device_that_fails_while_running_steps_down(ladder, caplog):
    ladder(cuda="no CUDA here")
    engine = Engine.__new__(Engine)
    engine.bundle, engine._provider, engine._threads = None, None, 1
    engine.backend, engine._explanation = backends.open_backend(None, None, 1)
    first = engine.backend
    assert first.name == "tensorrt"

    def out_of_memory(rows, capacity):
        raise DeviceError("out of memory")
    first.new_cache = out_of_memory
    Stub.new_cache = lambda self, rows, capacity: (rows, capacity)
    try:
        with caplog.at_level(logging.INFO):
            assert engine._new_cache(2, 64) == (2, 64)
        assert engine.backend.name == "native" and first.closed
        assert engine.explain().splitlines()[1:] == ["no cuda: no CUDA here", "no tensorrt: out of memory"]
        engine.backend, engine._provider = first, "tensorrt"
        with pytest.raises(DeviceError, match="out of memory"):
            engine._new_cache(2, 64)
    finally:
        del Stub.new_cache
