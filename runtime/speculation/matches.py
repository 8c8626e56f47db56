"""Guesses from the text itself: what followed when the same tokens came before, in the prompt or in the reply.

    matches = Matches(prompt)
    matches.extend(tokens)                       # as the reply grows
    matches.length, matches.follow(8)            # how long the match is, and what came after it

As LZ77 finds its matches (Ziv and Lempel 1977): the places of each pair of tokens are chained, the latest first; of the
latest TRIES the one whose tokens before agree longest is taken, and it is followed until it fails. So a token costs a constant
time, whatever the text's length. Known as prompt lookup (Saxena 2023) and suffix decoding.

A match that runs into the end of the text goes on with its own copy: what repeats is guessed to repeat.
"""

from collections.abc import Iterable

LEAST = 2                         # tokens of a match
LONGEST = 32                      # tokens that are compared
TRIES = 8


class Matches:
    def __init__(self, text: Iterable[int] = ()):
        self.text: list[int] = []
        self.length = 0                           # of the match that ends the text; 0: there is none
        self._at = 0                              # where in the text it goes on
        self._last: dict[int, int] = {}           # a pair of tokens -> the place after its last occurrence
        self._before: list[int] = []              # of each place: the one before with the same pair in front; 0: none
        self._index(text)
        self._search()

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            held = self.length and self.text[self._at] == token
            self._index((token,))
            if held:
                self._at, self.length = self._at + 1, self.length + 1
            else:
                self._search()

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
        text, end, self.length = self.text, len(self.text), 0
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
