"""Sampling against a straightforward float64 reference, `transformers`' own processors, and a chi-square test."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, SuppressTokensAtBeginLogitsProcessor, SuppressTokensLogitsProcessor

from runtime import Engine
from runtime.errors import UserError
from runtime.sampling import Sampler, SamplingOptions, check_defaults, largest, token_logprobs

VOCAB = 1000
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_p": 0.999},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.1, "frequency_penalty": 0.4, "presence_penalty": 0.6},
    {"temperature": 1.0, "top_p": 0.7, "repetition_penalty": 1.2, "frequency_penalty": -0.3,
     "logit_bias": {3: 5.0, 7: -math.inf, 11: -2.5}},
]
PROMPT = np.array([1, 5, 5, 9, 200])
REPLY = [5, 17, 17, 3]


def logits_of(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab) * 2.5).astype(np.float32)


def reference(logits, options: SamplingOptions, prompt, reply) -> np.ndarray:
    """Probabilities in float64, over the whole vocabulary, one rule after another as the definitions say."""
    x = logits.astype(np.float64)
    for token, bias in options.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(reply):
        x[token] = x[token] / options.repetition_penalty if x[token] > 0 else x[token] * options.repetition_penalty
    for token in set(reply):
        x[token] -= options.presence_penalty + options.frequency_penalty * reply.count(token)
    if options.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    p = np.exp((x - x.max()) / options.temperature)
    order = np.argsort(-p, kind="stable")
    if options.top_k:
        p[order[options.top_k:]] = 0
    p /= p.sum()
    if options.top_p < 1:
        before = np.cumsum(p[order]) - p[order]             # mass of the likelier ones
        p[order[before >= options.top_p]] = 0
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


def sampler_after(options, prompt, reply, sample=0):
    """A sampler that has chosen `reply` so far."""
    sampler = Sampler(options, prompt, sample)
    sampler._random = type("Fixed", (), {"random": staticmethod(lambda: 0.5)})()
    for token in reply:
        forced = np.full(VOCAB, -1e4, np.float32)
        forced[token] = 1e4
        assert sampler.choose(forced) == token
    return sampler


def distribution(sampler, logits, grid=1009) -> np.ndarray:
    """Share of an even grid of uniform numbers that lands on each token: the sampler's distribution, without chance."""
    counts = np.zeros(len(logits))
    for u in (np.arange(grid) + 0.5) / grid:
        sampler._random = type("Fixed", (), {"random": staticmethod(lambda: u)})()
        before = None if sampler._counts is None else (sampler._counts.copy(), sampler._seen.copy())
        counts[sampler.choose(logits)] += 1
        if before:
            sampler._counts[:], sampler._seen[:] = before
    return counts / grid


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_is_the_references(settings):
    options = SamplingOptions(**settings)
    logits = logits_of(1)
    got = distribution(sampler_after(options, PROMPT, REPLY), logits)
    want = reference(logits, options, PROMPT.tolist(), REPLY)
    assert np.abs(got - want).max() <= 1.01 / 1009          # each token's share, to one point of the grid
    assert not got[want == 0].any()


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s], ids=str)
def test_chi_square(settings):
    options = SamplingOptions(**settings, seed=11)
    logits = logits_of(2)
    want = reference(logits, options, PROMPT.tolist(), [])
    counts = np.zeros(VOCAB)
    if options.frequency_penalty or options.presence_penalty or options.repetition_penalty != 1:
        for sample in range(2500):                          # the choice changes what comes next: one each
            counts[Sampler(options, PROMPT, sample).choose(logits)] += 1
    else:
        sampler = Sampler(options, PROMPT)
        for _ in range(2500):
            counts[sampler.choose(logits)] += 1
    assert not counts[want == 0].any()
    order = np.argsort(-want)
    likely = order[want[order] * counts.sum() >= 5]
    observed = np.append(counts[likely], counts.sum() - counts[likely].sum())
    expected = np.append(want[likely], 1 - want[likely].sum()) * counts.sum()
    kept = expected > 1e-6
    assert stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue > 1e-3


@pytest.mark.parametrize("settings", [s for s in SETTINGS[1:8]], ids=str)
def test_distribution_is_the_one_of_transformers(settings):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf
    warpers = {"temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper, "top_p": hf.TopPLogitsWarper,
               "min_p": hf.MinPLogitsWarper}
    for seed in range(5):
        logits = logits_of(100 + seed)
        scores = torch.from_numpy(logits.copy())[None]
        for name, warper in warpers.items():
            if name in settings:
                scores = warper(settings[name])(None, scores)
        want = torch.softmax(scores.double(), -1)[0].numpy()
        got = reference(logits, SamplingOptions(**settings), [], [])
        assert np.abs(got - want).max() < 1e-6


def test_repetition_penalty_is_the_one_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    logits = logits_of(3)
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(PROMPT)[None], torch.from_numpy(logits.copy())[None])
    sampler = Sampler(SamplingOptions(repetition_penalty=1.7), PROMPT)
    assert np.allclose(sampler._adjust(logits), want[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 49152])
def test_largest_is_a_full_sort(vocab):
    rng = np.random.default_rng(vocab)
    for logits in (rng.normal(size=vocab), rng.integers(0, 5, vocab), np.zeros(vocab)):
        logits = logits.astype(np.float32)
        for count in {1, 2, 40, vocab // 64, vocab // 64 + 1, vocab // 2, vocab, vocab + 5} - {0}:
            assert np.array_equal(largest(logits, count), np.argsort(-logits, kind="stable")[:count])


def test_greedy_takes_the_first_of_equals_and_copies_nothing():
    logits = np.zeros(VOCAB, np.float32)
    logits[[30, 40]] = 2
    logits.flags.writeable = False                          # the backend's own buffer
    assert Sampler(SamplingOptions(), PROMPT).choose(logits) == 30
    for settings in SETTINGS:
        Sampler(SamplingOptions(**settings, seed=0), PROMPT).choose(logits)


def test_a_seed_repeats_and_samples_differ():
    options = SamplingOptions(temperature=1.0, seed=42)
    run = lambda sampler: [sampler.choose(logits_of(i)) for i in range(30)]
    assert run(Sampler(options, PROMPT)) == run(Sampler(options, PROMPT))
    assert run(Sampler(options, PROMPT, 0)) != run(Sampler(options, PROMPT, 1))
    assert run(Sampler(SamplingOptions(temperature=1.0, seed=43), PROMPT)) != run(Sampler(options, PROMPT))
    unseeded = SamplingOptions(temperature=1.0)
    assert run(Sampler(unseeded, PROMPT)) != run(Sampler(unseeded, PROMPT))


def test_seeds_mean_the_same_on_every_version():
    """Python promises `Random(text).random()` for all time; these are its numbers for seed 7, sample 0."""
    p = np.exp(logits_of(4).astype(np.float64))
    cumulative = np.cumsum(p / p.sum())
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=7), PROMPT)
    for uniform in (0.7059339087777089, 0.6168329049611778, 0.12390622454312017):
        assert sampler.choose(logits_of(4)) == np.searchsorted(cumulative, uniform)


def test_extreme_temperatures():
    logits = logits_of(4)
    assert Sampler(SamplingOptions(temperature=1e-30, seed=1), PROMPT).choose(logits) == logits.argmax()
    assert Sampler(SamplingOptions(temperature=1e-3, seed=1), PROMPT).choose(logits) == logits.argmax()
    flat = Sampler(SamplingOptions(temperature=1e30, seed=1), PROMPT)
    assert len({flat.choose(logits) for _ in range(300)}) > 200
    for settings in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        Sampler(SamplingOptions(temperature=1e-4, seed=1, **settings), PROMPT).choose(logits)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(bad):
    logits = logits_of(5)
    logits[77] = bad
    for settings in SETTINGS[:3]:
        with pytest.raises(UserError, match="logit"):
            Sampler(SamplingOptions(**settings), PROMPT).choose(logits)


def test_forbidden_logits_are_never_chosen():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[8, 900]] = 1.0, 1.5
    for settings in SETTINGS[:8]:
        sampler = Sampler(SamplingOptions(**settings, seed=3), PROMPT)
        assert {sampler.choose(logits) for _ in range(100)} <= {8, 900}


def test_suppressed_tokens_are_those_of_transformers():
    """Against its processors, through both ways to choose: from all logits, and from the largest of a backend's own loop."""
    never, first = [17, 5, 400, 17], [12, 3]
    for seed in range(20):
        logits = logits_of(seed)
        top = np.argsort(-logits, kind="stable")
        never[1], first[1] = int(top[0]), int(top[1])              # what would be chosen is among them
        sampler = Sampler(SamplingOptions(suppress_tokens=never, begin_suppress_tokens=first), PROMPT)
        for length, begun in ((0, False), (1, True)):
            scores = SuppressTokensLogitsProcessor(never)(None, torch.from_numpy(logits)[None])
            scores = SuppressTokensAtBeginLogitsProcessor(first, len(PROMPT))(torch.zeros(1, len(PROMPT) + length), scores)
            assert sampler.candidates == (4 if begun else 0)       # a reply's first token is chosen from all logits
            assert sampler.choose(logits) == int(scores.argmax())
        assert sampler.choose_among(top[:4], logits[top[:4]]) == int(top[1])
    options = SamplingOptions(temperature=1.0, top_k=5, seed=3, suppress_tokens=(int(top[0]), int(top[3])))
    one, other = Sampler(options, PROMPT), Sampler(options, PROMPT)
    found = [one.choose(logits) for _ in range(200)]
    assert found == [other.choose_among(top[:7], logits[top[:7]]) for _ in range(200)]
    assert set(found) == {int(token) for token in np.delete(top, [0, 3])[:5]} and other.candidates == 7
    assert Sampler(SamplingOptions(suppress_tokens=list(range(300))), PROMPT).candidates == 0       # more than a backend keeps


def test_a_models_settings_suppress_tokens():
    kept = check_defaults({"suppress_tokens": [3, 4], "begin_suppress_tokens": None, "do_sample": False}, "x", VOCAB)
    assert kept == {"suppress_tokens": [3, 4]}
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for value, words in (([VOCAB], f"x: {name} has token 1000, but the vocabulary ends at 999; mend it"), ([-1], f"x: {name} is"),
                             (7, f"x: {name} is 7; it must be a list of token ids"), (["a"], name), ([True], name)):
            with pytest.raises(UserError, match=words):
                check_defaults({name: value}, "x", VOCAB)
    with pytest.raises(UserError, match="suppress_tokens has token 5000, but the vocabulary ends at 999"):
        Sampler(SamplingOptions(suppress_tokens=[5000]), PROMPT).choose(logits_of(7))


def test_token_logprobs():
    logits = logits_of(6)
    log_p = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    entry = token_logprobs(logits, 123, 4)
    assert entry.logprob == pytest.approx(log_p[123], abs=1e-6)
    assert entry.top == [(i, pytest.approx(log_p[i], abs=1e-6)) for i in np.argsort(-log_p)[:4]]
    assert token_logprobs(logits, 123, 0).top == []


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
    ("temperature", True), ("top_k", -1), ("top_k", 2.5), ("top_p", 0), ("top_p", 1.1), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.5), ("min_p", math.nan), ("repetition_penalty", 0), ("repetition_penalty", math.nan),
    ("frequency_penalty", math.inf), ("presence_penalty", math.nan), ("logit_bias", {1: math.nan}),
    ("logit_bias", {-1: 1.0}), ("logit_bias", {1: math.inf}), ("logit_bias", {10**30: 1.0}), ("suppress_tokens", [10**30]),
    ("logit_bias", [1]), ("seed", 1.5), ("logprobs", -1)])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=name):
        SamplingOptions(**{name: value})


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="token 5000"):
        Sampler(SamplingOptions(logit_bias={5000: 1.0}), PROMPT).choose(logits_of(7))


@pytest.mark.parametrize("provider", ["native", "cpu"])
def test_a_bundles_suppressed_tokens_are_in_no_reply(provider, tiny_bundle, tmp_path):
    """Against transformers' own generation, through every backend's loop."""
    checkpoint, bundle = tiny_bundle("smollm2")
    folder, ids = shutil.copytree(bundle, tmp_path / "bundle"), [5, 99, 300, 41]
    settings = dict(max_new_tokens=24, ignore_model_stop=True)
    with Engine(folder, provider=provider, threads=1) as engine:
        plain = engine.generate(ids, **settings)[0].tokens
    suppressed = {"suppress_tokens": sorted(set(plain[3:9])), "begin_suppress_tokens": [plain[0]]}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["generation"] |= suppressed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, **suppressed)[0, len(ids):].tolist()
    with Engine(folder, provider=provider, threads=1) as engine:
        assert engine.generate(ids, **settings)[0].tokens == theirs != plain
        assert engine.generate(ids, **settings, suppress_tokens=(), begin_suppress_tokens=())[0].tokens == plain
