"""The byte budget against brute force over all combinations."""

import itertools

import pytest
import torch

from compress.quantizing.allocate import Choice, allocate, size_bytes
from compress.quantizing.rtn import round_to_nearest
from models.network.quantized import TensorFormat
from runtime.errors import UserError


def random_choices(seed, modules, unit):
    generator = torch.Generator().manual_seed(seed)
    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))
    return {f"m{i}": [Choice(TensorFormat(bits, 32), unit * draw(1, 40) + 7 * unit * i, draw(0, 1000) / 997)
                      for bits in (2, 3, 4, 8)] for i in range(modules)}


def brute_force(choices, budget):
    best = None
    for combination in itertools.product(*choices.values()):
        if sum(c.size_bytes for c in combination) <= budget:
            damage = sum(c.damage for c in combination)
            best = damage if best is None else min(best, damage)
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("unit", [1, 864])
def test_as_good_as_every_combination(seed, unit):
    choices = random_choices(seed, 5, unit)
    smallest = sum(min(c.size_bytes for c in options) for options in choices.values())
    largest = sum(max(c.size_bytes for c in options) for options in choices.values())
    for budget in (smallest, (smallest + largest) // 2, (3 * smallest + largest) // 4, largest + 1):
        found = allocate(choices, budget)
        assert list(found) == list(choices)
        assert sum(c.size_bytes for c in found.values()) <= budget
        assert sum(c.damage for c in found.values()) == pytest.approx(brute_force(choices, budget), abs=1e-9)


def test_sizes_without_a_common_divisor_fit_and_come_near():
    choices = {f"m{i}": [Choice(TensorFormat(b, 32), 100_003 * b + 17 * i, (i + 1) / 4**b) for b in (2, 3, 4, 5, 6, 8)]
               for i in range(150)}
    budget = 60_000_000
    found = allocate(choices, budget)
    size, damage = sum(c.size_bytes for c in found.values()), sum(c.damage for c in found.values())
    assert budget - 110_000 < size <= budget
    # No Lagrangian bound is below what any allocation can reach: ours lies within 1% of it.
    bound = max(sum(min(c.damage + price * c.size_bytes for c in options) for options in choices.values()) - price * budget
                for price in torch.logspace(-10, -3, 700).tolist())
    assert bound <= damage <= bound * 1.01


def test_a_budget_too_small_names_the_smallest():
    choices = {"a": [Choice(TensorFormat(2, 32), 1_500_000, 1.0)], "b": [Choice(TensorFormat(2, 32), 2_000_000, 1.0)]}
    with pytest.raises(UserError, match="the smallest possible with these formats is 3.50 MB"):
        allocate(choices, 3_000_000)


@pytest.mark.parametrize("form", [TensorFormat(3, 32), TensorFormat(5, 0), TensorFormat(4, 64, False), TensorFormat(8, 32),
                                  TensorFormat(3, 32, kind="levels", scale_bits=8)])
def test_sizes_are_those_of_the_stored_tensors(form):
    stored = round_to_nearest(torch.randn(6, 192), form).tensors("m")
    assert size_bytes((6, 192), form) == sum(t.numel() * t.element_size() for t in stored.values())
