"""How often guesses hold, by their kind.

    odds = Odds()                    # of an engine
    own = Odds(odds)                 # of one reply, which begins with what the engine has seen
    own.saw("match 4", True)
    own.chance("match 4")

A kind is whatever tells good guesses from bad ones before they are checked: how long the match was, how sure the n-gram. Old
observations fade, so that a reply that turns from quoting to talking is noticed after a few tokens. A guess that was made but not
checked in a pass (it did not pay) is compared with the token that came all the same: so chances are learned at no cost.
"""

from __future__ import annotations

_FADE = 0.95                      # what an older observation of the same kind weighs against the next one
_MOST_WEIGHT = 4.0                # observations that the engine's experience counts for in one reply
_EXPECTED = 0.5                   # of a kind that was never seen


class Odds:
    """before: whose chances count for as much as _MOST_WEIGHT observations; None: _EXPECTED does."""

    def __init__(self, before: Odds | None = None):
        self._before, self._seen = before, {}     # kind -> (that held, observed), faded

    def saw(self, kind: str, held: bool) -> None:
        """A guess of this kind held, or not."""
        right, all_ = self._seen.get(kind, (0.0, 0.0))
        self._seen[kind] = right * _FADE + held, all_ * _FADE + 1
        if self._before:
            self._before.saw(kind, held)

    def chance(self, kind: str) -> float:
        """That the next guess of this kind holds."""
        right, all_ = self._seen.get(kind, (0.0, 0.0))
        expected = self._before.chance(kind) if self._before else _EXPECTED
        weight = _MOST_WEIGHT if self._before else 1.0
        return (right + weight * expected) / (all_ + weight)
