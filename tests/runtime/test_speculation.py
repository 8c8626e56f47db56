"""Guesses change no reply: over the mock backend, whose logits are a hash of the whole sequence, so that a guess that is left in the
cache, or lost from it, changes all that follows."""

import functools
import json

import mock_backend
import numpy as np
import pytest
from guesses import Everything, Sure, foresee
from make_bundle import VOCAB as BYTES
from make_bundle import write_bundle, write_manifest
from mock_backend import MockBackend, logits_after
from scipy.stats import chisquare

import runtime.engine
from runtime import Engine, decode
from runtime.errors import UserError
from runtime.sampling import Sampler, SamplingOptions
from runtime.speculation.drafter import Drafter
from runtime.speculation.matches import LEAST, TOKENS_LOST, TRUSTED, Matches
from runtime.speculation.odds import Odds

VOCAB = 97
KINDS = [dict(), dict(temperature=1.0, seed=3), dict(temperature=0.8, top_k=12, seed=1), dict(temperature=1.3, top_p=0.7, seed=2),
         dict(temperature=1.0, min_p=0.05, seed=4), dict(repetition_penalty=1.4), dict(temperature=0.9, frequency_penalty=0.6, seed=5),
         dict(temperature=1.0, seed=6, logprobs=3), dict(logit_bias={4: 5.0}, suppress_tokens=[9])]


class Turns:
    """A constraint: an even token, then an odd one, and so on; done after `length`."""

    def __init__(self, length):
        self.length, self.heard = length, []

    @property
    def done(self):
        return len(self.heard) >= self.length

    def mask(self, allowed):
        bits = np.zeros(32 * len(allowed), np.uint8)
        bits[len(self.heard) % 2::2] = 1
        allowed[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token):
        assert token % 2 == len(self.heard) % 2, "the guess was not masked"
        self.heard.append(token)

    def fits(self, tokens):
        return next((i for i, token in enumerate(tokens) if token % 2 != (len(self.heard) + i) % 2), len(tokens))


def sequences(count, samples=1, new=30, constrained=False, **options):
    rng = np.random.default_rng(count)
    prompts = [rng.integers(0, VOCAB, 3 + 9 * i) for i in range(count)]
    return [decode.Sequence(prompt, Sampler(SamplingOptions(**options), prompt, j, Turns(17 + i) if constrained else None), new + 7 * i,
                            frozenset([5, 6])) for j in range(samples) for i, prompt in enumerate(prompts)]


def run(backend, some, samples=1, capacity=None):
    cache = backend.new_cache(len(some), capacity or decode.first_capacity(some))
    seen = {}
    for sequence in decode.run(backend, cache, some, samples):
        assert len(sequence.tokens) >= seen.get(sequence, 0)
        seen[sequence] = len(sequence.tokens)
    return [(one.tokens, one.finish_reason, one.logprobs) for one in some]


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("max_chunk_rows", [1, None])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_replies_are_those_without_guesses(options, max_chunk_rows, chunk):
    held = failed = 0
    for count, samples, constrained in ((1, 1, False), (4, 1, False), (2, 3, False), (1, 1, True), (3, 1, True)):
        plain, backend = sequences(count, samples, constrained=constrained, **options), MockBackend(VOCAB, max_chunk_rows, chunk=chunk)
        expected = run(MockBackend(VOCAB, max_chunk_rows, chunk=chunk), plain, samples)
        some = foresee(sequences(count, samples, constrained=constrained, **options), [one.tokens for one in plain], VOCAB)
        assert run(backend, some, samples) == expected
        held, failed = held + sum(one.drafter.held for one in some), failed + sum(one.drafter.guessed - one.drafter.held for one in some)
    assert held > 0 and failed > 0


@pytest.mark.parametrize("right", [1.0, 0.0])
def test_a_pass_brings_what_was_guessed_right(right):
    plain = sequences(1, new=46)
    plain[0].stop_tokens = frozenset()
    (reply, *_), = run(MockBackend(VOCAB), plain)
    some, backend = foresee(sequences(1, new=46), [reply], VOCAB, right), MockBackend(VOCAB)
    some[0].stop_tokens = frozenset()
    run(backend, some)
    drafter = some[0].drafter
    assert drafter.held == (drafter.guessed if right else 0) and drafter.guessed > 20
    assert len(backend.calls) - 1 == drafter.passes == 45 - drafter.held      # one more than the guesses that held, each
    assert max(tokens for _, tokens in backend.calls[1:]) <= 9


def test_nothing_is_written_beyond_the_cache_and_no_more_tokens_come_than_asked(monkeypatch):
    """The mock refuses what goes beyond its capacity; here rows of different lengths fill theirs to the last slot."""
    for capacity in (40, 64):
        plain = sequences(2, new=12)
        lengths = [len(one.prompt) for one in plain]
        expected = run(MockBackend(VOCAB, None), plain)
        for one in (some := foresee(sequences(2, new=12), [one.tokens for one in plain], VOCAB, 1.0)):
            one.max_new_tokens = 12 if one.prompt.size == lengths[0] else 19
        assert run(MockBackend(VOCAB, None), some, capacity=capacity) == expected
        assert [len(one.tokens) <= one.max_new_tokens for one in some] == [True, True]


def test_samples_have_the_distribution_of_the_model(monkeypatch):
    """Pairs of tokens of 10,000 replies, with guesses that hold by chance alone, against the products of the model's probabilities."""
    vocab, prompt, temperature = 5, np.array([1, 2, 1, 2, 1, 2]), 1.2

    class Constant:
        seconds = 0.0

        def look(self, matches, most):
            return ["constant"] * min(most, 2)

        def take(self, count):
            return [2, 4][:count]

    def probabilities(tokens):
        weights = np.exp(logits_after(tokens, vocab, 1.0).astype(np.float64) / temperature)
        return weights / weights.sum()

    class Small(MockBackend):
        def forward(self, *arguments):
            return super().forward(*arguments) / 3

    known = functools.cache(lambda tokens, vocab: logits_after(tokens, vocab))      # few sequences, and a hash of each takes its time
    monkeypatch.setattr(mock_backend, "logits_after", lambda tokens, vocab: known(tuple(tokens), vocab))
    backend, counts, held, pace = Small(vocab), np.zeros((vocab, vocab, vocab)), 0, Everything()
    cache = backend.new_cache(1, 64)
    decode.prefill(backend, cache, [prompt])
    for seed in range(10_000):
        sequence = decode.Sequence(prompt, Sampler(SamplingOptions(temperature=temperature, seed=seed), prompt), 4)
        sequence.drafter = Drafter([Constant()], Sure(), pace, prompt)
        sequence.drafter._odds = Sure()
        sequence.tokens.append(3)                # after the prompt, the same in all
        while len(sequence.tokens) < 4:
            assert decode.advance(backend, cache, [sequence]) == [None]
        counts[tuple(sequence.tokens[1:4])] += 1
        held += sequence.drafter.held
        cache.truncate(0, len(prompt))
    expected = np.zeros_like(counts)
    for first, a in enumerate(probabilities([*prompt, 3])):
        for second, b in enumerate(probabilities([*prompt, 3, first])):
            expected[first, second] = a * b * probabilities([*prompt, 3, first, second])
    assert held > 1000
    assert chisquare(counts.ravel(), expected.ravel() * 10_000).pvalue > 0.001
    assert chisquare(counts.ravel(), np.roll(expected, 1, 0).ravel() * 10_000).pvalue < 1e-6          # which the test would notice


def test_matches_are_what_followed_before():
    rng = np.random.default_rng(0)
    for letters, size in ((2, 60), (4, 200), (20, 200), (300, 100)):
        text = rng.integers(0, letters, size).tolist()
        text += text[5:30] + rng.integers(0, letters, 3).tolist() + text[:20]
        for begun in (0, 1, size // 2):
            matches = Matches(text[:begun])
            for at in range(begun, len(text)):
                matches.extend(text[at:at + 1])
                so_far, n = text[:at + 1], matches.length
                before = [i for i in range(LEAST, at + 1) if so_far[i - LEAST:i] == so_far[-LEAST:]] if at + 1 >= LEAST else []
                if matches.skipped is not None and n < LEAST:              # a copy taken up again: no pair is known
                    assert not before and matches.follow(0) == []
                    continue
                assert matches.skipped is not None or bool(n) == bool(before) and not matches.follow(0)
                if not n:
                    assert matches.follow(3) == []
                    continue
                ends = [i for i in before if so_far[max(0, i - n):i] == so_far[-n:]]        # places with the same n tokens before
                guesses = []
                for i in ends:
                    copy = list(so_far)
                    for j in range(7):
                        copy.append(copy[i + j])
                    guesses.append(copy[-7:])
                assert matches.follow(7) in guesses
                assert n >= LEAST
    repeated = Matches([7, 8, 9] * 4)
    assert repeated.follow(8) == [7, 8, 9, 7, 8, 9, 7, 8]
    assert Matches([1, 2, 3, 9, 1, 2]).follow(2) == [3, 9]


def test_a_copy_with_changes_is_taken_up_again():
    """A word replaced, some left out, one put in: a single token that the copied text goes on with is enough."""
    source = list(range(100, 200))

    def after(tokens, begin=source[:TRUSTED]):
        matches = Matches(source)
        for token in [*begin, *tokens]:
            matches.extend([token])
        return matches.skipped, matches.follow(3)

    assert TRUSTED == 6 and after([]) == (None, source[6:9])
    assert after([7]) == (None, [])                            # another word: where it ends is not known yet
    assert after([7, source[7]]) == (1, source[8:11])          # one for one
    assert after([7, 8, source[6]]) == (0, source[7:10])       # put in
    assert after([source[40]]) == (34, source[41:44])          # left out
    assert after([7, *source[7:7 + TRUSTED]]) == (None, source[7 + TRUSTED:10 + TRUSTED])               # a match like any other
    assert after([7, source[7], 9, source[20]]) == (12, source[21:24])              # changed again
    assert after([source[80]]) == (None, [])                   # too far
    assert after([7] * TOKENS_LOST + [source[7]])[0] is None   # too late (and repeating itself)
    assert after([7], source[:4]) == (None, []) and after([7, source[5]], source[:4]) == (None, [])     # four tokens are no copy


def test_odds_follow_what_was_seen():
    whole = Odds()
    own = Odds(whole)
    assert own.chance("a") == 0.5
    for _ in range(40):
        own.saw("a", True)
    assert own.chance("a") > 0.95 and own.chance("b") == 0.5
    assert Odds(whole).chance("a") > 0.9                       # the next reply begins with it
    for _ in range(8):
        own.saw("a", False)
    assert own.chance("a") < 0.75


@pytest.fixture(params=["plain", "recurrent"])
def engines(request, tmp_path, monkeypatch):
    """Two on a backend each: one that guesses, and one that does not."""
    made = []

    def opened(*_, **__):
        made.append(MockBackend(BYTES, None, chunk=64 if request.param == "recurrent" else None))
        return made[-1], ["mock runs nothing"]
    monkeypatch.setattr(runtime.engine, "open_backend", opened)
    folder = write_bundle(tmp_path / "bundle", max_context=2048)
    with Engine(folder, speculate="on") as guessing, Engine(folder, speculate="off") as plain:
        guessing.speculation.pace = Everything()
        yield guessing, plain


def requests():
    rng = np.random.default_rng(0)
    for i in range(24):
        yield ("ab" * 20 + str(i) * int(rng.integers(1, 30)),
               dict(max_new_tokens=int(rng.integers(1, 50)), temperature=[0, 1.1][i % 2], seed=i, logprobs=[None, 2][i // 2 % 2],
                    stop=[(), ("e", "zz")][i // 4 % 2]))


def told(reply):
    return reply.text, reply.tokens, reply.finish_reason, reply.logprobs


def test_through_the_scheduler_rows_that_guess_run_beside_rows_that_do_not(engines):
    guessing, plain = engines
    guessing.serve_with(rows=5)
    some = list(requests())
    expected = [told(plain.generate(prompt, **options)[0]) for prompt, options in some]

    draft = guessing._draft

    def every_other(ids, options, *more):
        made = draft(ids, options, *more)
        number = options.seed
        known = expected[number][1]
        if number % 3:
            foresee([made.sequence], [known], BYTES, 0.8, guessing.speculation.pace)
        else:
            made.sequence.drafter = None
        return made
    guessing._draft = every_other
    pending = [guessing.submit(prompt, **options) for prompt, options in some]
    assert [told(one.result(30)) for one in pending] == expected
    stats = guessing.scheduler.stats()
    assert stats.finished == 24 and stats.new_tokens == sum(len(tokens) for _, tokens, *_ in expected)
    assert stats.guessed_tokens > stats.held_tokens > 10
    again = guessing.submit(some[0][0], **some[0][1])          # from what the prefixes have kept, which a guess must not have touched
    assert told(again.result(30)) == expected[0]
    for prompt, options in some[:6]:
        follow_up = prompt + expected[int(options["seed"])][0]
        assert told(guessing.submit(follow_up, **options).result(30)) == told(plain.generate(follow_up, **options)[0])


def test_streams_batches_samples_and_cancelling(engines):
    guessing, plain = engines
    for prompt, options in list(requests())[:8]:
        assert told(guessing.generate(prompt, **options)[0]) == told(plain.generate(prompt, **options)[0])
        stream = guessing.stream(prompt, **options)
        assert "".join(stream) == stream.reply.text == plain.generate(prompt, **options)[0].text
    prompts = ["abcabcabc", "hello hello hel", "z"]
    several = [told(reply) for reply in guessing.generate(prompts, n=3, temperature=1.0, seed=9, max_new_tokens=25)]
    assert several == [told(reply) for reply in plain.generate(prompts, n=3, temperature=1.0, seed=9, max_new_tokens=25)]
    pending = guessing.submit("abababab", max_new_tokens=1500)
    first = pending.next_piece(10)
    pending.cancel()
    list(iter(lambda: pending.next_piece(10), None))
    whole = plain.generate("abababab", max_new_tokens=1500)[0].tokens
    assert first is not None and pending.reply.tokens == whole[:len(pending.reply.tokens)]


def test_what_is_no_draft_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.engine, "open_backend", lambda *a, **k: (MockBackend(BYTES), ["mock runs nothing"]))
    folder = write_bundle(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no n-grams")
    (tmp_path / "nothing").write_bytes(b"")
    other = write_bundle(tmp_path / "other")
    manifest = (other / "manifest.json").read_text()
    for name, change, words in (("vocab", ('"vocab_size": 259', '"vocab_size": 300'), "vocabulary has 300 tokens"),
                                ("version", ('"version": 1', '"version": 99'), "bundle version 99")):
        (other / "manifest.json").write_text(manifest.replace(*change))
        with pytest.raises(UserError, match=words):
            Engine(folder, speculate=other)
    (other / "manifest.json").write_text(manifest)
    text = (other / "tokenizer.json").read_text() + " "
    (other / "tokenizer.json").write_text(text)
    (other / "manifest.json").unlink()
    write_manifest(other, {key: value for key, value in json.loads(manifest).items() if key != "files"})
    with pytest.raises(UserError, match="tokenizer is not that of"):
        Engine(folder, speculate=other)
    for value, words in ((tmp_path / "missing", "no such file or folder"), (tmp_path / "empty", "is no bundle"), (True, "must be"),
                         ("", "must be"), (tmp_path / "text", "no file of n-grams"), (tmp_path / "nothing", "cannot be read")):
        with pytest.raises(UserError, match=words):
            Engine(folder, speculate=value)


def test_a_draft_in_the_way_of_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.engine, "open_backend", lambda *a, **k: (MockBackend(BYTES), ["mock runs nothing"]))
    folder = write_bundle(tmp_path / "bundle")
    speculation = Engine(folder, speculate=folder).speculation
    assert speculation.draft_bytes == 256 and speculation.cache_bytes(3) == 3 * 512 * 100
    with pytest.raises(UserError, match="those of the draft take more than max_memory_mb"):
        Engine(folder, speculate=folder, max_memory_mb=300 / 2**20)
