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

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from models.data.records import as_messages, find_sources, read_records
from models.judging.metrics import bootstrap
from models.progress import progress
from runtime import decode
from runtime.backend import Backend
from runtime.cli import Checked, arg, run, table
from runtime.errors import UserError
from runtime.sampling import Sampler, SamplingOptions

EXAMPLES = """examples:
  python -m models.acceptance build/smollm2-135m build/draft/last --data ../shared/data/chat/alpaca-en.json
"""


@dataclass(frozen=True)
class Options(Checked):
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

import torch

from models.evaluate import write_json
from models.judging.fidelity import scored_logprobs
from models.judging.language_model import BATCH, LanguageModel, check_same_tokenizer, open_model


class _First:
    """A backend that knows only the first `vocabulary` tokens."""

    def __init__(self, backend: Backend, vocabulary: int):
        self._backend, self._vocabulary = backend, vocabulary

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def forward(self, *arguments) -> np.ndarray:
        return np.ascontiguousarray(self._backend.forward(*arguments)[..., :self._vocabulary])


def accepted(proposals: np.ndarray, reply: np.ndarray, ahead: int) -> list[int]:
    """Tokens accepted in each greedy round: proposals [n] are the draft's greedy choices in the place of reply [n]."""
    rounds, start = [], 0
    while start + ahead <= len(reply):
        agree = proposals[start:start + ahead] == reply[start:start + ahead]
        rounds.append(ahead if agree.all() else int(agree.argmin()))
        start += rounds[-1] + 1
    return rounds


def overlap(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum min(p, q) over the vocabulary [n]: the chance that a token drawn from q is accepted where the target says p."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def measure(target: LanguageModel, draft: LanguageModel, prompts: list[np.ndarray], ahead: int, tokens: int, seed: int) -> dict:
    """The figures over prompts (int64 ids). Raises UserError where no reply has room for a round."""
    if shared := check_same_tokenizer(target, draft):
        target, draft = (replace(model, backend=_First(model.backend, shared)) for model in (target, draft))
    greedy = _replies(target, prompts, tokens, SamplingOptions(), "greedy replies")
    sampled = _replies(target, prompts, tokens, SamplingOptions(temperature=1.0, seed=seed), "sampled replies")
    rounds, rates = [], []
    for prompt, reply, drawn in zip(progress(prompts, label="draft", unit="prompt"), greedy, sampled):
        if len(reply) >= ahead:
            log_q = scored_logprobs(draft.backend, np.concatenate((prompt, reply)), len(prompt))
            rounds.append(accepted(log_q.argmax(-1).numpy(), reply, ahead))
        if len(drawn):
            ids = np.concatenate((prompt, drawn))
            rates.append(overlap(*(scored_logprobs(model.backend, ids, len(prompt)) for model in (target, draft))).tolist())
    if not rounds or not rates:
        raise UserError(f"no reply has {ahead} tokens: raise --tokens, or give other prompts")

    def pooled(parts: list[list[float]]) -> float:
        return float(np.mean(np.concatenate(parts)))
    counts, rate = np.concatenate(rounds), pooled(rates)
    return {"prompts": len(prompts), "rounds": len(counts), "accepted": pooled(rounds),
            "accepted_interval": list(bootstrap(rounds, pooled)),
            "accepted_at": [float((counts >= place).mean()) for place in range(1, ahead + 1)],
            "sampled_rate": rate, "sampled_rate_interval": list(bootstrap(rates, pooled)),
            "sampled_accepted": sum(rate**place for place in range(1, ahead + 1))}


def _replies(model: LanguageModel, prompts: list[np.ndarray], tokens: int, sampling: SamplingOptions, label: str) -> list[np.ndarray]:
    """int64 tokens of each reply, without what ends it."""
    replies = []
    for start in progress(range(0, len(prompts), BATCH), label=label, unit="batch"):
        sequences = [decode.Sequence(prompt, Sampler(sampling, prompt, start + number), tokens, model.eos)
                     for number, prompt in enumerate(prompts[start:start + BATCH])]
        cache = model.backend.new_cache(len(sequences), decode.first_capacity(sequences))
        for _ in decode.run(model.backend, cache, sequences):
            pass
        replies += [np.array(sequence.tokens, np.int64) for sequence in sequences]
    return replies


def acceptance(options: Options) -> None:
    """Read the prompts, measure, print the table. Raises UserError for input that cannot be used."""
    records = islice(read_records(find_sources(options.data)), options.skip, options.skip + options.limit)
    questions = [next(m["content"] for m in as_messages(record) if m["role"] == "user") for record in records]
    target, draft = open_model(options.target), open_model(options.draft)
    room = min(target.context, draft.context) - options.tokens
    prompts = [ids for ids in map(target.chat_prompt, questions) if len(ids) <= room]
    if not prompts:
        raise UserError(f"{options.data[0]}: none of {len(questions)} prompts leaves room for {options.tokens} tokens in the "
                        f"context of {min(target.context, draft.context)}: give others, or lower --skip or --tokens")
    figures = measure(target, draft, prompts, options.ahead, options.tokens, options.seed)
    print(f"{figures['prompts']} prompts, {figures['rounds']} rounds of {options.ahead} tokens")
    rows = [{"": f"accepted of {options.ahead}, greedy", "value": figures["accepted"], "interval": figures["accepted_interval"]}]
    rows += [{"": f"token {place} accepted, greedy", "value": share} for place, share in enumerate(figures["accepted_at"], 1)]
    rows += [{"": "accepted a token, sampled", "value": figures["sampled_rate"], "interval": figures["sampled_rate_interval"]},
             {"": f"accepted of {options.ahead}, sampled", "value": figures["sampled_accepted"]}]
    print(table([{"": row[""], "value": f"{row['value']:.3f}", "95% interval": "{:.3f} to {:.3f}".format(*row["interval"])
                  if "interval" in row else ""} for row in rows]))
    if options.json:
        write_json(options.json, figures)
