"""How far a model's logits are from a reference's, token by token: KL divergence, the likeliest token, near ties.

Where the reference gives p over the vocabulary and the model q, KL(p || q) = sum p ln(p / q), in nats. Where of the
reference only the likeliest tokens are known (`Top`), all others count as one event: a lower bound of the whole. A token
that differs where the reference's first two logits were closer than the noise is a near tie, not an error; the noise is
twice the largest difference of a logit among the 20 likeliest, a constant over all of them taken off, as that changes no
probability. Computed in float64, a token at a time: a vocabulary of doubles stays in the CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOP = 20                          # likeliest tokens that noise is taken over, and golden outputs keep


@dataclass(frozen=True)
class Top:
    """What a model said of the k likeliest tokens at each of t."""

    ids: np.ndarray               # int64 [t, k], likeliest first
    log_p: np.ndarray             # float64 [t, k]
    log_rest: np.ndarray          # float64 [t], of all others together


@dataclass(frozen=True)
class Comparison:
    """Of t tokens; every field is an array [t]."""

    kl: np.ndarray                # nats
    differs: np.ndarray           # bool: the likeliest token is another
    near_tie: np.ndarray          # bool: it is, and the first two were within the noise

    @classmethod
    def joined(cls, parts: list[Comparison]) -> Comparison:
        """Of all their tokens, one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("kl", "differs", "near_tie")))

    @property
    def first(self) -> int | None:
        """The first token that differs, or None."""
        return int(self.differs.argmax()) if self.differs.any() else None

    def keeps(self, budget: float) -> bool:
        """Whether the mean KL is within a budget in nats: NaN is not, and a divergence below zero is none."""
        return bool(abs(self.kl.mean()) <= budget)

    def row(self) -> dict:
        """Figures for a table."""
        return {"mean KL": f"{self.kl.mean():.1e}", "max KL": f"{self.kl.max():.1e}",
                "same top-1": f"{1 - self.differs.mean():.1%}", "near ties": int(self.near_tie.sum()),
                "differ": int((self.differs & ~self.near_tie).sum())}


def compare(reference: np.ndarray | Top, logits: np.ndarray) -> Comparison:
    """Compare logits [t, vocab] with the reference's, or with its `Top`."""
    with np.errstate(over="ignore", invalid="ignore"):       # logits that are no one's: an infinite KL, or none
        if isinstance(reference, Top):
            ids, before = reference.ids, reference.log_p
            kl = np.array([_kl_of_top(*one, row) for *one, row in zip(ids, before, reference.log_rest, logits)])
        else:
            ids = np.array([_likeliest(row) for row in reference])
            before = np.take_along_axis(reference, ids, axis=1)
            kl = np.array([_kl(log_softmax(p), log_softmax(q)) for p, q in zip(reference, logits)])
        change = np.take_along_axis(logits, ids, axis=1) - before
        noise = 2 * np.abs(change - change.mean(axis=1, keepdims=True)).max(axis=1)
        margin = before[:, 0] - before[:, 1] if before.shape[1] > 1 else np.inf
        differs = logits.argmax(axis=1) != ids[:, 0]
        return Comparison(kl, differs, differs & (margin < noise))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of logits [..., vocab], float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_rest(log_p: np.ndarray) -> np.ndarray:
    """Of log probabilities [..., k], the log of the mass that they leave, at least 1e-12."""
    return np.log(np.maximum(1 - np.exp(log_p).sum(axis=-1), 1e-12))


def _likeliest(logits: np.ndarray) -> np.ndarray:
    """Ids of the TOP largest logits [vocab], largest first."""
    count = min(TOP, len(logits))
    ids = np.sort(np.argpartition(logits, -count)[-count:])
    return ids[np.argsort(-logits[ids], kind="stable")]


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return (np.exp(log_p) * (log_p - log_q)).sum()


def _kl_of_top(ids: np.ndarray, log_p: np.ndarray, rest_p: float, logits: np.ndarray) -> float:
    log_q = log_softmax(logits)[ids]
    return _kl(log_p, log_q) + np.exp(rest_p) * (rest_p - log_rest(log_q))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 1 where both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))
