"""The decode loop against brute force: every sequence on its own, token by token, from the oracle's logits."""

import numpy as np
import pytest
from mock_backend import MockBackend, logits_after

from runtime import decode
from runtime.sampling import Sampler, SamplingOptions

VOCAB = 97


def greedy(prompt, count, stop_tokens=()):
    tokens = list(prompt)
    for _ in range(count):
        token = int(logits_after(tokens, VOCAB).argmax())
        if token in stop_tokens:
            break
        tokens.append(token)
    return tokens[len(prompt):]


def prompts_of(*lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCAB, n) for n in lengths]


def sequence(prompt, new=8, stop_tokens=(), sample=0, **options):
    return decode.Sequence(prompt, Sampler(SamplingOptions(**options), prompt, sample), new, frozenset(stop_tokens))


def run(backend, sequences, samples=1, capacity=None):
    cache = backend.new_cache(len(sequences), capacity or decode.first_capacity(sequences))
    for _ in decode.run(backend, cache, sequences, samples):
        pass
    return [s.tokens for s in sequences]


@pytest.mark.parametrize("max_chunk_rows", [1, None])
def test_ragged_batch_gives_what_each_prompt_gives_alone(max_chunk_rows):
    prompts = prompts_of(1, 7, 30, 3)
    backend = MockBackend(VOCAB, max_chunk_rows)
    assert run(backend, [sequence(p) for p in prompts]) == [greedy(p, 8) for p in prompts]
    assert backend.calls[0] == (4, 30) and backend.calls[1:] == [(4, 1)] * 7


@pytest.mark.parametrize("max_chunk_rows", [1, None])
@pytest.mark.parametrize("lengths", [(1, 7, 30, 3), (64, 65, 3), (200, 5, 129, 64)])
def test_a_recurrent_model_is_given_chunks_and_told_what_is_padding(lengths, max_chunk_rows):
    prompts = prompts_of(*lengths)
    backend = MockBackend(VOCAB, max_chunk_rows, chunk=64)
    assert run(backend, [sequence(p, 8 + i) for i, p in enumerate(prompts)]) == [greedy(p, 8 + i) for i, p in enumerate(prompts)]
    assert max(tokens for _, tokens in backend.calls) <= 64
    whole = decode.logits(backend, prompts[0], len(prompts[0]) // 2)
    assert np.array_equal(whole, [logits_after(prompts[0][:n], VOCAB) for n in range(len(prompts[0]) // 2 + 1, len(prompts[0]) + 1)])
    samples = [sequence(p, 6, sample=j, temperature=1.0, seed=5) for j in range(2) for p in prompts]
    assert run(backend, samples, samples=2) == [run(MockBackend(VOCAB), [sequence(p, 6, sample=j, temperature=1.0, seed=5)])[0]
                                                for j in range(2) for p in prompts]


@pytest.mark.parametrize("lengths", [(1300,), (512,), (513,), (3, 1300, 5, 4), (600, 600)])
def test_long_prompts_go_in_chunks(lengths):
    prompts = prompts_of(*lengths)
    backend = MockBackend(VOCAB)
    assert run(backend, [sequence(p, 4) for p in prompts]) == [greedy(p, 4) for p in prompts]
    assert max(rows * tokens for rows, tokens in backend.calls) <= decode.PREFILL_TOKENS
    assert sum(rows * tokens for rows, tokens in backend.calls[:-3]) >= sum(lengths)


def test_prompts_on_top_of_a_filled_cache():
    first, second = prompts_of(20, 9), prompts_of(5, 8)
    for max_chunk_rows in (1, None):
        backend = MockBackend(VOCAB, max_chunk_rows)
        cache = backend.new_cache(2, 64)
        decode.prefill(backend, cache, first)
        cache.truncate(0, 13)
        logits = decode.prefill(backend, cache, second)
        for row, tokens in enumerate([[*first[0][:13], *second[0]], [*first[1], *second[1]]]):
            assert np.array_equal(logits[row], logits_after(tokens, VOCAB))
        assert cache.lengths.tolist() == [18, 17]


def test_logits_after_any_token_on_top_of_any_cache():
    tokens, = prompts_of(12)
    backend = MockBackend(VOCAB)
    whole = decode.logits(backend, tokens, 4)
    assert np.array_equal(whole, [logits_after(tokens[:n], VOCAB) for n in range(5, 13)])
    cache = backend.new_cache(1, 12)
    parts = [decode.logits(backend, tokens[start:end], 0, cache).copy() for start, end in ((0, 7), (7, 8), (8, 12))]
    assert np.array_equal(np.concatenate(parts)[4:], whole) and cache.lengths.tolist() == [12]


def test_samples_share_their_prompts_prefill():
    prompts = prompts_of(6, 11)
    backend = MockBackend(VOCAB)
    sequences = [sequence(p, 6, sample=j, temperature=1.0, seed=5) for j in range(3) for p in prompts]
    together = run(backend, sequences, samples=3)
    assert backend.calls[0] == (2, 11) and backend.calls[1:] == [(6, 1)] * 5
    alone = [run(MockBackend(VOCAB), [sequence(p, 6, sample=j, temperature=1.0, seed=5)])[0]
             for j in range(3) for p in prompts]
    assert together == alone
    assert len({tuple(t) for t in together}) == 6


def test_rows_that_finish_leave_the_batch():
    prompts = prompts_of(4, 9, 2, 6, 5)
    lengths = [3, 9, 1, 5, 9]
    backend = MockBackend(VOCAB)
    got = run(backend, [sequence(p, n) for p, n in zip(prompts, lengths)])
    assert got == [greedy(p, n) for p, n in zip(prompts, lengths)]
    assert [rows for rows, _ in backend.calls[1:]] == [4, 4, 3, 3, 2, 2, 2, 2]


def test_stop_tokens_and_lengths():
    prompt, = prompts_of(10)
    stop = greedy(prompt, 20)[6]
    s = sequence(prompt, 20, stop_tokens=[stop])
    assert run(MockBackend(VOCAB), [s]) == [greedy(prompt, 20, [stop])]
    assert s.finish_reason == "stop"
    s = sequence(prompt, 5)
    assert len(run(MockBackend(VOCAB), [s])[0]) == 5 and s.finish_reason == "length"


def test_the_consumer_may_end_a_sequence():
    prompts = prompts_of(3, 4)
    sequences = [sequence(p, 50) for p in prompts]
    backend = MockBackend(VOCAB)
    for s in decode.run(backend, backend.new_cache(2, 128), sequences):
        if len(s.tokens) >= (most := 4 if s is sequences[0] else 9):               # a lone one gains several at once
            del s.tokens[most:]
            s.finish_reason = "stop"
    assert [s.tokens for s in sequences] == [greedy(prompts[0], 4), greedy(prompts[1], 9)]


def test_the_cache_grows_when_a_reply_outlasts_it():
    prompts = prompts_of(3, 40)
    backend = MockBackend(VOCAB)
    assert run(backend, [sequence(p, 200) for p in prompts], capacity=64) == [greedy(p, 200) for p in prompts]
    long = sequence(prompts[0], 5000)
    assert decode.first_capacity([long]) == 320 and decode.last_capacity([long]) == 5056


def test_growth_stops_at_what_the_request_can_need():
    prompt, = prompts_of(60)
    backend, seen = MockBackend(VOCAB), []
    sequences = [sequence(prompt, 100)]
    cache = backend.new_cache(1, 64)
    for _ in decode.run(backend, cache, sequences):
        seen.append(cache.capacity)
    assert sorted(set(seen)) == [64, 128, 192] and decode.last_capacity(sequences) == 192


def test_logprobs_are_the_models_own():
    prompt, = prompts_of(5)
    s = sequence(prompt, 6, logprobs=3, temperature=0.7, seed=1, repetition_penalty=1.5)
    run(MockBackend(VOCAB), [s])
    tokens = list(prompt)
    for entry, token in zip(s.logprobs, s.tokens, strict=True):
        logits = logits_after(tokens, VOCAB).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum())
        assert entry.token == token and entry.logprob == pytest.approx(log_p[token], abs=1e-5)
        assert [i for i, _ in entry.top] == np.argsort(-log_p)[:3].tolist()
        assert [p for _, p in entry.top] == pytest.approx(np.sort(log_p)[::-1][:3], abs=1e-5)
        tokens.append(token)
