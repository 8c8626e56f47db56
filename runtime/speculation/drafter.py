"""Who guesses the next tokens of one reply, and the books it keeps.

    drafter = Drafter(sources, odds, pace, prompt)         # `decode.Sequence.drafter`
    drafter.look(tokens, most)                             # the chances of its guesses of what comes after tokens
    drafter.guess(count, constraint)                       # the first `count` of them, without what a grammar forbids
    drafter.settle(chosen, checked=True)                   # what the model chose then

Each source has a `look(text, most)`, the kinds of the guesses it could make now (odds.py), and a `take(count)`, these guesses;
`seconds` is what one takes. The source whose first guess has the best chance guesses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .matches import TRUSTED, Matches
from .odds import Odds
from .pace import MOST_TOKENS, Account, Pace

_LEAST_CHANCE = 0.1               # of a guess: those after it are not looked at
_SURE = 0.85                      # of a first guess: other sources are not asked


class Source(Protocol):
    """What guesses."""

    seconds: float                            # what one guess takes to make; 0: nothing

    def look(self, matches: Matches, most: int) -> list[str]:
        """The kinds of at most `most` guesses of what follows matches.text."""

    def take(self, count: int) -> list[int]:
        """The first of these guesses."""


class Repeats:
    """The source that a text is itself (matches.py)."""

    seconds = 0.0

    def look(self, matches: Matches, most: int) -> list[str]:
        self._matches = matches
        if matches.skipped is not None:
            return _TAKEN_UP[min(matches.skipped.bit_length(), len(_TAKEN_UP) - 1)][matches.length - 1:][:most]
        return _REPEATS[min(matches.length, _LONG):][:most] if matches.length else []

    def take(self, count: int) -> list[int]:
        return self._matches.follow(count)


_LONG = 16
_REPEATS = [f"match {n if n < 5 else '5 to 7' if n < 8 else '8 to 15' if n < _LONG else '16 and more'}" for n in range(_LONG + MOST_TOKENS)]
_TAKEN_UP = [[f"taken up after {skipped}, token {min(n, 4)}" for n in range(1, TRUSTED + MOST_TOKENS)]
             for skipped in ("0", "1", "2 to 3", "4 and more")]


class Drafter:
    """sources: who may guess; odds and pace: of all replies; prompt: int64 [n]."""

    def __init__(self, sources: list[Source], odds: Odds, pace: Pace, prompt: np.ndarray):
        self.account, self.pace = Account(), pace
        self.rest = 0                                        # plain steps until anything is looked for again
        self.passes = self.guessed = self.held = 0           # passes; tokens that they have checked; of these, that were chosen
        self._told = 0, 0
        self._sources, self._odds = sources, Odds(odds)
        self._prompt = prompt
        self._matches: Matches | None = None
        self._source: Source | None = None
        self._kinds: list[str] = []
        self._guess: list[int] = []

    @property
    def seconds(self) -> float:
        """What making one of the guesses last looked for takes."""
        return self._source.seconds if self._source else 0.0

    def look(self, tokens: list[int], most: int) -> list[float]:
        """The chance of each of at most `most` guesses of what comes after the prompt and `tokens`, which have grown since the last time,
        given those before it."""
        if self._matches is None:
            self._read = 0
            self._matches = Matches(self._prompt.tolist())
        self._matches.extend(tokens[self._read:])
        self._read = len(tokens)
        self._source, self._kinds, self._guess, best = None, [], [], []
        for source in self._sources:
            if best and best[0] > _SURE:
                break
            chances, before = [], None
            for kind in (kinds := source.look(self._matches, most)):
                if kind != before:
                    before, chance = kind, self._odds.chance(kind)
                if chance < _LEAST_CHANCE:
                    break
                chances.append(chance)
            if kinds and (self._source is None or chances and (not best or chances[0] > best[0])):
                self._source, self._kinds, best = source, kinds, chances
        return best

    def guess(self, count: int, constraint=None) -> list[int]:
        """The first `count` guesses: fewer where the constraint (structured.py) says that it forbids one."""
        guess = self._source.take(count)
        if fits := getattr(constraint, "fits", None):
            guess = guess[:fits(guess)]
        self._guess = guess
        return guess

    def settle(self, chosen: list[int], checked: bool) -> int:
        """The model chose these tokens. checked: the guess was in the pass. Returns how many guesses held."""
        if not self._guess and self._source is not None and not self._source.seconds and chosen:
            self._guess = self._source.take(1)    # made for nothing, to know what it would have been worth
        held = 0
        for kind, guess, token in zip(self._kinds, self._guess, chosen):
            self._odds.saw(kind, guess == token)
            if guess != token:
                break
            held += 1
        self.passes += 1
        if checked:
            self.guessed, self.held = self.guessed + len(self._guess), self.held + held
        return held

    def rested(self) -> None:
        """A plain step went by without a look."""
        self.rest -= 1
        self.passes += 1
        self.account.book(1, 1.0)

    def counted(self) -> tuple[int, int]:
        """`guessed` and `held` since the last call."""
        new = self.guessed - self._told[0], self.held - self._told[1]
        self._told = self.guessed, self.held
        return new
