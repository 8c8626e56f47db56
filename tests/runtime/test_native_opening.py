"""How the native backend opens a bundle: beside other work, and only where its arithmetic is what the bundle was made for."""

import threading

import native_bundle
import pytest

from runtime.errors import UserError
from runtime.native import library
from runtime.native.backend import NativeBackend


class Core:
    """The core, with a count of open models; `ew_open` waits until `beside` is set."""

    def __init__(self):
        self.core, self.beside, self.opened, self.heard = library.load(), threading.Event(), 0, None

    def __getattr__(self, name):
        return getattr(self.core, name)

    def ew_open(self, *arguments):
        self.heard = self.beside.wait(10)
        self.opened += 1
        return self.core.ew_open(*arguments)

    def ew_close(self, model):
        self.opened -= 1
        self.core.ew_close(model)


@pytest.fixture
def core(monkeypatch):
    core = Core()
    monkeypatch.setattr(library, "load", lambda: core)
    return core


def test_other_work_goes_on_while_the_core_opens_the_weights(tmp_path, core):
    bundle = native_bundle.write_bundle(tmp_path, native_bundle.random_decoder(native_bundle.config()))
    backend = NativeBackend(bundle, threads=1, meanwhile=core.beside.set)
    assert core.heard and backend.model and core.opened == 1
    backend.close()
    assert core.opened == 0


def test_what_the_other_work_raises_is_handed_back_and_the_model_closed(tmp_path, core):
    bundle = native_bundle.write_bundle(tmp_path, native_bundle.random_decoder(native_bundle.config()))

    def fail():
        core.beside.set()
        raise UserError("no tokenizer there")

    with pytest.raises(UserError, match="no tokenizer there") as raised:
        NativeBackend(bundle, threads=1, meanwhile=fail)
    assert core.heard
    del raised                                    # its frames hold the backend
    assert core.opened == 0
