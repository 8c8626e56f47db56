"""Spend a budget of bytes on the formats of a model's weights so that the summed damage is least.

    formats = allocate(choices, budget_bytes)     # choices: module -> [Choice(format, size_bytes, damage), ...]

A multiple-choice knapsack, solved by dynamic programming over bytes in steps of the sizes' greatest common divisor, so
the answer is exact; where that would take more than `STEPS` steps, sizes are rounded up to budget / STEPS and the answer
still fits, and is worse than the best by no more than the rounding (0.03% of the budget for 200 modules). Damages
(sensitivity.py) add up because the errors of different modules are nearly uncorrelated.
"""

import math
from dataclasses import dataclass

import numpy as np

from models.network.quantized import TensorFormat
from runtime.errors import UserError

STEPS = 1 << 19


@dataclass(frozen=True)
class Choice:
    """One way to store a module: bytes it takes and the KL (nats a token) it costs."""

    format: TensorFormat
    size_bytes: int
    damage: float


def size_bytes(shape: tuple[int, int], form: TensorFormat) -> int:
    """Bytes of a weight [N, K] stored in a format: codes, scales and zeros."""
    return sum(dtype.itemsize * math.prod(stored) for dtype, stored in form.stored_shapes(*shape).values())


def allocate(choices: dict[str, list[Choice]], budget_bytes: int) -> dict[str, Choice]:
    """The choice of each module, least total damage within the budget.

    Raises UserError where even the smallest choices exceed the budget; it names the smallest possible size.
    """
    smallest = sum(min(choice.size_bytes for choice in options) for options in choices.values())
    if smallest > budget_bytes:
        raise UserError(f"the weights cannot fit into {budget_bytes / 1e6:.2f} MB: the smallest possible with these "
                        f"formats is {math.ceil(smallest / 1e4) / 100:.2f} MB")
    spare = budget_bytes - smallest                       # what is left to hand out above the smallest choices
    options = {module: _frontier(options) for module, options in choices.items()}
    extras = {module: [choice.size_bytes - found[0].size_bytes for choice in found] for module, found in options.items()}
    unit = math.gcd(*(extra for found in extras.values() for extra in found)) or 1
    unit = max(unit, -(-spare // STEPS), 1)
    steps = spare // unit
    cost = np.zeros(steps + 1)                            # least damage of the modules so far, by steps spent at most
    taken = []
    for module, found in options.items():
        best, pick = np.full(steps + 1, np.inf), np.zeros(steps + 1, np.uint8)
        for index, (choice, extra) in enumerate(zip(found, extras[module])):
            width = -(-extra // unit)
            if width > steps:
                break
            total = cost[:steps + 1 - width] + choice.damage
            better = total < best[width:]
            best[width:][better] = total[better]
            pick[width:][better] = index
        cost = best
        taken.append(pick)
    result, left = {}, steps
    for (module, found), pick in zip(reversed(options.items()), reversed(taken)):
        index = int(pick[left])
        result[module] = found[index]
        left -= -(-extras[module][index] // unit)
    return {module: result[module] for module in choices}


def _frontier(options: list[Choice]) -> list[Choice]:
    """Choices by size, without those that another beats in both size and damage."""
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.size_bytes, c.damage)):
        if not kept or choice.damage < kept[-1].damage:
            kept.append(choice)
    return kept
