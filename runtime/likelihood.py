"""How likely a model finds given continuations of a prompt: the prompt is read once, for all of them."""

from collections.abc import Callable, Sequence

import numpy as np

from . import decode
from .backend import Backend, Cache
from .compare import log_softmax
from .errors import UserError


def continued(backend: Backend, tail: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """ln p of each token of `tail` (int64 [n], n >= 2) after the first, and whether it is the likeliest, [n - 1] each."""
    log_p = log_softmax(decode.logits(backend, tail[:-1], cache=cache))
    return log_p[np.arange(len(log_p)), tail[1:]], log_p.argmax(axis=1) == tail[1:]


def score_tails(backend: Backend, ids: np.ndarray, tails: Sequence[np.ndarray],
                after: Callable[[Backend, np.ndarray, Cache], tuple[np.ndarray, np.ndarray]] = continued) -> list[tuple[float, bool]]:
    """ln p(tail | ids) of each tail (int64 [n], n >= 1), and whether greedy decoding would write it. after: see `continued`."""
    if min(map(len, tails)) == 0:
        raise UserError("a continuation has no tokens")
    cache = backend.new_cache(1, len(ids) + max(map(len, tails)))
    (first,), scores = log_softmax(decode.logits(backend, ids, len(ids) - 1, cache)), []
    read = cache.snapshot(0)
    for tail in tails:
        log_p, likeliest = first[tail[:1]], first.argmax() == tail[:1]
        if len(tail) > 1:
            cache.restore(0, read)
            log_p, likeliest = map(np.append, (log_p, likeliest), after(backend, tail, cache))
        scores.append((float(log_p.sum()), bool(likeliest.all())))
    return scores


def shares(scores: Sequence[float]) -> np.ndarray:
    """float64 probabilities of continuations among each other, from their ln p."""
    powers = np.exp(np.asarray(scores, np.float64) - max(scores))
    return powers / powers.sum()
