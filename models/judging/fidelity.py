"""Perplexity of a model, and how far it has moved from a reference: KL divergence and top-1 agreement, in one pass.

A text is cut into windows of `window` tokens that start `stride` tokens apart. A window scores its tokens after the
first `window - stride`, which the window before has scored; so every scored token has at least so many before it.

For a scored token t at which the model gives q over the vocabulary, nll = -ln q(t); perplexity = exp(mean nll);
bits_per_byte = sum nll / ln 2 / UTF-8 bytes of the scored text; kl and top1_agreement are those of runtime/compare.py.
Intervals are a 95% bootstrap over windows, because the tokens of one window are not independent.

Of two models with tables of other sizes (one is padded), kl and agreement count the tokens both have, each distribution
made to sum to one over them. A reference may also be a teacher's cached predictions over the same windows
(models/formats/teacher_cache.py): its kl is then a lower bound, top1_agreement is exact.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from models.formats.teacher_cache import TeacherCache
from models.judging.metrics import bootstrap
from models.progress import progress as shown
from runtime.backend import Backend
from runtime.compare import compare
from runtime.decode import logits
from runtime.errors import UserError
from runtime.sampling import token_logprobs


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


@dataclass(frozen=True)
class Scored:
    """Sums over the scored tokens of a window; without a reference, kl, agree and worst are None."""
    tokens: int
    n_bytes: int
    nll: float
    kl: float | None = None
    agree: int | None = None
    worst: tuple[float, np.ndarray] | None = None        # largest KL of a token, and the ids just before it


@dataclass(frozen=True)
class Fidelity:
    windows: list[Scored]

    def metrics(self) -> dict:
        """Metric names to values, each with NAME_interval beside it."""
        result = {"tokens": sum(w.tokens for w in self.windows)}

        def ratio(name: str, top: str, bottom: str, transform=float) -> None:
            def statistic(rows):
                above, below = np.sum(rows, axis=0)
                return float(transform(above / max(below, 1)))
            rows = [np.array([getattr(w, top), getattr(w, bottom)], np.float64) for w in self.windows]
            result[name], result[f"{name}_interval"] = statistic(rows), list(bootstrap(rows, statistic))

        ratio("perplexity", "nll", "tokens", np.exp)
        ratio("bits_per_byte", "nll", "n_bytes", lambda x: x / math.log(2))
        if all(w.kl is not None for w in self.windows):
            ratio("kl", "kl", "tokens")
            ratio("top1_agreement", "agree", "tokens")
        return result


def measure(backend: Backend, windows: Iterable[Window], reference: Backend | TeacherCache | None = None, *,
            shared: int | None = None, label: str = "scoring", progress: bool = True) -> Fidelity:
    """Score every window with the model and, where given, against the reference.

    A cache as reference goes with its own `cached_windows`. shared: compare over this many first tokens.
    Raises UserError for non-finite logits.
    """
    result = []
    for number, window in enumerate(shown(list(windows), label=label, unit="window", quiet=not progress)):
        ids, first = window.ids, window.first
        ours, targets = logits(backend, ids[:-1], first - 1), ids[first:]
        nll = -np.array([token_logprobs(row, target, 0).logprob for row, target in zip(ours, targets)])
        if not np.isfinite(nll).all():
            raise UserError(f"window {number} gives logits that are not finite: the model is broken there")
        scored = Scored(len(targets), window.n_bytes, float(nll.sum()))
        if reference is not None:
            if isinstance(reference, TeacherCache):
                found = compare(reference.top(number, slice(first - 1, len(ids) - 1)), reference.within(ours))
            else:
                found = compare(logits(reference, ids[:-1], first - 1)[:, :shared], ours[:, :shared])
            at = int(found.kl.argmax())
            worst = float(found.kl[at]), ids[max(0, first + at - 24):first + at]
            scored = replace(scored, kl=float(found.kl.sum()), agree=int((~found.differs).sum()), worst=worst)
        result.append(scored)
    return Fidelity(result)
