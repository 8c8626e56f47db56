"""How often each example is learned from: rare labels more often, and several tasks by weight in one run.

Weights are repetitions, drawn by seed: an example of weight 2.5 stands in the data two or three times. In expectation that is what
weights on the loss are, and the trainer, its batches and its resuming stay what they are.
"""

from collections import Counter
from typing import TypeVar

import numpy as np

from models.tasks.examples import Example
from runtime.cli import did_you_mean
from runtime.errors import UserError
from runtime.task import Task

BALANCED = "balanced"
T = TypeVar("T")


def class_weights(given: tuple[str, ...], task: Task, examples: list[Example]) -> dict[str, float]:
    """Label -> weight: each label as often as the most frequent ("balanced"), or as given (NAME=WEIGHT; others 1)."""
    if task.answer != "label":
        raise UserError(f"--class-weights {given[0]}: task {task.name} has no labels to weigh")
    counts = Counter(example.answers[0] for example in examples)
    if given == (BALANCED,):
        return {label: max(counts.values()) / count for label, count in counts.items()}
    weights = dict.fromkeys(task.labels, 1.0)
    for pair in given:
        name, _, weight = pair.partition("=")
        if name not in weights:
            raise UserError(f"--class-weights {pair}: no label {name!r}{did_you_mean(name, weights)}; give {BALANCED}, or NAME=WEIGHT of "
                            f"{', '.join(weights)}")
        weights[name] = _positive("--class-weights", pair, weight)
    return weights


def weighted(examples: list[Example], weights: dict[str, float], seed: int) -> list[Example]:
    """The examples, each as often as its label's weight says."""
    chance = np.random.default_rng(seed).random(len(examples))
    return [example for example, luck in zip(examples, chance)
            for _ in range(int(weights[example.answers[0]]) + (luck < weights[example.answers[0]] % 1))]


def parse_mix(entry: str, known: tuple[str, ...]) -> tuple[str, float, str]:
    """(task, weight, file) of TASK@WEIGHT=FILE, or TASK=FILE, of weight 1. Raises UserError."""
    head, sign, file = entry.partition("=")
    name, at, weight = head.partition("@")
    if not (sign and file) or name not in known:
        raise UserError(f"--mix {entry}: give TASK@WEIGHT=FILE, such as qa@0.5=old.json; tasks are {', '.join(known)}")
    return name, _positive("--mix", entry, weight) if at else 1.0, file


def share(rows: list[T], count: int, seed: int) -> list[T]:
    """`count` of the rows, drawn by seed, each as often as any other, give or take one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[order[number % len(rows)]] for number in range(count)]


def _positive(option: str, entry: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not 0 < weight <= 1000:
        raise UserError(f"{option} {entry}: the weight must be a number above 0 and at most 1000")
    return weight
