"""What a constraint forbids is out of every decision, and the rest is drawn as if it were all there is."""

import numpy as np
import pytest

from runtime.decode import Sequence
from runtime.sampling import Sampler, SamplingOptions, largest

VOCAB = 1000


class Only:
    """Allows the given tokens, and is done when it has heard so many."""

    def __init__(self, tokens, length=10**9):
        self.tokens, self.length, self.heard = np.array(sorted(tokens)), length, []

    @property
    def done(self):
        return len(self.heard) >= self.length

    def mask(self, allowed):
        bits = np.zeros(32 * len(allowed), np.uint8)
        bits[self.tokens] = 1
        allowed[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token):
        self.heard.append(token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 40}, {"temperature": 1.2, "top_p": 0.6},
                                     {"temperature": 1.0, "min_p": 0.05}, {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.5},
                                     {"frequency_penalty": 0.5, "logit_bias": {3: 4.0}, "suppress_tokens": [30, 31]}])
def test_as_over_a_vocabulary_of_the_allowed_alone(options):
    """The oracle: the plain sampler over compacted logits, which draws the same uniform numbers."""
    rng, allowed = np.random.default_rng(0), np.sort(np.random.default_rng(1).choice(VOCAB, 60, replace=False))
    allowed[:4] = [3, 4, 30, 31]
    allowed = np.unique(allowed)
    to = {int(token): i for i, token in enumerate(allowed)}
    prompt, compact = allowed[:9], np.arange(9)
    own = dict(options, seed=5)
    there = dict(own, logit_bias={to[k]: v for k, v in own.get("logit_bias", {}).items()},
                 suppress_tokens=[to[k] for k in own.get("suppress_tokens", ())])
    constraint = Only(allowed)
    masked, plain = Sampler(SamplingOptions(**own), prompt, 0, constraint), Sampler(SamplingOptions(**there), compact)
    chosen = []
    for _ in range(40):
        logits = rng.normal(size=VOCAB).astype(np.float32) * 3
        before = logits.copy()
        chosen.append(masked.choose(logits))
        assert (logits == before).all() and to[chosen[-1]] == plain.choose(logits[allowed])
    assert constraint.heard == chosen and masked.candidates == 0 and len(set(chosen)) > 3


def test_few_allowed_are_no_more_work():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[5, 7]] = 1.0, 2.0
    assert largest(logits, 40).tolist() == [7, 5]


def test_a_sequence_ends_when_its_constraint_is_done():
    constraint = Only([1, 2], length=3)
    sequence = Sequence(np.array([1]), Sampler(SamplingOptions(), np.array([1]), 0, constraint), max_new_tokens=3)
    for _ in range(3):
        assert sequence.finish_reason is None
        sequence.accept(np.arange(VOCAB, dtype=np.float32))
    assert sequence.tokens == [2, 2, 2] and sequence.finish_reason == "stop"
