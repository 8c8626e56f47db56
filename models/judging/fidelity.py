"""Perplexity of a model, and how far it has moved from a reference: KL divergence and top-1 agreement, in one pass.

A text is cut into windows of `window` tokens that start `stride` tokens apart. A window scores its tokens after the
first `window - stride` (those have been scored by the window before, or, in the first window, serve as context), so
every scored token has at least `window - stride` tokens before it. With stride = window / 2 that is "the second half of
each window".

For a scored token t at which the reference gives p and the model q over the vocabulary:
    nll = -ln q(t)      kl = sum p ln(p / q)   (nats)      agreement = [argmax p = argmax q]
perplexity = exp(mean nll); bits_per_byte = sum nll / ln 2 / UTF-8 bytes of the scored text. Intervals are a 95%
bootstrap over windows, because the tokens of one window are not independent.

Model and reference are `runtime.backend.Backend`s, so PyTorch checkpoints and bundles are measured by the same lines.
Of two models with tables of other sizes (one is padded), kl and agreement count the tokens both have, each distribution
made to sum to one over them. Logits are asked for only where they are scored. A reference may also be a teacher's cached
predictions (models/formats/teacher_cache.py) over the same windows: its kl is then a lower bound, top1_agreement is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from models.judging.metrics import bootstrap
from models.progress import progress as shown
from models.formats.teacher_cache import TeacherCache
from runtime.backend import Backend
from runtime.errors import UserError


@dataclass(frozen=True)
class Window:
    ids: np.ndarray          # int64 [s]
    first: int               # index of the first token that is scored, at least 1
    n_bytes: int             # UTF-8 bytes of the scored tokens' text


def cut_windows(tokenizer, text: str, window: int, stride: int, limit: int | None = None) -> list[Window]:
    """Windows over a whole text; `tokenizer` is a runtime.text.Tokenizer. Raises UserError for a text too short."""
    if not 1 <= stride < window:
        raise UserError(f"stride is {stride}, which should be from 1 to one less than the window of {window}")
    ids, offsets = tokenizer.encode_with_offsets(text)
    ends = offsets[:, 1]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; at least 2 are needed to score one")
    # Bytes before each character, to turn the offsets (in characters) of scored tokens into bytes.
    before = np.concatenate(([0], np.cumsum([len(c.encode("utf-8", "surrogatepass")) for c in text])))
    windows, context = [], window - stride
    for start in range(0, max(len(ids) - context, 1), stride):
        part = ids[start:start + window]
        first = context if len(part) > context else max(1, len(part) // 2)      # a text shorter than one window
        windows.append(Window(part, first, int(before[ends[start + len(part) - 1]] - before[ends[start + first - 1]])))
        if len(windows) == limit:
            break
    return windows


def cached_windows(cache: TeacherCache, tokenizer, stride: int, limit: int | None = None) -> list[Window]:
    """The windows of a teacher's cache, in its order; each scores its last `stride` tokens."""
    length = cache.ids.shape[1]
    if not 1 <= stride < length:
        raise UserError(f"stride is {stride}, which should be from 1 to one less than the cache's windows of {length}")
    first, windows = length - stride, []
    for row in cache.ids[:limit]:
        whole, context = (tokenizer.decode(part.tolist()).encode() for part in (row, row[:first]))
        windows.append(Window(row.astype(np.int64), first, len(whole) - len(context)))
    return windows


def scored_logprobs(backend: Backend, ids: np.ndarray, first: int) -> torch.Tensor:
    """Log probabilities [s - first, vocab] of the tokens first..s-1 of `ids` [s], each given those before it."""
    cache = backend.new_cache(1, len(ids))
    positions = np.arange(len(ids), dtype=np.int64)[None]
    wanted = np.arange(first - 1, len(ids) - 1, dtype=np.int64)[None]
    logits = backend.forward(np.ascontiguousarray(ids[None]), positions, np.zeros(1, np.int64), wanted, cache)
    return torch.log_softmax(torch.from_numpy(np.asarray(logits[0], np.float32)), dim=-1)


@dataclass
class Fidelity:
    """Sums over the scored tokens of each window; rows are windows."""
    tokens: list[int]
    n_bytes: list[int]
    nll: list[float]
    kl: list[float]                  # empty without a reference
    agree: list[int]
    worst: list[tuple[float, np.ndarray]]   # largest KL of a token in a window, and the ids just before it

    def metrics(self) -> dict:
        """Metric names to values, each with NAME_interval beside it."""
        columns = {"tokens": self.tokens, "bytes": self.n_bytes, "nll": self.nll, "kl": self.kl, "agree": self.agree}
        data = np.array([columns[c] for c in columns if columns[c]], np.float64).T
        names = [c for c in columns if columns[c]]
        at = {c: i for i, c in enumerate(names)}

        def ratio(top: str, bottom: str, transform=lambda x: x):
            def statistic(rows):
                total = np.sum(rows, axis=0)
                return float(transform(total[at[top]] / max(total[at[bottom]], 1)))
            return statistic(data), bootstrap(list(data), statistic)

        result = {"tokens": int(sum(self.tokens))}
        wanted = {"perplexity": ratio("nll", "tokens", np.exp),
                  "bits_per_byte": ratio("nll", "bytes", lambda x: x / math.log(2))}
        if self.kl:
            wanted |= {"kl": ratio("kl", "tokens"), "top1_agreement": ratio("agree", "tokens")}
        for name, (value, interval) in wanted.items():
            result[name], result[f"{name}_interval"] = value, list(interval)
        return result


def measure(backend: Backend, windows: Iterable[Window], reference: Backend | TeacherCache | None = None, *,
            shared: int | None = None, label: str = "scoring", progress: bool = True) -> Fidelity:
    """Score every window with the model and, where given, against the reference.

    A cache as reference goes with its own `cached_windows`. shared: compare over this many first tokens.
    Raises UserError for non-finite logits.
    """
    windows = list(windows)
    result = Fidelity([], [], [], [], [], [])
    for number, window in enumerate(shown(windows, label=label, unit="window", quiet=not progress)):
        log_q = scored_logprobs(backend, window.ids, window.first)
        targets = torch.from_numpy(window.ids[window.first:])
        nll = -log_q.gather(1, targets[:, None])[:, 0].double()
        if not torch.isfinite(nll).all():
            raise UserError(f"window {number} gives logits that are not finite: the model is broken there")
        result.tokens.append(len(targets))
        result.n_bytes.append(window.n_bytes)
        result.nll.append(float(nll.sum()))
        if reference is not None:
            kl, agree = _against(reference, number, window, log_q, shared)
            result.kl.append(float(kl.sum()))
            result.agree.append(int(agree.sum()))
            at = int(kl.argmax())
            result.worst.append((float(kl[at]), window.ids[max(0, window.first + at - 24):window.first + at]))
    return result


def _against(reference: Backend | TeacherCache, number: int, window: Window,
             log_q: torch.Tensor, shared: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL from the reference in nats, whether both find the same token likeliest), float64 and bool [scored tokens]."""
    if isinstance(reference, TeacherCache):
        scored = slice(window.first - 1, len(window.ids) - 1)
        likeliest = torch.from_numpy(reference.indices[number, scored, 0].astype(np.int64))
        ours = log_q[:, :reference.state["vocabulary"]].argmax(-1)
        return reference.divergence(number, log_q, scored).double(), likeliest == ours
    log_p = scored_logprobs(reference, window.ids, window.first)
    if shared is not None:
        log_p, log_q = (torch.log_softmax(x[:, :shared], -1) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1).double(), log_p.argmax(-1) == log_q.argmax(-1)
