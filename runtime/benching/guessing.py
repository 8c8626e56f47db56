"""What guesses gain (`runtime.bench --speculate`): greedy replies to the prompts of prompts.py with and without them, in turns.

For each class of prompts:

    CLASS_tokens_per_s    decode speed of its replies together
    CLASS_least_ratio     of its prompts, the least speed with guesses by that without (of each, the median of all rounds)
    CLASS_held            of the guesses that were checked, the share that held; nothing where none was
    CLASS_tokens_a_pass   tokens after a reply's first by the passes that made them: 1 without guesses
    different_replies     replies that are not, token for token, those without guesses: near ties of logits, where a backend has any

One engine answers both ways, so that memory and the machine's moods are the same; who comes first changes from prompt to prompt.
"""

from __future__ import annotations

import statistics

from ..engine import Engine
from ..errors import UserError
from ..pending import Pending
from .prompts import PROMPTS
from .report import Samples

GREEDY = {"temperature": 0, "repetition_penalty": 1}


def guessing(engine: Engine, new_tokens: int, rounds: int) -> Samples:
    """All rounds after one that warms up, of the systems "guessing" and "plain". Raises UserError where nothing guesses."""
    if not (speculation := engine.speculation) or not speculation.suits(engine.backend):
        raise UserError(f"nothing guesses here ({engine.explain().splitlines()[0]}); give --speculate on, or the path of a draft")
    engine.serve_with(prefix_mb=0)
    samples: Samples = {"guessing": {}, "plain": {}}
    ratios: dict[str, dict[str, list[float]]] = {kind: {} for kind in PROMPTS}       # of each prompt, those of the rounds
    try:
        for number in range(rounds + 1):
            for way, found in _round(engine, speculation, new_tokens, number, ratios).items():
                for figure, value in found.items():
                    samples[way].setdefault(figure, []).extend([value] if number else [])
    finally:
        engine.speculation = speculation
    for kind, found in ratios.items():
        if found:
            samples["guessing"][f"{kind}_least_ratio"] = [min(statistics.median(each[1:]) for each in found.values())]
    return {way: {figure: values for figure, values in found.items() if values} for way, found in samples.items()}


def _round(engine: Engine, speculation, new_tokens: int, number: int, ratios: dict) -> dict[str, dict[str, float]]:
    guessing, plain, different = {}, {}, 0
    for kind, prompts in PROMPTS.items():
        pairs = []
        for turn, prompt in enumerate(prompts):
            pair: dict[str, Pending] = {}
            for way in ("guessing", "plain")[::1 if (turn + number) % 2 else -1]:
                engine.speculation = speculation if way == "guessing" else None
                pair[way] = _reply(engine, prompt, new_tokens)
            different += pair["guessing"].reply.tokens != pair["plain"].reply.tokens
            if all(one.reply.timings.decode_tokens_per_s for one in pair.values()):
                pairs.append(pair)
                ratios[kind].setdefault(prompt, []).append(_speed([pair["guessing"]]) / _speed([pair["plain"]]))
        if not pairs:                             # a model that ends every reply at once
            continue
        for way, found in (("guessing", guessing), ("plain", plain)):
            found[f"{kind}_tokens_per_s"] = _speed([pair[way] for pair in pairs])
        drafters = [pair["guessing"].draft.sequence.drafter for pair in pairs]
        if guessed := sum(drafter.guessed for drafter in drafters):
            guessing[f"{kind}_held"] = sum(drafter.held for drafter in drafters) / guessed
        made = sum(len(pair["guessing"].reply.tokens) - 1 for pair in pairs)
        guessing[f"{kind}_tokens_a_pass"] = made / max(1, sum(drafter.passes for drafter in drafters))
    guessing["different_replies"] = float(different)
    return {"guessing": guessing, "plain": plain}


def _reply(engine: Engine, prompt: str, new_tokens: int) -> Pending:
    """As a chat where the bundle has a template."""
    if engine.bundle.manifest["chat_template"]:
        pending = engine.submit_chat([{"role": "user", "content": prompt}], max_new_tokens=new_tokens, **GREEDY)
    else:
        pending = engine.submit(prompt, max_new_tokens=new_tokens, **GREEDY)
    pending.result()
    return pending


def _speed(replies: list[Pending]) -> float:
    """Tokens after the first ones, by the time that they took."""
    times = [reply.reply.timings.token_ms for reply in replies]
    return sum(len(each) - 1 for each in times) / sum(each[-1] - each[0] for each in times) * 1e3
