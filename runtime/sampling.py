"""Choose the next token from logits.

Order, as in Hugging Face `transformers`: suppressed tokens; logit bias; repetition penalty (Keskar et al. 2019, over prompt and reply);
frequency and presence penalties (OpenAI's, over the reply); temperature; top-k; top-p (nucleus, Holtzman et al. 2019:
the smallest set of most likely tokens whose mass reaches p); min-p (Nguyen et al. 2024: at least p times the
likeliest). Temperature 0 is greedy: the largest adjusted logit, the lowest id among equals, and no truncation matters.

A `Sampler` belongs to one sequence. It draws one uniform number a token from its own generator, seeded by the seed and
the number of the sample, so a reply depends neither on its neighbours in a batch nor on how many there are. The same
seed gives the same tokens wherever the logits are the same bits.

The k largest of 49,152 logits are found through maxima of strided blocks: k blocks have a maximum of at least the k-th
largest one, so everything smaller is dropped before any sorting. The logits are read, never written: they are the
backend's own buffer. Log probabilities are those of the model's own logits, before any adjustment.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .cli import arg
from .errors import UserError, shown
from .structured import Constraint

_BLOCK = 64                       # logits of a strided block, whose maxima are taken first
_SUMMED = 768                     # neighbouring weights summed first
_GREEDY_BELOW = 1e-5              # a lower temperature cannot be told from greedy in float32
_MOST, _LARGEST = 1e6, 1e30         # of penalties; of temperature and bias
_LOWEST = np.finfo(np.float32).min
_IDS = 1 << 31                    # no token id reaches it
MOST_CANDIDATES = 256             # of which a backend's own decoding loop keeps a sorted list


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; the defaults are greedy and change no logit. Raises UserError for a value out of range.

    Fields with a help text are options of the commands too (runtime/generate.py).
    """

    temperature: float = arg(0.0, help="0 always takes the likeliest token")
    top_k: int = arg(0, help="only the K likeliest tokens; 0: off")
    top_p: float = arg(1.0, help="only the likeliest tokens that together reach this probability; 1: off")
    min_p: float = arg(0.0, help="only tokens at least this times as likely as the likeliest; 0: off")
    repetition_penalty: float = arg(1.0, help="divide the logits of tokens seen in prompt or reply; 1: off")
    frequency_penalty: float = arg(0.0, help="lower a token's logit by this for each time the reply has it")
    presence_penalty: float = arg(0.0, help="lower a token's logit by this where the reply has it")
    logit_bias: dict[int, float] = field(default_factory=dict)      # token id -> added to its logit; -inf forbids it
    suppress_tokens: tuple[int, ...] | list[int] = ()               # token ids that are never chosen
    begin_suppress_tokens: tuple[int, ...] | list[int] = ()         # token ids that no reply begins with
    seed: int | None = arg(None, help="the same seed gives the same reply")
    logprobs: int | None = None       # None: none; N: log probability of each token, and of the N likeliest

    def __post_init__(self):
        # Bounds keep float32, in which logits are adjusted, from overflowing; nothing that is of use comes near them.
        number, whole, most = (int, float, np.integer, np.floating), (int, np.integer), _MOST
        self._check("temperature", lambda v: 0 <= v <= _LARGEST, f"0 (greedy) or a positive number, at most {_LARGEST:g}", number)
        self._check("top_k", lambda v: v >= 0, "0 (off) or a positive whole number", whole)
        self._check("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1 (off)", number)
        self._check("min_p", lambda v: 0 <= v <= 1, "from 0 (off) to 1", number)
        self._check("repetition_penalty", lambda v: 1 / most <= v <= most, f"a positive number, {1 / most:g} to {most:g}; 1 is off",
                    number)
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(name, lambda v: -most <= v <= most, f"a number, -{most:g} to {most:g}; 0 is off", number)
        self._check("logit_bias", lambda v: all(
            isinstance(k, whole) and not isinstance(k, bool) and 0 <= k < _IDS and isinstance(b, number) and not isinstance(b, bool)
            and (b == -math.inf or -_LARGEST <= b <= _LARGEST) for k, b in v.items()),
            f"a dict of token ids to numbers, at most {_LARGEST:g}, or -inf", dict)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            self._check(name, lambda v: all(isinstance(k, whole) and not isinstance(k, bool) and 0 <= k < _IDS for k in v), "a list of token ids",
                        (list, tuple))
        self._check("seed", lambda v: v is None or 0 <= v < 1 << 64, "a whole number from 0 to 2**64 - 1, or None", (*whole, type(None)))
        self._check("logprobs", lambda v: v is None or v >= 0, "None or a number of tokens, 0 or more", (*whole, type(None)))

    def _check(self, name: str, valid: Callable[[object], bool], rule: str, kind: type | tuple[type, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool or not valid(value):
            raise UserError(f"{name} is {value if isinstance(value, float) else shown(value)}; it must be {rule}")


def check_defaults(generation: dict, where: str, vocab: int) -> dict:
    """The sampling that a Hugging Face generation_config.json asks for, as keyword arguments of SamplingOptions: the
    repetition penalty, tokens to suppress, and with "do_sample" the temperature (1 where it says none), top-k, top-p and
    min-p. vocab: how many tokens there are. Raises UserError, which begins with `where`, where no reply could be sampled so."""
    samples, suppressed = generation.get("do_sample"), ("suppress_tokens", "begin_suppress_tokens")
    names = ["repetition_penalty", *suppressed, *(("temperature", "top_k", "top_p", "min_p") if samples else ())]
    defaults = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        if not isinstance(samples, bool | None):
            raise UserError(f"do_sample is {shown(samples)}; it must be true or false")
        if samples:
            defaults.setdefault("temperature", 1.0)
        SamplingOptions(**defaults)
        for name in suppressed:
            _within(name, defaults.get(name, ()), vocab)
    except UserError as error:
        raise UserError(f"{where}: {error}; mend it, or remove it there") from None
    return defaults


class TokenLogprobs(NamedTuple):
    """Natural-log probability of a chosen token, and of the likeliest tokens, most likely first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    text: str = ""                    # of the token alone, and of those in `top`; an engine fills them in
    top_texts: list[str] = []


class Sampler:
    """Chooses the tokens of one sequence.

    prompt: int64 [n], for the repetition penalty; sample: number of this reply among those to the same prompt. constraint:
    which tokens may come at all (runtime/structured.py): the others' logits are -inf for all that decides.
    """

    def __init__(self, options: SamplingOptions, prompt: np.ndarray, sample: int = 0, constraint: Constraint | None = None):
        self.options, self.constraint = options, constraint
        self._random = random.Random() if options.seed is None else random.Random(f"{options.seed}/{sample}")
        self._prompt = prompt
        self._counts: np.ndarray | None = None                    # times each token is in the reply so far
        self._seen: np.ndarray | None = None                      # whether it is in prompt or reply
        self.penalizes = (options.repetition_penalty, options.frequency_penalty, options.presence_penalty) != (1, 0, 0)
        self._never, self._not_first = (np.array(sorted({*tokens}), np.int64) for tokens in (
            options.suppress_tokens, {*options.suppress_tokens, *options.begin_suppress_tokens}))
        self._biased = np.array(sorted(options.logit_bias), np.int64)
        self._bias = np.array([options.logit_bias[token] for token in self._biased.tolist()], np.float32)
        self._begun = False
        self._adjusts = self.penalizes or bool(options.logit_bias) or len(self._never) > 0
        self._greedy = options.temperature < _GREEDY_BELOW
        self._truncates = options.top_k > 0 or options.top_p < 1 or options.min_p > 0

    def choose(self, logits: np.ndarray) -> int:
        """The next token from float32 logits [vocab]. Raises UserError for logits that are not numbers, and what the constraint
        raises."""
        adjusted = self._adjust(logits) if self._adjusts or len(self._not_first) and not self._begun else logits
        if self.constraint is not None:
            adjusted = self._constrained(adjusted)
        best = int(adjusted.argmax())
        peak = _finite(adjusted[best])
        if self._greedy:
            return self._chosen(best)
        if self._truncates:
            return self._draw_among(*self._candidates(adjusted, peak))
        weights = np.exp((adjusted - np.float32(peak)) / np.float32(self.options.temperature))
        return self._chosen(_draw(weights, self._random.random()))

    @property
    def candidates(self) -> int:
        """How many of the largest logits, after `penalties`, `choose_among` needs; 0: it needs more, use `choose`."""
        if self.constraint is not None or self.options.logit_bias or self.options.logprobs is not None \
                or len(self._not_first) and not self._begun:
            return 0
        wanted = 1 if self._greedy else self.options.top_k
        return wanted and wanted + len(self._never) if wanted + len(self._never) <= MOST_CANDIDATES else 0

    def choose_among(self, ids: np.ndarray, logits: np.ndarray) -> int:
        """The token `choose` would give, from the ids and adjusted logits of the `candidates` largest, largest first."""
        if len(self._never):
            kept = np.flatnonzero(~np.isin(ids, self._never))[:max(1, len(ids) - len(self._never))]
            ids, logits = ids[kept], logits[kept]
        peak = _finite(logits[0])
        if self._greedy:
            return self._chosen(int(ids[0]))
        return self._draw_among(*self._cut(ids, self._weights(logits, peak)))

    def penalties(self, vocab: int) -> tuple[SamplingOptions, np.ndarray, np.ndarray] | None:
        """Options, times of each token in the reply (int32 [vocab]) and whether it is in prompt or reply (bool [vocab]),
        both kept up to date; None where nothing is penalized."""
        if not self.penalizes:
            return None
        if self._counts is None:
            self._counts, self._seen = np.zeros(vocab, np.int32), np.zeros(vocab, bool)
            self._seen[self._prompt] = True
        return self.options, self._counts, self._seen

    def twin(self) -> Sampler:
        """Another one that draws the same from here on, without the constraint and log probabilities: what it draws changes nothing
        in this one."""
        other = copy.copy(self)
        if self.options.logprobs is not None:
            other.options = replace(self.options, logprobs=None)
        other.constraint, other._random = None, copy.copy(self._random)
        if self._counts is not None:
            other._counts, other._seen = self._counts.copy(), self._seen.copy()
        return other

    def _chosen(self, token: int) -> int:
        self._begun = True
        if self.penalizes:
            self._counts[token] += 1
            self._seen[token] = True
        if self.constraint is not None:
            self.constraint.accept(token)
        return token

    def _draw_among(self, ids: np.ndarray, weights: np.ndarray) -> int:
        cumulative = np.cumsum(weights)
        return self._chosen(int(ids[_locate(cumulative, self._random.random() * cumulative[-1])]))

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        """A copy of the logits with suppressed tokens left out, bias and penalties applied."""
        options, logits = self.options, logits.copy()
        forbidden = self._never if self._begun else self._not_first
        _within("suppress_tokens", forbidden[-1:], len(logits))
        logits[forbidden] = -np.inf
        _within("logit_bias", self._biased[-1:], len(logits))
        logits[self._biased] += self._bias
        if self.penalizes:
            self.penalties(len(logits))
            if options.repetition_penalty != 1:
                seen = np.flatnonzero(self._seen)
                values, penalty = logits[seen], np.float32(options.repetition_penalty)
                logits[seen] = np.where(values < 0, values * penalty, values / penalty)
            used = np.flatnonzero(self._counts > 0)
            logits[used] -= np.float32(options.presence_penalty) + np.float32(options.frequency_penalty) * self._counts[used]
        return logits

    def _constrained(self, logits: np.ndarray) -> np.ndarray:
        """A copy of adjusted logits with -inf for every token that the constraint does not allow."""
        words = np.zeros(-(-len(logits) // 32), np.int32)
        self.constraint.mask(words)
        allowed = np.unpackbits(words.view(np.uint8), count=len(logits), bitorder="little").view(bool)
        masked = np.where(allowed, logits, np.float32(-np.inf))
        if masked.max() == -np.inf and logits.max() > -np.inf:
            raise UserError("nothing can follow in this reply: suppress_tokens or logit_bias forbid all that its grammar allows")
        return masked

    def _candidates(self, logits: np.ndarray, peak: float) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights (exp((logit - peak) / temperature), float64) that top-k, top-p and min-p leave."""
        options = self.options
        if options.top_k:
            ids = largest(logits, options.top_k)
            return self._cut(ids, self._weights(logits[ids], peak))
        if options.top_p < 1:
            mass = options.top_p * float(np.exp((logits - np.float32(peak)) / np.float32(options.temperature)).sum(dtype=np.float64))
            count = 128
            while True:                                       # most often the first 128 hold it; else 8 times as many
                ids = largest(logits, count)
                weights = self._weights(logits[ids], peak)
                if count >= len(logits) or weights.sum() >= mass:
                    break
                count *= 8
        else:
            ids = np.flatnonzero(logits >= peak + options.temperature * math.log(options.min_p) - 1e-3)
            weights = self._weights(logits[ids], peak)
        return self._cut(ids, weights, mass / options.top_p if options.top_p < 1 else None)

    def _cut(self, ids: np.ndarray, weights: np.ndarray, total: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What top-p (of `total`, or of all these weights) and min-p leave of candidates, largest first."""
        if self.options.top_p < 1:
            total = weights.sum() if total is None else total
            keep = 1 + int(np.searchsorted(np.cumsum(weights), self.options.top_p * total))
            ids, weights = ids[:keep], weights[:keep]
        if self.options.min_p:
            keep = weights >= self.options.min_p              # the likeliest has weight 1
            ids, weights = ids[keep], weights[keep]
        return ids, weights

    def _weights(self, logits: np.ndarray, peak: float) -> np.ndarray:
        return np.exp((logits.astype(np.float64) - peak) / self.options.temperature)


def _within(name: str, tokens, vocab: int) -> None:
    if len(tokens) and max(tokens) >= vocab:
        raise UserError(f"{name} has token {max(tokens)}, but the vocabulary ends at {vocab - 1}")


def _finite(peak: np.float32) -> float:
    if not math.isfinite(peak):
        raise UserError(f"the model's largest logit is {peak}: its weights are damaged or its number format "
                        f"overflows; run `python -m {__package__}.verify` on the bundle")
    return float(peak)


def largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest logits [vocab], largest first, the lower id first among equals; fewer where others are -inf."""
    count = min(count, len(logits))
    blocks = len(logits) // _BLOCK
    pool = np.maximum.reduce(logits[:blocks * _BLOCK].reshape(_BLOCK, blocks)) if count <= blocks else logits
    floor = np.partition(pool, len(pool) - count)[len(pool) - count]    # `count` blocks reach it, so as many logits do
    ids = np.flatnonzero(logits >= max(floor, _LOWEST))
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


def token_logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """Log probabilities of `token` and of the `count` likeliest under float32 logits [vocab]."""
    peak = float(logits.max())
    log_total = peak + math.log(float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))
    return TokenLogprobs(token, float(logits[token]) - log_total,
                         [(int(i), float(logits[i]) - log_total) for i in (largest(logits, count) if count else ())])


def _draw(weights: np.ndarray, uniform: float) -> int:
    """The id in which `uniform` (0 <= uniform < 1) of the total weight falls, weights float32 [vocab] laid end to end.

    Sums of blocks are searched first: a running sum over the whole vocabulary costs ten times as much.
    """
    starts = np.arange(0, len(weights), _SUMMED)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    cumulative = np.cumsum(sums)
    target = uniform * cumulative[-1]
    block = _locate(cumulative, target)
    inside = np.cumsum(weights[starts[block]:starts[block] + _SUMMED], dtype=np.float64)
    return int(starts[block]) + _locate(inside, target - (cumulative[block] - sums[block]))


def _locate(cumulative: np.ndarray, target: float) -> int:
    """First index whose running sum exceeds `target`; where rounding leaves none, the last one of any weight."""
    return int(min(np.searchsorted(cumulative, target, "right"), np.searchsorted(cumulative, cumulative[-1], "left")))
