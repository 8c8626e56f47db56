"""How many tokens of a draft model a target model would accept in speculative decoding, on chat prompts.

    python -m models.acceptance TARGET DRAFT --data chat.json

Greedy: the target's own greedy reply is what speculative decoding would write, so a round that starts after its first t
tokens accepts as many of the draft's greedy proposals, at most `ahead`, as agree with it in a row; the next round starts
after those and one token of the target's. A round too near the end to fit `ahead` proposals is left out.

Sampled, temperature 1: on a reply drawn from the target, a draft's token drawn from q is accepted with probability
sum min(p, q) where the target says p (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding");
its mean is the rate, and rate + ... + rate^ahead tokens a round follow where positions are alike.

One pass of the draft over each reply tells all of this: a proposal counts only where all before it agreed, and there the
draft's context is the reply itself. Of two models with tables of other sizes (one is padded), both speak the tokens that
both have. Checkpoints and bundles alike; no time is measured here.
"""

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from models.data.records import as_messages, find_sources, read_records
from models.device import DeviceOptions
from models.judging.metrics import bootstrap
from models.progress import progress
from runtime.cli import arg, run, table
from runtime.errors import UserError

EXAMPLES = """examples:
  python -m models.acceptance build/smollm2-135m build/draft/last --data ../shared/data/chat/alpaca-en.json
"""


@dataclass(frozen=True)
class Options(DeviceOptions):
    """Measure how many of a draft model's tokens a target model accepts."""
    target: Path = arg(positional=True, help="checkpoint or bundle folder of the model that decides")
    draft: Path = arg(positional=True, help="checkpoint or bundle folder of the model that proposes")
    data: tuple[str, ...] = arg(help="chats or instructions: the first user message of each is a prompt")
    skip: int = arg(0, help="leave out this many of the first records", least=0)
    limit: int = arg(32, help="prompts to use", least=1)
    ahead: int = arg(4, help="tokens proposed in a round", least=1)
    tokens: int = arg(64, help="tokens of a reply, at most", least=1)
    seed: int = arg(0, help="of the sampled replies", least=0, most=2**63 - 1)
    json: Path | None = arg(None, help="write the figures to this file")


def main(argv=None) -> int:
    return run(Options, "acceptance", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from models.evaluate import write_json
from models.judging import on_device
from models.judging.language_model import LanguageModel, check_same_tokenizer, judging_on
from runtime.compare import log_softmax
from runtime.decode import logits
from runtime.sampling import SamplingOptions


def accepted(proposals: np.ndarray, reply: np.ndarray, ahead: int) -> list[int]:
    """Tokens accepted in each greedy round: proposals [n] are the draft's greedy choices in the place of reply [n]."""
    rounds, start = [], 0
    while start + ahead <= len(reply):
        agree = proposals[start:start + ahead] == reply[start:start + ahead]
        rounds.append(ahead if agree.all() else int(agree.argmin()))
        start += rounds[-1] + 1
    return rounds


def overlap(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """sum min(p, q) over the vocabulary [n]: the chance that a token drawn from q is accepted where the target says p."""
    return np.exp(np.minimum(log_p, log_q)).sum(axis=-1)


def measure(target: LanguageModel, draft: LanguageModel, prompts: list[np.ndarray], ahead: int, tokens: int, seed: int) -> dict:
    """The figures over prompts (int64 ids). Raises UserError where no reply has room for a round."""
    shared = check_same_tokenizer(target, draft)
    unshared = dict.fromkeys(range(shared or target.vocab_size, target.vocab_size), -math.inf)
    drawing = SamplingOptions(logit_bias=unshared, temperature=1.0, seed=seed)
    greedy = target.generate(prompts, tokens, sampling=SamplingOptions(logit_bias=unshared), label="greedy replies")
    sampled = target.generate(prompts, tokens, sampling=drawing, label="sampled replies")

    there = on_device.computes_there(target.backend, draft.backend)

    def said(model: LanguageModel, prompt: np.ndarray, reply: list[int]):
        """Its logits [n, shared vocabulary] in the place of each token of the reply; where both compute on a device, a tensor there."""
        tokens = np.array([*prompt, *reply], np.int64)
        if there:
            return on_device.said(model.backend, tokens, len(prompt))[:, :shared]
        return logits(model.backend, tokens[:-1], len(prompt) - 1)[:, :shared]

    rounds, rates = [], []
    for prompt, likeliest, drawn in zip(progress(prompts, label="draft", unit="prompt"), greedy, sampled):
        if len(likeliest.tokens) >= ahead:
            proposals = said(draft, prompt, likeliest.tokens).argmax(-1)
            rounds.append(accepted(proposals.cpu().numpy() if there else proposals, np.array(likeliest.tokens), ahead))
        if drawn.tokens:
            both = [said(model, prompt, drawn.tokens) for model in (target, draft)]
            rates.append(on_device.overlap(*both) if there else overlap(*map(log_softmax, both)))
    if not rounds or not rates:
        raise UserError(f"no reply has {ahead} tokens: raise --tokens, or give other prompts")

    def pooled(parts: list) -> float:
        return float(np.mean(np.concatenate(parts)))
    counts, rate = np.concatenate(rounds), pooled(rates)
    return {"prompts": len(prompts), "rounds": len(counts), "accepted": pooled(rounds),
            "accepted_interval": list(bootstrap(rounds, pooled)),
            "accepted_at": [float((counts >= place).mean()) for place in range(1, ahead + 1)],
            "sampled_rate": rate, "sampled_rate_interval": list(bootstrap(rates, pooled)),
            "sampled_accepted": sum(rate**place for place in range(1, ahead + 1))}


def acceptance(options: Options) -> None:
    """Read the prompts, measure, print the table. Raises UserError for input that cannot be used."""
    records = islice(read_records(find_sources(options.data)), options.skip, options.skip + options.limit)
    questions = [next(m["content"] for m in as_messages(record) if m["role"] == "user") for record in records]
    with judging_on(options.device, options.target, options.draft) as opened:
        _acceptance(options, questions, *map(opened, (options.target, options.draft)))


def _acceptance(options: Options, questions: list[str], target: LanguageModel, draft: LanguageModel) -> None:
    room = min(target.context, draft.context) - options.tokens
    prompts = [ids for ids in map(target.chat_prompt, questions) if len(ids) <= room]
    if not prompts:
        raise UserError(f"{options.data[0]}: none of {len(questions)} prompts leaves room for {options.tokens} tokens in the "
                        f"context of {min(target.context, draft.context)}: give others, or lower --skip or --tokens")
    figures = measure(target, draft, prompts, options.ahead, options.tokens, options.seed)
    print(f"{figures['prompts']} prompts, {figures['rounds']} rounds of {options.ahead} tokens")
    rows = [(f"accepted of {options.ahead}, greedy", figures["accepted"], figures["accepted_interval"]),
            *((f"token {n} accepted, greedy", share, None) for n, share in enumerate(figures["accepted_at"], 1)),
            ("accepted a token, sampled", figures["sampled_rate"], figures["sampled_rate_interval"]),
            (f"accepted of {options.ahead}, sampled", figures["sampled_accepted"], None)]
    print(table([{"": title, "value": f"{value:.3f}", "95% interval": interval and "{:.3f} to {:.3f}".format(*interval)}
                 for title, value, interval in rows]))
    if options.json:
        write_json(options.json, figures)
