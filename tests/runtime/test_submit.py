"""Requests together on real backends: the replies are those given alone, kept prefixes and their file included."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cuda_double import cuda_is_there

import export.onnx
import export.ort
from runtime import Engine, decode
from runtime.backend import BLOCK
from runtime.errors import UserError

FAMILIES = ("smollm2", "gemma3", "gemma4", "lfm2", "qwen3_5", "granite4_h")          # attention, windows, shared caches, three kinds of states
TEXT = "Once upon a time there was a small machine that could read and write, and it wrote of the sea. " * 4


CASES = [(family, provider) for family in FAMILIES for provider in ("native", "cpu")] + [("smollm2", "cuda"), ("gemma3", "cuda"), ("lfm2", "cuda")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def engine(request, tiny_checkpoint, tmp_path_factory):
    family, provider = request.param
    bundle, dtype = tmp_path_factory.mktemp(family) / "bundle", "fp16" if provider == "cuda" else "fp32"
    assert export.onnx.main([str(tiny_checkpoint(family)), "-o", str(bundle), "--dtype", dtype]) == 0 == export.ort.main([str(bundle)])
    with cuda_is_there(), Engine(bundle, provider=provider, threads=1) as engine:
        yield engine


def test_replies_are_those_given_alone_and_kept_prefixes_change_nothing(engine, tmp_path):
    ids = engine.tokenizer.encode(TEXT)
    assert len(ids) > 140
    prompts = [ids[:150], ids[:140], np.concatenate([ids[:130], ids[5:20]]), ids[20:60], ids[:3]]
    alone = [engine.generate(list(map(int, prompt)), max_new_tokens=20, temperature=0, ignore_model_stop=True)[0].tokens for prompt in prompts]
    for turn in range(2):
        pending = [engine.submit(prompt, max_new_tokens=20, temperature=0, ignore_model_stop=True) for prompt in prompts]
        assert [one.result(60).tokens for one in pending] == alone
        assert turn == 0 or [one.cached_tokens > 100 for one in pending[:3]] == 3 * [True]
    # the whole turn of a chat, then on with it
    whole = [*map(int, prompts[0]), *alone[0]]
    again = engine.submit(whole, max_new_tokens=5, temperature=0, ignore_model_stop=True)
    assert again.result(60).tokens == engine.generate(whole, max_new_tokens=5, temperature=0, ignore_model_stop=True)[0].tokens

    kept = engine.scheduler.save(tmp_path / "kept", "this")
    engine.scheduler.forget()
    assert engine.scheduler.stats().prefix_bytes == 0 and engine.scheduler.load(tmp_path / "kept", "this") == kept > 150
    one = engine.submit(prompts[0], max_new_tokens=20, temperature=0, ignore_model_stop=True)
    assert one.result(60).tokens == alone[0] and one.cached_tokens > 100


def test_a_file_of_another_model_or_a_damaged_one_is_refused(engine, tmp_path):
    engine.submit(engine.tokenizer.encode(TEXT)[:150], max_new_tokens=1).result(60)
    engine.scheduler.save(tmp_path / "kept", "this")
    with pytest.raises(UserError, match="kept by this on .*, and this is that on "):
        engine.scheduler.load(tmp_path / "kept", "that")
    engine.scheduler.forget()
    data, rng = (tmp_path / "kept").read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for case in range(60):
        damaged = bytearray(data)
        if case < 20:
            damaged = damaged[:rng.integers(len(data) - 1)]
        else:
            damaged[rng.integers(header)] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:                                                      # some bytes say nothing, such as a name of a key's spaces
            engine.scheduler.load(tmp_path / "damaged", "this")
        except UserError as error:
            assert str(tmp_path / "damaged") in str(error)
    with pytest.raises(UserError, match="No such file"):
        engine.scheduler.load(tmp_path / "none", "this")
    engine.scheduler.forget()


def test_slots_go_out_and_come_back(engine):
    """Of every backend's cache: what is read of a row and written to another one gives the same logits there."""
    backend, ids = engine.backend, engine.tokenizer.encode(TEXT)[:48]
    cache = backend.new_cache(3, 96)
    for start in range(0, 48, 24):
        decode.prefill(backend, cache.view(1, 2), [ids[start:start + 24]])
    expected = decode.step(backend, cache.view(1, 2), np.array([7])).copy()
    cache.truncate(1, 48)
    other = backend.new_cache(2, 64)
    for start in range(0, 48, BLOCK):
        other.write(1, start, start + BLOCK, cache.read(1, start, start + BLOCK))
    other.lengths[1] = 48
    other.restore(1, cache.snapshot(1))
    assert np.array_equal(decode.step(backend, other.view(1, 2), np.array([7])), expected)


def test_a_process_ends_with_requests_running(engine):
    script = ("import sys; from runtime import Engine; engine = Engine(sys.argv[1], provider=sys.argv[2], threads=1); "
              "p = engine.submit('Once upon', max_new_tokens=200, ignore_model_stop=True); print(len(p.next_piece(30).tokens) > 0)")
    provider = "native" if engine.backend.name == "native" else "cpu"
    done = subprocess.run([sys.executable, "-c", script, str(engine.bundle.folder), provider], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
