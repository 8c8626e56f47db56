"""Figures of rounds: medians with what a resampling of the rounds says of them."""

from typing import NamedTuple

import numpy as np

RESAMPLINGS = 4000


class Estimate(NamedTuple):
    """A median, and the interval that holds it with a probability of 95% (one round: the value itself)."""

    median: float
    low: float
    high: float


def estimate(values: list[float]) -> Estimate:
    """The median with its percentile bootstrap interval (Efron 1979), the same each time for the same values."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLINGS, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
    return Estimate(float(np.median(values)), float(low), float(high))


def ratio(ours: list[float], theirs: list[float]) -> Estimate:
    """Of the ratios of pairs that were measured in the same round, so that what changes from round to round cancels."""
    return estimate([a / b for a, b in zip(ours, theirs, strict=True)])


def percentiles(name: str, values) -> dict[str, float]:
    """{name_p50, name_p95, name_p99} of values; nothing of none."""
    return {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} if len(values) else {}
