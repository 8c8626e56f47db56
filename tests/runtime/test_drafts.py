"""Drafts on real bundles of tiny models: files of n-grams and models as drafts, on the native core and on ONNX Runtime; and the core's
pass over a different number of tokens a row against its own steps."""

import itertools
import json
import shutil
import struct

import numpy as np
import pytest
from guesses import Everything, Sure, foresee

from export import draft as export_draft
from models import ngram
from models.ngram import load_ngram
from runtime import Engine, decode
from runtime.bundle import open_bundle
from runtime.errors import UserError
from runtime.native import library
from runtime.native.backend import NativeBackend
from runtime.sampling import Sampler, SamplingOptions
from runtime.speculation.draft_model import DraftModel, ModelGuesses
from runtime.speculation.drafter import Drafter
from runtime.speculation.ngrams import read_ngrams

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)
WORDS = ("the gull sat on the mast of the ship and the ship lay in the harbour of the town . a boy threw bread to the gull , and the gull "
         "took the bread and flew to the mast of the ship again . ").split(" ")


@pytest.fixture(scope="module")
def counted(tiny_bundle, tmp_path_factory):
    """(n-grams of a tokenizer's text, that bundle with a draft of them)."""
    checkpoint, bundle = tiny_bundle("smollm2", 4)
    folder = tmp_path_factory.mktemp("ngrams")
    rng = np.random.default_rng(0)
    text = " ".join(" ".join(WORDS[rng.integers(0, 20):]) for _ in range(60))
    (folder / "text.txt").write_text(text)
    (folder / "valid.txt").write_text(text[:2000])
    assert ngram.main(["--tokenizer", str(checkpoint), "--data", str(folder / "text.txt"), "--valid", str(folder / "valid.txt"), "--order",
                       "4", "-o", str(folder / "ngrams")]) == 0
    shutil.copytree(bundle, folder / "bundle")
    assert export_draft.main([str(folder / "bundle"), str(folder / "ngrams")]) == 0
    return folder / "ngrams", folder / "bundle", folder / "text.txt"


def test_a_file_of_ngrams_guesses_what_kneser_ney_finds_likeliest(counted):
    folder, path, text = counted
    bundle, model = open_bundle(path, verify=True), load_ngram(folder)
    assert bundle.manifest["draft"] == "draft.ngram" and bundle.manifest["lineage"][-1]["stage"] == "export.draft"
    with Engine(path) as engine:
        table = engine.speculation._table
        ids = engine.tokenizer.encode(text.read_text()[:6000]).tolist()
        rng, agreed, asked = np.random.default_rng(1), 0, 0
        for at in rng.integers(4, len(ids) - 1, 60).tolist():
            found, p = table.following(ids[:at]), model.next_token(ids[:at])
            if p.max() > 0.55:
                asked += 1
                agreed += found is not None and found[0] == int(p.argmax()) and abs(found[1] - p.max()) < 0.11
        assert asked > 20 and agreed == asked
        assert table.following([]) is None
        right = sum((found := table.following(ids[:at])) is not None and found[0] == ids[at] for at in range(3, 600))
        assert right > 300
    assert bundle.manifest["files"]["draft.ngram"]["bytes"] == (path / "draft.ngram").stat().st_size < 60_000


def test_adding_it_again_replaces_it_and_another_tokenizer_is_refused(counted, tiny_bundle, tmp_path, capsys):
    folder, path, _ = counted
    shutil.copytree(path, tmp_path / "bundle")
    assert export_draft.main([str(tmp_path / "bundle"), str(folder), "--least", "0.95"]) == 0
    assert (tmp_path / "bundle/draft.ngram").stat().st_size < (path / "draft.ngram").stat().st_size
    open_bundle(tmp_path / "bundle", verify=True)
    shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["special"] = not tokenizer["added_tokens"][0]["special"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert export_draft.main([str(path), str(tmp_path / "other")]) == 2
    assert "of another tokenizer" in capsys.readouterr().err


def test_files_that_are_no_ngrams_of_this_model_are_refused(counted, tmp_path):
    _, path, _ = counted
    bundle, data = open_bundle(path), (path / "draft.ngram").read_bytes()
    vocab, digest = bundle.model["config"]["vocab_size"], bundle.manifest["files"]["tokenizer.json"]["sha256"]
    file = tmp_path / "x.ngram"
    for changed, words in ((b"EWNGRAM9" + data[8:], "of this version"), (data[:-64], "cut short"), (data[:50], "cut short"),
                           (data[:9], "no file"),
                           (data[:8] + struct.pack("<I", vocab + 1) + data[12:], f"a vocabulary of {vocab + 1} tokens"),
                           (data[:12] + struct.pack("<I", 1 << 31) + data[16:], "cut short"),
                           (data[:16] + bytes(32) + data[48:], "another tokenizer")):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=words):
            read_ngrams(file, vocab, digest)
    scrambled = bytearray(data)
    rng = np.random.default_rng(0)
    for at in rng.integers(72, len(data), 4000):                      # whatever the tables say, what comes out is a token or nothing
        scrambled[at] = rng.integers(256)
    file.write_bytes(scrambled)
    table = read_ngrams(file, vocab, digest)
    for _ in range(3000):
        found = table.following(rng.integers(0, vocab, 5).tolist())
        assert found is None or 0 <= found[0] < vocab and 0 <= found[1] <= 1


PROMPT = "the gull sat on the mast of the ship and the gull sat on the mast of"


class OfTheDraft(Sure):
    """What a draft guesses is thought to hold, and nothing else."""

    def chance(self, kind):
        return super().chance(kind) if kind == "model" else 0.0


@pytest.mark.parametrize("provider", ["native", "cpu"])
@pytest.mark.parametrize("family", ["smollm2", "lfm2", "granite4_h"])
def test_replies_are_the_same_with_every_draft(tiny_bundle, family, provider):
    """Its own model as the draft: greedy and drawn with the same numbers, all that it guesses holds."""
    _, path = tiny_bundle(family)
    options = [dict(max_new_tokens=60), dict(max_new_tokens=60, temperature=1.0, seed=4),
               dict(max_new_tokens=60, temperature=0.9, top_k=9, seed=5), dict(max_new_tokens=50, repetition_penalty=1.3),
               dict(max_new_tokens=50, temperature=1.0, seed=1, logprobs=2)]
    with Engine(path, provider=provider, threads=1, speculate="off") as plain:
        expected = [plain.generate([PROMPT, PROMPT[:9], "ship"], **one, ignore_model_stop=True) for one in options]
    with Engine(path, provider=provider, threads=1, speculate=path) as engine:
        engine.speculation.pace, engine.speculation.odds = Everything(), Sure()
        for one, wanted in zip(options, expected):
            pending = [engine.submit(prompt, **one, ignore_model_stop=True) for prompt in (PROMPT, PROMPT[:9], "ship")]
            assert [p.result(60).tokens for p in pending] == [reply.tokens for reply in wanted]
            again = engine.generate([PROMPT, PROMPT[:9], "ship"], **one, ignore_model_stop=True)
            assert [reply.tokens for reply in again] == [reply.tokens for reply in wanted]
        engine.speculation.odds = OfTheDraft()
        alone = engine.submit(PROMPT, **options[1], ignore_model_stop=True)
        alone.result(60)
        drafter = alone.draft.sequence.drafter
        assert drafter.guessed > 30 and drafter.held > 0.9 * drafter.guessed


def test_a_draft_that_fails_ends_nobodys_reply(tiny_bundle, monkeypatch):
    _, path = tiny_bundle("smollm2", 4)
    with Engine(path, provider="native", speculate="off") as plain:
        expected = plain.generate(PROMPT, max_new_tokens=70, temperature=1.0, seed=2)[0].tokens
    with Engine(path, provider="native", speculate=path) as engine:
        engine.speculation.pace = Everything()
        draft, take, guesses = engine.speculation._draft.backend, ModelGuesses._take, itertools.count(1)

        def closed_at_the_second(source, count):
            if next(guesses) == 2:
                draft.close()
            return take(source, count)
        monkeypatch.setattr(ModelGuesses, "_take", closed_at_the_second)
        assert engine.generate(PROMPT, max_new_tokens=70, temperature=1.0, seed=2)[0].tokens == expected
        assert engine.speculation._draft.backend is None and next(guesses) == 3


def test_a_long_reply_outgrows_the_drafts_cache(tiny_bundle, monkeypatch):
    from runtime.speculation import draft_model
    monkeypatch.setattr(draft_model, "CAPACITY", 96)
    for family in ("smollm2", "lfm2"):
        _, path = tiny_bundle(family)
        bundle = open_bundle(path)
        backend = NativeBackend(bundle, threads=1)
        prompt = np.arange(90) % 50 + 5
        plain = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), 160)
        list(decode.run(backend, backend.new_cache(1, 256), [plain]))
        sequence = decode.Sequence(prompt, Sampler(SamplingOptions(), prompt), 160)
        model = DraftModel(backend, bundle.max_context)
        sequence.drafter = Drafter([model.source(sequence.sampler, 160)], Sure(), Everything(), prompt)
        list(decode.run(backend, backend.new_cache(1, 256), [sequence]))
        assert sequence.tokens == plain.tokens and sequence.drafter.held > 20 and model.backend is not None


@pytest.mark.parametrize("family", ["smollm2", "lfm2", "granite4_h", "gemma3"])
def test_the_core_checks_rows_as_it_steps_them_to_the_bit(tiny_bundle, family):
    """Rows of different lengths take different numbers of tokens; what is found is what steps of one token find."""
    _, path = tiny_bundle(family)
    backend, rng = NativeBackend(open_bundle(path), threads=2), np.random.default_rng(0)
    kinds = [dict(), dict(temperature=1.0, top_k=7), dict(temperature=1.0), dict(repetition_penalty=1.2), dict(suppress_tokens=[3, 4])]
    caches = [backend.new_cache(6, 64).view(1, 6) for _ in range(2)]
    prompts = [rng.integers(5, 300, n) for n in (3, 17, 30, 1, 9)]
    for cache in caches:
        for row, prompt in enumerate(prompts):
            decode.prefill(backend, cache.view(row, row + 1), [prompt])
    samplers = [Sampler(SamplingOptions(**one), prompt) for one, prompt in zip(kinds, prompts)]
    for _ in range(3):
        feeds = [rng.integers(5, 300, n).tolist() for n in rng.integers(1, 8, 5)]
        firsts = [int(rng.integers(0, len(feed))) for feed in feeds]
        found = backend.check_rows(caches[0], feeds, firsts, samplers)
        for row, (feed, first) in enumerate(zip(feeds, firsts)):
            assert len(found[row]) == len(feed) - first
            for place, token in enumerate(feed):
                stepped = decode.step(backend, caches[1].view(row, row + 1), np.array([token]))[0]
                if place < first:
                    continue
                one = found[row][place - first]
                if isinstance(one, tuple):
                    assert len(one[0]) == samplers[row].candidates
                    order = np.lexsort((np.arange(len(stepped)), -stepped))[:len(one[0])]
                    assert np.array_equal(one[0], order) and np.array_equal(one[1], stepped[order])
                else:
                    assert np.array_equal(one, stepped)
        assert np.array_equal(caches[0].lengths, caches[1].lengths)
    if not backend.state_floats:
        with pytest.raises(UserError, match="outside the cache"):
            while True:
                before = caches[0].lengths.copy()
                backend.check_rows(caches[0], [[5] * 6] * 5, [0] * 5, samplers)
        assert 58 < before.max() <= 64 and np.array_equal(caches[0].lengths, before)


def test_grammars_mask_what_is_guessed(tiny_bundle):
    pytest.importorskip("llguidance")
    from runtime.structured import constraint_for
    _, path = tiny_bundle("smollm2", 4)
    schema = {"type": "object", "properties": {"name": {"enum": ["gull", "ship"]}, "mast": {"type": "integer", "maximum": 99}},
              "required": ["name", "mast"], "additionalProperties": False}
    with Engine(path, provider="native", speculate="auto") as engine:
        speculation, engine.speculation = engine.speculation, None
        expected = engine.submit(PROMPT, constraint=constraint_for(engine, "json_schema", schema), max_new_tokens=80).result(60)
        engine.speculation = speculation
        constraint = constraint_for(engine, "json_schema", schema)
        fits = constraint.fits(expected.tokens)
        assert fits == len(expected.tokens) and constraint.fits([*expected.tokens[:3], 5, 5]) in (3, 4)
        pending = engine._draft(engine.tokenizer.encode(PROMPT), engine._options({"max_new_tokens": 80}), 0, None, constraint)
        foresee([pending.sequence], [expected.tokens], 300, 0.8)
        cache = engine.backend.new_cache(1, 256)
        list(decode.run(engine.backend, cache, [pending.sequence]))
        assert pending.sequence.tokens == expected.tokens and pending.sequence.drafter.held > 0


def test_the_benchmark_tells_what_guesses_gain(tiny_bundle, tmp_path, capsys, monkeypatch):
    from runtime import bench
    from runtime.benching import guessing
    _, path = tiny_bundle("smollm2", 4)
    monkeypatch.setattr(guessing, "PROMPTS", {"edit": (PROMPT, "a ship"), "chat": ("gull",)})
    assert bench.main([str(path), "--speculate", "on", "--provider", "native", "--repeat", "2", "--new-tokens", "24", "--json",
                       str(tmp_path / "x.json")]) == 0
    told = capsys.readouterr().out
    assert "edit_tokens_per_s" in told and "edit_least_ratio" in told and "chat_tokens_a_pass" in told
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["different_replies"] == 0 and len(found["samples"]["edit_tokens_per_s"]) == 2
    assert bench.main([str(path), str(path), "--speculate", "on"]) == 2
    assert "one bundle at a time" in capsys.readouterr().err
