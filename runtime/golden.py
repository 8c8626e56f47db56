"""Read golden.json, which `export.golden` writes (the format is told there), and believe nothing in it.

Its sha256 is in the manifest; but a file that was written wrongly must not end in a traceback, nor pass for want of
anything to compare. Every field is there, of its type, within its range and as long as the others say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .compare import Top, log_rest
from .errors import UserError, shown
from .files import read_json

VERSION = 1
RUNNERS = ("portable", "portable_fused", "fast", "cuda_graph", "native_exact", "native")      # that can have a budget
_LARGEST = 1e6                    # no logit of a working model is near it, and exp of a difference stays in float64
_WORST_BUDGET = 1.0               # nats a token; a model that far from PyTorch's says something else
_MEND = "run `python -m export.verify` again"


@dataclass(frozen=True)
class Golden:
    """A prompt, PyTorch's greedy continuation, and what PyTorch said at each of its tokens."""

    name: str
    text: str
    prompt: np.ndarray            # int64 [n]
    tokens: np.ndarray            # int64 [new tokens]
    reference: np.ndarray | Top   # the logits [new tokens, vocab] that chose them, or the largest of those

    @property
    def fed(self) -> np.ndarray:
        """What a model is given, so that it answers at every token: int64 [n + new tokens - 1]."""
        return np.concatenate([self.prompt, self.tokens[:-1]])


def read_golden(bundle: Bundle) -> tuple[dict[str, float], list[Golden]]:
    """The checked contents of a bundle's golden.json: budgets (runner -> mean KL in nats) and prompts.

    Raises UserError, which names the field, where the file is not what `python -m export.verify` writes.
    """
    path = bundle.path(bundle.manifest["golden"])
    golden, check = read_json(path, mend=_MEND, strict=False), partial(_check, path)
    if not _whole(golden.get("version"), VERSION, VERSION):
        raise UserError(f"{path}: version {shown(golden.get('version'))}, but this runtime reads {VERSION}; {_MEND}")
    budgets = _budgets(check, golden.get("budgets"))
    _check_prompts(check, golden, bundle)
    return budgets, [_golden(prompt) for prompt in golden["prompts"]]


def _golden(prompt: dict) -> Golden:
    with np.errstate(over="ignore"):              # numbers that are no one's logits
        log_p = np.array(prompt["top_logits"], np.float64) - np.array(prompt["logsumexp"], np.float64)[:, None]
        top = Top(np.array(prompt["top_ids"]), log_p, log_rest(log_p))
    return Golden(prompt["name"], prompt["text"], np.array(prompt["prompt_ids"]), np.array(prompt["tokens"]), top)


def _check(path: Path, holds: bool, field: str, value: object, rule: str) -> None:
    if not holds:
        raise UserError(f"{path}: {field} should be {rule}, not {shown(value)}; {_MEND}")


def _budgets(check: Callable, budgets: object) -> dict[str, float]:
    check(isinstance(budgets, dict) and len(budgets) > 0, "budgets", budgets, "an object with a budget for every graph")
    for runner, budget in budgets.items():
        check(runner in RUNNERS, "a name among budgets", runner, f"one of {', '.join(RUNNERS)}")
        mean = budget.get("mean_kl") if isinstance(budget, dict) else None
        check(_number(mean) and 0 < mean <= _WORST_BUDGET, f"budgets.{runner}.mean_kl", mean,
              f"a number above 0 and at most {_WORST_BUDGET:g} (nats)")
    return {runner: float(budget["mean_kl"]) for runner, budget in budgets.items()}


def _check_prompts(check: Callable, golden: dict, bundle: Bundle) -> None:
    vocab, count, prompts = bundle.model["config"]["vocab_size"], golden.get("new_tokens"), golden.get("prompts")
    check(_whole(count, 1, bundle.max_context), "new_tokens", count, f"a whole number from 1 to {bundle.max_context}")
    check(isinstance(prompts, list) and len(prompts) > 0, "prompts", prompts, "a list of at least one prompt")

    def each(field: str, values: object, length: int | None, holds, rule: str) -> None:
        """`values` is a list, of `length` if that is given, whose every item `holds`."""
        check(isinstance(values, list) and len(values) > 0, field, values, "a list that is not empty")
        check(length in (None, len(values)), f"the length of {field}", len(values), str(length))
        for i, value in enumerate(values):
            check(holds(value), f"{field}[{i}]", value, rule)

    an_id = lambda value: _whole(value, 0, vocab - 1), f"a token id from 0 to {vocab - 1}"
    a_number = _number, f"a number between -{_LARGEST:g} and {_LARGEST:g}"

    def is_text(value: object) -> bool:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)

    for i, prompt in enumerate(prompts):
        field = f"prompts[{i}]"
        check(isinstance(prompt, dict), field, prompt, "an object")
        for key in ("name", "text"):
            check(is_text(prompt.get(key)), f"{field}.{key}", prompt.get(key), "text")
        check(prompt["name"] not in (p["name"] for p in prompts[:i]), f"{field}.name", prompt["name"], "another one than before")
        each(f"{field}.prompt_ids", prompt.get("prompt_ids"), None, *an_id)
        fed = len(prompt["prompt_ids"]) + count - 1
        check(fed <= bundle.max_context, f"the length of {field}.prompt_ids", len(prompt["prompt_ids"]),
              f"at most what new_tokens leave of {bundle.max_context} tokens")
        each(f"{field}.tokens", prompt.get("tokens"), count, *an_id)
        for key in ("logsumexp", "margins"):
            each(f"{field}.{key}", prompt.get(key), count, *a_number)
        for key in ("top_ids", "top_logits"):
            each(f"{field}.{key}", prompt.get(key), count, lambda row: isinstance(row, list), "a list")
        width = len(prompt["top_ids"][0])
        check(1 <= width <= vocab, f"the length of {field}.top_ids[0]", width, f"1 to {vocab}")
        for n, (ids, logits) in enumerate(zip(prompt["top_ids"], prompt["top_logits"])):
            each(f"{field}.top_ids[{n}]", ids, width, *an_id)
            check(len(set(ids)) == width, f"{field}.top_ids[{n}]", ids, "token ids that all differ")
            each(f"{field}.top_logits[{n}]", logits, width, *a_number)
            check(logits == sorted(logits, reverse=True), f"{field}.top_logits[{n}]", logits, "logits, largest first")
            check(ids[0] == prompt["tokens"][n], f"{field}.tokens[{n}]", prompt["tokens"][n], f"the likeliest, {ids[0]}")


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: object) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST       # which NaN is not
