"""Guesses for tests: right with a chance of their own, and a pace that has everything checked."""

import random

from runtime.speculation.drafter import Drafter, Repeats
from runtime.speculation.odds import Odds
from runtime.speculation.pace import MOST_TOKENS, Pace


class Everything(Pace):
    """Of a device on which further tokens of a pass cost nothing."""

    def step(self, rows):
        return 1.0

    def curve(self, rows):
        return [1.0 + 1e-6 * extra for extra in range(MOST_TOKENS + 1)]

    def _tried(self, rows):
        return MOST_TOKENS

    def rest(self, rows):
        return 2                                  # after a look in vain


class Foreseen:
    """A source that knows what comes, and says something else now and then."""

    seconds = 0.0

    def __init__(self, begun, reply, right, seed, vocab):
        self._begun, self._reply, self._vocab = begun, reply, vocab
        self._right, self._random = right, random.Random(seed)

    def look(self, matches, most):
        self._at = len(matches.text) - self._begun
        return ["foreseen"] * min(most, self._random.randrange(9))

    def take(self, count):
        return [token if self._random.random() < self._right else (token + 1) % self._vocab
                for token in (self._reply[self._at:] + [0] * count)[:count]]


class Sure(Odds):
    """Every guess is thought to hold, so that all are checked."""

    def chance(self, kind):
        return 0.999


def foresee(sequences, replies, vocab, right=0.7, pace=None):
    """Give every sequence a drafter that knows its reply."""
    pace = pace or Everything()
    for seed, (sequence, reply) in enumerate(zip(sequences, replies)):
        source = Foreseen(len(sequence.prompt), reply, right, seed, vocab)
        sequence.drafter = Drafter([Repeats(), source], Sure(), pace, sequence.prompt)
        sequence.drafter._odds = Sure()
    return sequences
