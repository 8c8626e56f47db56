"""How many guessed tokens a pass should check, from what passes take on this device.

    pace.stepped(rows, seconds)                    # a plain step was measured
    pace.passed(rows, extra, seconds)              # a pass that took `extra` tokens beside one of each row
    pace.looked(rows, seconds)                     # what looking for guesses took besides
    pace.plan(chances, spare)                      # how many guesses of each row the next pass should check
    pace.rest(rows)                                # steps that go by without a look, after one that found nothing

All in units of a plain step of as many rows, which the same memory and the same other programs slow down alike. Others only ever add to
a time, so what something takes is the lower quartile of its last measurements: `ratio(rows, extra)`, with straight lines between and
beyond, and never more than what a pass of more tokens took. Plain steps are measured first, and again every REFRESH passes. A device is tried out by degrees: no pass has more than twice as many extra tokens as any before, and one. What was measured once
or twice is forgotten after FORGET plain steps, since it may have been somebody else's fault.

The plan has the most tokens by time: (rows + expected held guesses) / (ratio + time to look and to make the guesses), where the chance
that guess j holds is the product of its own and those before it. It is nothing unless that beats plain decoding by MARGIN, and
longer only where that is CLEARLY better (or was never tried): far guesses are known least, and fail at the highest cost. Looking for
guesses in vain takes at most LOOKING of the time, or LONGEST_REST steps go by between two looks: of a tiny model it costs as much as
a step. A reply pays its first looks, FIRST_LOOKS steps of them, without rest, and later ones from what guesses have won beyond PUT_BY.

What a reply has lost against plain decoding is bounded besides (`Account`): START steps, SHARE of its steps so far, and what
earlier guesses have won, up to MOST_WON: a pass may risk no more than that, its loss by the chance that its first guess fails. So a
prompt on which nothing holds costs at most SHARE of its steps and a few.
Times come in by argument: it has no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

MOST = 15                         # guesses of a row in a pass
MOST_TOKENS = 31                  # tokens of a pass: with AMX, larger ones round otherwise (native/backend.py)
PRIOR = 0.1                       # of a plain step: what a further token adds at least, where that was not measured
MARGIN, CLEARLY = 1.03, 1.05
SHARE, START, MOST_WON = 0.01, 0.7, 4.0
LOOKING, LONGEST_REST, FIRST_LOOKS, PUT_BY = 0.01, 32, 0.5, 0.5
_LEAST_RISK = 0.5                 # of what a pass would lose if nothing held, however sure its guesses are
REFRESH, FORGET = 64, 80
_KEPT = 7                         # measurements of one kind
_SETTLED = 3                      # of them, for good


class Pace:
    """What passes cost on one device, of all replies. Threads may share it: what one of them counts at the same time may be lost."""

    def __init__(self):
        self._steps: dict[int, tuple[float, ...]] = {}            # rows -> seconds of the last plain steps
        self._ratios: dict[tuple[int, int], tuple[float, ...]] = {}
        self._widest: dict[int, int] = {}                         # rows -> the most extra tokens that a pass had
        self._curves: dict[int, list[float]] = {}
        self._looks: dict[int, tuple[float, ...]] = {}            # rows -> plain steps that the last looks took
        self._since: dict[int, int] = {}                          # passes since a plain step
        self._quiet = 0                                           # plain steps since anything was forgotten

    def stepped(self, rows: int, seconds: float) -> None:
        self._steps[rows] = (self._steps.get(rows, ()) + (seconds,))[-_KEPT:]
        self._since[rows] = 0
        self._quiet += 1
        if self._quiet == FORGET:
            self._quiet, self._curves = 0, {}
            self._ratios = {key: seen for key, seen in list(self._ratios.items()) if len(seen) >= _SETTLED}
            widest: dict[int, int] = {}
            for some, extra in list(self._ratios):                 # a copy: other threads may add to them
                widest[some] = max(extra, widest.get(some, 0))
            self._widest = widest

    def passed(self, rows: int, extra: int, seconds: float) -> None:
        self._since[rows] = self._since.get(rows, 0) + 1
        if (step := self.step(rows)) is not None and extra:
            key = rows, min(extra, MOST_TOKENS)
            self._ratios[key] = (self._ratios.get(key, ()) + (seconds / step,))[-_KEPT:]
            self._curves.pop(rows, None)
            self._widest[rows] = max(key[1], self._widest.get(rows, 0))

    def looked(self, rows: int, seconds: float) -> None:
        if (step := self.step(rows)) is not None:
            self._looks[rows] = (self._looks.get(rows, ()) + (seconds / step,))[-_KEPT:]

    def look(self, rows: int) -> float:
        """What looking for guesses takes, in plain steps."""
        return _typical(seen) if (seen := self._looks.get(rows)) else 0.0

    def rest(self, rows: int) -> int:
        """Plain steps until the next look, after one in vain: none while plain steps are to be measured."""
        return 0 if self.step(rows) is None else min(LONGEST_REST, int(self.look(rows) / LOOKING))

    def step(self, rows: int) -> float | None:
        """Seconds of a plain step of so many rows; None: not known, or not any more."""
        steps = self._steps.get(rows, ())
        return _typical(steps) if len(steps) >= _SETTLED and self._since[rows] < REFRESH else None

    def ratio(self, rows: int, extra: int) -> float:
        """What a pass of rows + extra tokens takes, in plain steps of these rows."""
        return self.curve(rows)[min(extra, MOST_TOKENS)]

    def curve(self, rows: int) -> list[float]:
        """The same for 0 to MOST_TOKENS extra tokens."""
        if (curve := self._curves.get(rows)) is None:
            curve = self._curves[rows] = self._curve(rows)
        return curve

    def _curve(self, rows: int) -> list[float]:
        points, least = [], float("inf")
        for extra in range(MOST_TOKENS, 0, -1):
            if seen := self._ratios.get((rows, extra)):
                least = max(1.0, min(least, _typical(seen)))          # fewer tokens never take longer than more do
                points.append((extra, least))
        points = [(0, 1.0), *reversed(points)]
        last, highest = points[-1]
        points.append((MOST_TOKENS + 1, highest + (MOST_TOKENS + 1 - last) * max(PRIOR, (highest - 1) / max(1, last))))
        curve = []
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            curve += [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in range(x0, x1)]
        return curve

    def _tried(self, rows: int) -> int:
        """Extra tokens that a pass may have."""
        return 1 + 2 * self._widest.get(rows, 0)

    def plan(self, chances: Sequence[Sequence[float]], spare: Sequence[float], *, seconds: float = 0.0, together: bool = True,
             again: bool = False) -> list[int]:
        """How many guesses of each row to check: none of any where a plain step is better.

        chances: of each row, the chance of each of its guesses, given those before it. spare: plain steps that each row may lose.
        seconds: what making one guess takes. together: rows may have different numbers in a pass (False: each has the same, those
        with fewer are padded). again: a row whose guess fails must read what did hold a second time.
        """
        rows = len(chances)
        step, none = self.step(rows), [0] * rows
        if step is None:
            return none
        reach = [list(accumulate(row[:MOST], mul)) for row in chances]
        held = [[0.0, *accumulate(row)] for row in reach]         # of so many guesses, how many hold on average
        may_lose = [left / max(_LEAST_RISK, 1 - row[0]) if row else 0.0 for row, left in zip(reach, spare)]
        best, best_rate, each, look, curve = none, rows * MARGIN, seconds / step, self.look(rows), self.curve(rows)
        most, known = min(self._tried(rows), MOST_TOKENS - rows), self._widest.get(rows, 0)
        for counts in _mixed(reach) if together else _padded(reach):
            made = sum(counts)
            extra = made if together else rows * max(counts)
            if not 0 < extra <= most:
                continue
            cost = curve[extra] + made * each + look
            lost = cost - 1
            if any([count and lost * count / made > least for count, least in zip(counts, may_lose)]):
                continue
            if again:
                cost += lost * max(1 - row[count - 1] for row, count in zip(reach, counts) if count)
            rate = (rows + sum([row[count] for row, count in zip(held, counts)])) / cost
            if rate > best_rate * (1 if best is none or extra > known else CLEARLY):
                best, best_rate = counts, rate
        return best


class Account:
    """What one reply has won and lost by guesses, in plain steps."""

    def __init__(self):
        self.steps, self.won, self._looks = 0, 0.0, FIRST_LOOKS

    @property
    def spare(self) -> float:
        """What it may lose now."""
        return START + SHARE * self.steps + self.won

    def pay(self, look: float) -> bool:
        """Pay for a look in vain, in plain steps; False: it has to rest instead."""
        if self._looks >= look:
            self._looks -= look
        elif self.won - look >= PUT_BY:
            self.won -= look
        else:
            return False
        return True

    def book(self, gained: int, cost: float) -> None:
        """A pass gave it `gained` tokens at its share of `cost` (1: of a plain step)."""
        self.steps += gained
        self.won = min(MOST_WON, self.won + gained - cost)


def _typical(values: tuple[float, ...]) -> float:
    """What it takes undisturbed: other programs only ever add to a time, so this is the lower quartile."""
    return sorted(values)[(len(values) - 1) // 4]


def _mixed(reach: list[list[float]]):
    """Numbers of guesses a row, the likeliest guess of all added each time."""
    if len(reach) == 1:
        yield from ([count] for count in range(1, len(reach[0]) + 1))
        return
    counts = [0] * len(reach)
    for _ in range(MOST_TOKENS):
        left = [(row[count], i) for i, (row, count) in enumerate(zip(reach, counts)) if count < len(row)]
        if not left:
            return
        counts[max(left)[1]] += 1
        yield list(counts)


def _padded(reach: list[list[float]]):
    """The same for passes as wide as the widest row: few widths, since a backend prepares each."""
    for width in (1, 2, 4, 8):
        yield [min(width, len(row)) for row in reach]
