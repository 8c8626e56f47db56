"""Guesses from the text itself: what followed when the same tokens came before, in the prompt or in the reply.

    matches = Matches(prompt)
    matches.extend(tokens)                       # as the reply grows
    matches.length, matches.follow(8)            # how long the match is, and what came after it

As LZ77 finds its matches (Ziv and Lempel 1977): the places of each pair of tokens are chained, the latest first; of the
latest TRIES the one whose tokens before agree longest is taken, and it is followed until it fails. So a token costs a constant
time, whatever the text's length. Known as prompt lookup (Saxena 2023) and suffix decoding.

A match that runs into the end of the text goes on with its own copy: what repeats is guessed to repeat.

Who copies with changes comes back to what is copied. So after a match of TRUSTED tokens or more has failed, the next TOKENS_LOST tokens
that nothing else is known about are each looked for in what the match would have gone on with, AHEAD tokens far: a single token is
enough there, and the copy is taken up again behind it. `skipped` says how many tokens were left out.
"""

from collections.abc import Iterable

LEAST = 2                         # tokens of a match
LONGEST = 32                      # tokens that are compared
TRIES = 8
TRUSTED, TOKENS_LOST, AHEAD = 6, 8, 64


class Matches:
    def __init__(self, text: Iterable[int] = ()):
        self.text: list[int] = []
        self.length = 0                           # of the match that ends the text; 0: there is none
        self.skipped: int | None = None           # of a copy taken up again, until TRUSTED tokens of it held: what was left out
        self._at = 0                              # where in the text it goes on
        self._failed = 0, 0                       # where a copy would have gone on that failed, and for how many tokens it is looked for
        self._last: dict[int, int] = {}           # a pair of tokens -> the place after its last occurrence
        self._before: list[int] = []              # of each place: the one before with the same pair in front; 0: none
        self._index(text)
        self._search()

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            held = self.length and self.text[self._at] == token
            if not held and self.length >= TRUSTED:
                self._failed = self._at, TOKENS_LOST
            self._index((token,))
            if held:
                self._at, self.length = self._at + 1, self.length + 1
                if self.length >= TRUSTED:
                    self.skipped = None
            else:
                self._search()
                if not self.length:
                    self._take_up(token)

    def follow(self, count: int) -> list[int]:
        """The `count` tokens that come after the match; none where there is no match."""
        if not self.length:
            return []
        found = self.text[self._at:self._at + count]
        period = len(self.text) - self._at
        while len(found) < count:
            found.append(found[-period])
        return found

    def _index(self, tokens: Iterable[int]) -> None:
        text, last, before = self.text, self._last, self._before
        for token in tokens:
            pair = text[-1] << 32 | token if text else -1
            text.append(token)
            before.append(last.get(pair, 0))      # of the place after this token
            last[pair] = len(text)

    def _search(self) -> None:
        text, end, self.length, self.skipped = self.text, len(self.text), 0, None
        at = self._before[-1] if end >= LEAST else 0
        for _ in range(TRIES):
            if not at:
                return
            length = LEAST
            while length < LONGEST and length < at and text[at - 1 - length] == text[end - 1 - length]:
                length += 1
            if length > self.length:
                self._at, self.length = at, length
            at = self._before[at - 1]

    def _take_up(self, token: int) -> None:
        at, left = self._failed
        if not left:
            return
        self._failed = at, left - 1
        copied = self.text[at:min(at + AHEAD, len(self.text) - 1)]
        if token in copied:
            self.skipped = copied.index(token)
            self._at, self.length = at + self.skipped + 1, 1
            self._failed = self._at, left - 1
