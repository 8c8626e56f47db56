"""Golden outputs: what PyTorch answers to eight prompts, kept in a bundle as golden.json.

    {"version": 1, "source_checkpoint": sha256, "new_tokens": 32, "budgets": {runner: {"mean_kl": nats}},
     "prompts": [{"name", "text", "prompt_ids", "tokens", "top_ids", "top_logits", "logsumexp", "margins"}, ...]}

Row i of the last four holds PyTorch's float32 logits after prompt_ids + tokens[:i], the ones that choose tokens[i]: the
20 largest (ids and values, descending), ln sum exp over the whole vocabulary, and the first minus the second. So ln p
of those 20 is exact, and `runtime.verify` needs neither torch nor the checkpoint. Tokens are greedy and go on past an
end-of-sequence token. prompt_ids are what the bundle's tokenizer gives for the text, with the control tokens
that it spells.
"""

import json
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from runtime.backend import Backend
from runtime.compare import TOP
from runtime.decode import prefill, step
from runtime.golden import VERSION, Golden
from runtime.text import Tokenizer

NEW_TOKENS = 32
LONG = 500                        # tokens of the longest prompt

PROMPTS = {
    "question": "What is the capital of France?",
    "story": "Once upon a time, in a village at the edge of a great forest, there lived a clockmaker who",
    "chinese": "请用简单的话解释一下：为什么天空是蓝色的，而日落的时候却变成了红色？",
    "emoji": "Translate into plain words: 🐱 + 🐟 = 😋, but 🐱 + 🛁 = 😾💦!! 👩‍👩‍👧‍👦 🇫🇷 → ",
    "code": "def fibonacci(n: int) -> list[int]:\n    \"\"\"The first n Fibonacci numbers.\"\"\"\n    a, b = 0, 1\n    result = []\n",
    "arithmetic": "1 + 1 = 2\n12 + 30 = 42\n17 * 3 = 51\n1024 / 32 =",
    "chat": "<|im_start|>user\nName three rivers in Europe, shortest first.<|im_end|>\n<|im_start|>assistant\n",
    "long": """\
People measured time long before they agreed on what it was. The first clocks were shadows: a stick in the ground, a
row of stones, a notch on a temple step that the sun reached on one day of the year. Shadows fail at night and under
clouds, so the Egyptians let water drip from a bowl with a small hole near its base and marked the falling level with
rings. The Greeks called such a bowl a thief of water, and in the courts of Athens it decided how long a man might
speak; a rich man with a full bowl could plead until noon. In China, about the year 1090, Su Song built a tower twelve
metres high in which water filled one bucket after another, and each full bucket let a great wheel turn by one tooth.
Wooden figures came out of little doors to beat drums and ring bells. It is the oldest machine we know that counted
equal steps instead of watching something flow.

That idea, to count and not to pour, changed everything. Around 1300 the monks of Europe, who had to pray at fixed
hours, hung weights on ropes and slowed their fall with a toothed wheel and a swinging bar. These clocks had no hands
and lost a quarter of an hour a day, but every town wanted one. Then Galileo, it is said, watched a lamp swing in the
cathedral of Pisa and compared it with his pulse: a wide swing took no longer than a narrow one. He was nearly right.
Christiaan Huygens worked out in 1656 what was missing and put a pendulum into a clock, and the error fell from fifteen
minutes a day to fifteen seconds. For the first time it made sense to put a second hand on a dial.

At sea a pendulum is useless, and sailors paid for that with their lives. A ship that knows its time knows its
longitude; a ship that does not may think itself a hundred miles from the rocks on which it is about to break. In 1714
the British Parliament offered twenty thousand pounds to anyone who could find longitude to within half a degree. The
astronomers looked to the moon. A carpenter from Lincolnshire, John Harrison, looked to springs, to brass and steel that
bend in opposite ways when they are warmed, and to a jewel so hard that it needs no oil. His fourth timekeeper was no
larger than a plate. After eighty-one days on the way to Jamaica it was five seconds slow.

Today the second is no longer a part of the day. It is 9,192,631,770 beats of the light that a caesium atom takes up,
and the earth, which once gave us the hour, is itself measured against it and found to be a little late. What we have
gained is""",
}


def golden_outputs(backend: Backend, tokenizer: Tokenizer, max_context: int) -> list[Golden]:
    """Run the eight prompts, shortened where the context asks for it, through PyTorch's backend, all in one batch."""
    new_tokens = min(NEW_TOKENS, max(1, max_context // 2))
    longest = min(LONG, max_context + 1 - new_tokens)
    texts = [shorten(tokenizer, text, longest) for text in PROMPTS.values()]
    prompts = [tokenizer.encode(text, control_tokens=True) for text in texts]
    logits = batched(backend, prompts, new_tokens, lambda number, found: found.argmax(axis=1))
    return [Golden(name, text, prompt, rows.argmax(axis=1), rows)
            for name, text, prompt, rows in zip(PROMPTS, texts, prompts, logits)]


def batched(backend: Backend, prompts: list[np.ndarray], count: int,
            choose: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Logits [prompts, count, vocab] of steps as the runtime's decode loop makes them: prompts padded together, then a token
    a step for all rows, which `choose` gives by the number of the step and the logits [prompts, vocab] before it."""
    cache = backend.new_cache(len(prompts), max(map(len, prompts)) + count)
    steps = [prefill(backend, cache, prompts).copy()]
    while len(steps) < count:
        steps.append(step(backend, cache, choose(len(steps) - 1, steps[-1])).copy())
    return np.stack(steps, axis=1)


def shorten(tokenizer: Tokenizer, text: str, longest: int) -> str:
    """The longest beginning of `text`, up to tokens that straddle its end, that is at most `longest` tokens."""
    if len(tokenizer.encode(text, control_tokens=True)) <= longest:
        return text
    return text[:bisect_right(range(len(text)), longest, key=lambda n: len(tokenizer.encode(text[:n], control_tokens=True))) - 1]


def to_json(outputs: list[Golden], source_checkpoint: str, budgets: dict[str, float]) -> bytes:
    """The contents of golden.json. budgets: runner -> mean KL in nats."""
    return json.dumps({"version": VERSION, "source_checkpoint": source_checkpoint, "new_tokens": len(outputs[0].tokens),
                       "budgets": {runner: {"mean_kl": budget} for runner, budget in budgets.items()},
                       "prompts": [_prompt(output) for output in outputs]}, ensure_ascii=False).encode()


def _prompt(output: Golden) -> dict:
    logits = output.reference
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    top = np.take_along_axis(logits, top_ids, axis=1).astype(np.float64)
    logsumexp = np.logaddexp.reduce(logits.astype(np.float64), axis=1)

    def rounded(values: np.ndarray) -> list:
        return np.round(values, 6).tolist()        # finer than float32 at the size of logits

    return {"name": output.name, "text": output.text, "prompt_ids": output.prompt.tolist(),
            "tokens": output.tokens.tolist(), "top_ids": top_ids.tolist(), "top_logits": rounded(top),
            "logsumexp": rounded(logsumexp), "margins": rounded(top[:, 0] - top[:, 1])}
