"""Perplexity of a model, and how far it has moved from a reference: KL divergence and top-1 agreement, in one pass.

A text is cut into windows of `window` tokens that start `stride` tokens apart. A window scores its tokens after the
first `window - stride`, which the window before has scored; so every scored token has at least so many before it.

For a scored token t at which the model gives q over the vocabulary, nll = -ln q(t); perplexity = exp(mean nll);
token_accuracy is how often t is the likeliest; bits_per_byte = sum nll / ln 2 / UTF-8 bytes of the scored text;
kl and top1_agreement are those of runtime/compare.py.
Intervals are a 95% bootstrap over windows, because the tokens of one window are not independent.

Of two models with tables of other sizes (one is padded), kl and agreement count the tokens both have, each distribution
made to sum to one over them. A reference may also be a teacher's cached predictions over the same windows
(models/formats/teacher_cache.py): its kl is then a lower bound, top1_agreement is exact.

Models that compute on a device are measured there (models/judging/on_device.py).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from models.formats.teacher_cache import TeacherCache
from models.judging import on_device
from models.judging.metrics import bootstrap
from models.judging.texts import Text
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


def cut_windows(text: Text, window: int, stride: int, limit: int | None = None) -> list[Window]:
    """Windows over a whole text. Raises UserError for a text too short."""
    if not 1 <= stride < window:
        raise UserError(f"stride is {stride}, which should be from 1 to one less than the window of {window}")
    ids, ends = text.ids, text.ends
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; at least 2 are needed to score one")
    windows, context = [], window - stride
    for start in range(0, max(len(ids) - context, 1), stride):
        part = ids[start:start + window]
        first = context if len(part) > context else max(1, len(part) // 2)      # a text shorter than one window
        windows.append(Window(part, first, int(ends[start + len(part) - 1] - ends[start + first - 1])))
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
    right: int                                           # tokens that were the likeliest
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
        ratio("token_accuracy", "right", "tokens")
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
    windows, result = list(windows), []
    found = (on_device.figures if on_device.computes_there(backend, reference) else _figures)(backend, windows, reference, shared)
    for number, (nll, right, kl, differs) in enumerate(shown(found, total=len(windows), label=label, unit="window", quiet=not progress)):
        if not np.isfinite(nll).all():
            raise UserError(f"window {number} gives logits that are not finite: the model is broken there")
        window, more = windows[number], {}
        if kl is not None:
            at = int(kl.argmax())
            more = {"kl": float(kl.sum()), "agree": int((~differs).sum()),
                    "worst": (float(kl[at]), window.ids[max(0, window.first + at - 24):window.first + at])}
        result.append(Scored(len(nll), window.n_bytes, float(nll.sum()), int(right.sum()), **more))
    return Fidelity(result)


def _figures(backend: Backend, windows: list[Window], reference: Backend | TeacherCache | None,
             shared: int | None) -> Iterator[on_device.Figures]:
    """What `on_device.figures` gives, of any backends."""
    for number, window in enumerate(windows):
        ids, first = window.ids, window.first
        ours = logits(backend, ids[:-1], first - 1)
        nll = -np.array([token_logprobs(row, target, 0).logprob for row, target in zip(ours, ids[first:])])
        right = ours.argmax(axis=1) == ids[first:]
        if reference is None or not np.isfinite(nll).all():
            yield nll, right, None, None
            continue
        if isinstance(reference, TeacherCache):
            found = compare(reference.top(number, slice(first - 1, len(ids) - 1)), reference.within(ours))
        else:
            found = compare(logits(reference, ids[:-1], first - 1)[:, :shared], ours[:, :shared])
        yield nll, right, found.kl, found.differs
