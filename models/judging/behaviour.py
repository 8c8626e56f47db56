"""Habits of replies that a damaged model shows first: refusing, going round in circles, breaking JSON.

Each function looks at one reply and answers yes or no; rates over the same prompts before and after compression tell
what changed. Heuristics, and meant as such: they are compared with themselves, not with the truth.
"""

import re
from collections import Counter

from runtime.files import parse_json

_REFUSAL = re.compile(r"\b(i('m| am) (sorry|unable|not able)|i (can('|no)t|cannot|won't|will not) (help|assist|provide|answer|do|fulfill)|"
                      r"as an ai\b|it('s| is) not appropriate)|抱歉|对不起|無法|无法(提供|回答|帮助)", re.IGNORECASE)

JSON_PROMPTS = tuple(f"{task} Answer with a JSON object only, no other text." for task in (
    "Give the name and population of France with keys \"name\" and \"population\".",
    "List three colours under the key \"colours\".",
    "Describe a book with keys \"title\", \"author\" and \"year\".",
    "Convert to JSON with keys \"city\" and \"temperature\": it is 21 degrees in Rome.",
    "Give the first five even numbers under the key \"numbers\".",
    "Describe a user named Ann, aged 31, with keys \"name\" and \"age\".",
    "Say whether water is wet with the key \"answer\" as true or false.",
    "Give a shopping list of two items with keys \"item\" and \"count\" under \"list\"."))


def refuses(reply: str) -> bool:
    """Whether the reply's beginning declines to answer (English and Chinese phrases)."""
    return bool(_REFUSAL.search(reply[:200].replace("\u2019", "'")))


def repeats(reply: str, *, words: int = 4, times: int = 4) -> bool:
    """Whether some run of `words` words (Han characters count as words) stands `times` times or more in the reply."""
    tokens = re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", reply.lower())
    runs = Counter(tuple(tokens[i:i + words]) for i in range(len(tokens) - words + 1))
    return any(count >= times for count in runs.values())


def valid_json(reply: str) -> bool:
    """Whether the reply is a JSON object or array, alone or inside one code fence."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", reply, re.DOTALL)
    try:
        return isinstance(parse_json(fenced.group(1) if fenced else reply), (dict, list))
    except ValueError:
        return False
