"""Read golden.json, which `export.golden` writes (the format is told there), and believe nothing in it.

Whoever can change the file can make any bundle look proven or broken, so its sha256 is in the manifest; but a file that
was written wrongly must not end in a traceback, nor pass for want of anything to compare. Every field is there, of its
type, within its range and as long as the others say; every budget is a finite number.
"""

from __future__ import annotations

from pathlib import Path

from .bundle import Bundle
from .errors import UserError, shown
from .files import read_json

VERSION = 1
RUNNERS = ("portable", "portable_fused", "fast", "native_exact", "native")      # that can have a budget
_LARGEST = 1e6                    # no logit of a working model is near it, and exp of a difference stays in float64
_WORST_BUDGET = 1.0               # nats a token; a model that far from PyTorch's says something else


def read_golden(bundle: Bundle) -> dict:
    """The checked contents of a bundle's golden.json, whose "budgets" become {runner: mean KL in nats}.

    Raises UserError, which names the field, where the file is not what `python -m export.verify` writes.
    """
    path = bundle.path(bundle.manifest["golden"])
    golden, check = read_json(path, mend="run `python -m export.verify` again", strict=False), _Check(path)
    if not _whole(golden.get("version"), VERSION, VERSION):
        raise UserError(f"{path}: version {shown(golden.get('version'))}, but this runtime reads {VERSION}; run "
                        "`python -m export.verify` again")
    return {"budgets": _budgets(check, golden.get("budgets")), "prompts": _prompts(check, golden, bundle)}


class _Check:
    def __init__(self, path: Path):
        self.path = path

    def __call__(self, holds: bool, field: str, value: object, rule: str) -> None:
        if not holds:
            raise UserError(f"{self.path}: {field} should be {rule}, not {shown(value)}; run `python -m export.verify` again")


def _budgets(check: _Check, budgets: object) -> dict[str, float]:
    check(isinstance(budgets, dict) and len(budgets) > 0, "budgets", budgets, "an object with a budget for every graph")
    for runner, budget in budgets.items():
        check(runner in RUNNERS, "a name among budgets", runner, f"one of {', '.join(RUNNERS)}")
        mean = budget.get("mean_kl") if isinstance(budget, dict) else None
        check(_number(mean) and 0 < mean <= _WORST_BUDGET, f"budgets.{runner}.mean_kl", mean,
              f"a number above 0 and at most {_WORST_BUDGET:g} (nats)")
    return {runner: float(budget["mean_kl"]) for runner, budget in budgets.items()}


def _prompts(check: _Check, golden: dict, bundle: Bundle) -> list[dict]:
    vocab, count, prompts = bundle.model["config"]["vocab_size"], golden.get("new_tokens"), golden.get("prompts")
    check(_whole(count, 1, bundle.max_context), "new_tokens", count, f"a whole number from 1 to {bundle.max_context}")
    check(isinstance(prompts, list) and len(prompts) > 0, "prompts", prompts, "a list of at least one prompt")

    def each(field: str, values: object, length: int | None, holds, rule: str) -> None:
        """`values` is a list, of `length` if that is given, whose every item `holds`."""
        check(isinstance(values, list) and len(values) > 0, field, values, "a list that is not empty")
        check(length in (None, len(values)), f"the length of {field}", len(values), str(length))
        for i, value in enumerate(values):
            check(holds(value), f"{field}[{i}]", value, rule)

    def is_id(value: object) -> bool:
        return _whole(value, 0, vocab - 1)

    def is_text(value: object) -> bool:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)

    for i, prompt in enumerate(prompts):
        field = f"prompts[{i}]"
        check(isinstance(prompt, dict), field, prompt, "an object")
        for key in ("name", "text"):
            check(is_text(prompt.get(key)), f"{field}.{key}", prompt.get(key), "text")
        check(prompt["name"] not in (p["name"] for p in prompts[:i]), f"{field}.name", prompt["name"], "another one than before")
        each(f"{field}.prompt_ids", prompt.get("prompt_ids"), None, is_id, f"a token id from 0 to {vocab - 1}")
        fed = len(prompt["prompt_ids"]) + count - 1
        check(fed <= bundle.max_context, f"the length of {field}.prompt_ids", len(prompt["prompt_ids"]),
              f"at most what new_tokens leave of {bundle.max_context} tokens")
        each(f"{field}.tokens", prompt.get("tokens"), count, is_id, f"a token id from 0 to {vocab - 1}")
        for key in ("logsumexp", "margins"):
            each(f"{field}.{key}", prompt.get(key), count, _number, f"a number between -{_LARGEST:g} and {_LARGEST:g}")
        for key in ("top_ids", "top_logits"):
            each(f"{field}.{key}", prompt.get(key), count, lambda row: isinstance(row, list), "a list")
        width = len(prompt["top_ids"][0])
        check(1 <= width <= vocab, f"the length of {field}.top_ids[0]", width, f"1 to {vocab}")
        for n, (ids, logits) in enumerate(zip(prompt["top_ids"], prompt["top_logits"])):
            each(f"{field}.top_ids[{n}]", ids, width, is_id, f"a token id from 0 to {vocab - 1}")
            check(len(set(ids)) == width, f"{field}.top_ids[{n}]", ids, "token ids that all differ")
            each(f"{field}.top_logits[{n}]", logits, width, _number, f"a number between -{_LARGEST:g} and {_LARGEST:g}")
            check(logits == sorted(logits, reverse=True), f"{field}.top_logits[{n}]", logits, "logits, largest first")
            check(ids[0] == prompt["tokens"][n], f"{field}.tokens[{n}]", prompt["tokens"][n], f"the likeliest, {ids[0]}")
    return prompts


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _number(value: object) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST       # which NaN is not
