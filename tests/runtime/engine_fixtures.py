"""Engines around the mock backend."""

import pytest
from make_bundle import VOCAB, write_bundle
from mock_backend import MockBackend

import runtime.engine
from runtime import Engine


@pytest.fixture
def open_engine(tmp_path, monkeypatch):
    """open_engine(template=..., max_context=..., generation=..., **Engine options) -> an engine over a fresh MockBackend."""
    def make(template=None, max_context=512, generation=None, **options):
        fields = {"template": template} if template is not None else {}
        folder = write_bundle(tmp_path / "bundle", max_context=max_context, generation=generation, **fields)
        backend = MockBackend(VOCAB)
        monkeypatch.setattr(runtime.engine, "open_backend", lambda *a, **k: (backend, ["mock runs nothing"]))
        return Engine(folder, **options)
    return make


@pytest.fixture
def engine(open_engine):
    return open_engine()
