"""A task's metrics by their names, each with its 95% bootstrap interval over examples.

    result, rows = score(task, [Solved(["Ann"], ("Ann", "Ann Lee")), ...])

An example has one answer or more, where several were drawn; each counts as much. What is a mean of examples is that of an
example's mean; the others are of all answers together, or of all answers to one example (variety, where there are several).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from models.judging import metrics
from models.tasks.entities import from_text
from runtime.cli import did_you_mean
from runtime.errors import UserError
from runtime.task import Task

RESAMPLES = {"bleu": 200, "chrf": 200, "self_bleu": 30}         # of what takes long; others 1000


@dataclass(frozen=True)
class Solved:
    """The answers to one example, those that are right, and of its first right one ln p and the number of tokens."""
    answers: list[str]
    right: tuple[str, ...]
    nll: tuple[float, int] = (0.0, 0)


def _mean(measure: Callable[[str, Sequence[str]], float]):
    return lambda one: float(np.mean([measure(answer, one.right) for answer in one.answers]))


def _rouge(kind: str):
    return _mean(lambda answer, right: metrics.rouge(answer, right, (kind,))[kind])


# Of one example, or of all together.
EACH = {"exact_match": _mean(metrics.exact_match), "f1": _mean(metrics.token_f1),
        **{kind: _rouge(kind) for kind in ("rouge1", "rouge2", "rougeL")},
        "meteor": _mean(lambda answer, right: max(metrics.meteor(answer, one) for one in right))}


def _pairs(some: Sequence[Solved]) -> tuple[list[str], list[tuple[str, ...]]]:
    return [answer for one in some for answer in one.answers], [one.right for one in some for _ in one.answers]


def _labels(name: str, some: Sequence[Solved]) -> float:
    answers, right = _pairs(some)
    return metrics.classification(answers, [r[0] for r in right])[name]


def _numbers(measure, some: Sequence[Solved]) -> float:
    answers, right = _pairs(some)
    return measure([float(a) for a in answers], [float(r[0]) for r in right])


def _entities(name: str, some: Sequence[Solved]) -> float:
    answers, right = _pairs(some)
    return metrics.entities([from_text(a) for a in answers], [from_text(r[0]) for r in right])[name]


def _bleu(some: Sequence[Solved]) -> float:
    answers, right = _pairs(some)
    return metrics.bleu(answers, right, chinese=any("\u4e00" <= c <= "\u9fff" for r in right for c in r[0]))


def _variety(measure: Callable[[Sequence[str]], float], some: Sequence[Solved]) -> float:
    if all(len(one.answers) == 1 for one in some):
        return measure([one.answers[0] for one in some])
    return float(np.mean([measure(one.answers) for one in some]))


def _perplexity(some: Sequence[Solved]) -> float:
    return float(np.exp(sum(one.nll[0] for one in some) / max(1, sum(one.nll[1] for one in some))))


ALL = {"bleu": _bleu, "chrf": lambda some: metrics.chrf(*_pairs(some)), "perplexity": _perplexity,
       **{name: partial(_labels, name) for name in ("accuracy", "precision", "recall", "macro_f1", "matthews")},
       **{name: partial(_numbers, getattr(metrics, name)) for name in ("pearson", "spearman")},
       **{f"entity_{name}": partial(_entities, name) for name in ("f1", "precision", "recall")},
       "distinct1": partial(_variety, partial(metrics.distinct, n=1)), "distinct2": partial(_variety, partial(metrics.distinct, n=2)),
       "self_bleu": partial(_variety, metrics.self_bleu)}
METRICS = (*EACH, *ALL)
_OF_LABELS = {"accuracy", "precision", "recall", "macro_f1", "matthews"}
_OF_NUMBERS = {"pearson", "spearman"}
_VARIETY = {"distinct1", "distinct2", "self_bleu"}


def check_metrics(task: Task, place: str) -> None:
    """Raises UserError for a metric that there is not, or that is of other answers than the task's."""
    for name in task.metrics:
        if name not in METRICS:
            raise UserError(f"{place}: metric {name!r} is unknown{did_you_mean(name, METRICS)}: choose from {', '.join(METRICS)}")
        kind = "label" if name in _OF_LABELS else "number" if name in _OF_NUMBERS else "text"
        if kind != task.answer and not (kind == "label" and task.answer == "text" and name == "accuracy"):
            raise UserError(f"{place}: metric {name} is of answers that are a {kind}, and task {task.name}'s are a {task.answer}")


def score(task: Task, solved: list[Solved]) -> tuple[dict, list[dict]]:
    """The metrics, each with its interval, and of every example what it scored alone."""
    result, rows = {"examples": len(solved)}, [{} for _ in solved]
    for name in task.metrics:
        if name in EACH:
            values = [EACH[name](one) for one in solved]
            result[name], result[f"{name}_interval"] = float(np.mean(values)), list(metrics.bootstrap(values))
            for row, value in zip(rows, values):
                row[name] = value
        else:
            result[name] = ALL[name](solved)
            # Drawn twice, an answer stands beside itself, and nothing is less varied: of the variety of all there is no interval.
            drawn = solved if name not in _VARIETY or any(len(one.answers) > 1 for one in solved) else []
            result[f"{name}_interval"] = list(metrics.bootstrap(drawn, ALL[name], resamples=RESAMPLES.get(name, 1000)))
    if task.answer == "label":
        answers, right = _pairs(solved)
        found = metrics.classification(answers, [r[0] for r in right])
        result |= {name: found[name] for name in ("labels", "confusion")}
    return result, rows
