"""How far a student's next-token distribution is from its teacher's: the divergences of distillation.

    loss = divergence("skew", 0.1)(log_p, log_q)        # [..., events] each -> nats [...]

log_p and log_q are log-probabilities of the teacher and the student over the same events, each summing to one: the
vocabulary, or the teacher's top-k tokens and "any other" (chunked_loss.py). Gradients pass through both.

- "forward": KL(p || q). The student covers all that the teacher might say (Hinton et al. 2015, less its constant).
- "reverse": KL(q || p). The student says only what the teacher would (Gu et al. 2023, "MiniLLM").
- "js": generalized Jensen-Shannon, b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q (Agarwal et al. 2024, "GKD").
- "skew": KL(p || a p + (1 - a) q): gradients stay bounded where q is near zero (Ko et al. 2024, "DistiLLM").
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.errors import UserError

DEFAULT_MIX = {"js": 0.5, "skew": 0.1}
Divergence = Callable[[Tensor, Tensor], Tensor]


def divergence(kind: str, mix: float | None = None) -> Divergence:
    """By its name. mix: js's b or skew's a, between 0 and 1. Raises UserError for a mix of no use."""
    if kind not in DEFAULT_MIX:
        if mix is not None:
            raise UserError(f"--mix is for --loss js and skew, and {kind} has nothing to mix")
        return {"forward": kl, "reverse": lambda log_p, log_q: kl(log_q, log_p)}[kind]
    mix = DEFAULT_MIX[kind] if mix is None else mix
    if not 0 < mix < 1:
        raise UserError(f"--mix is {mix}, which should be above 0 and below 1")
    first, second = math.log(mix), math.log1p(-mix)
    between = lambda log_p, log_q: torch.logaddexp(log_p + first, log_q + second)                 # noqa: E731
    if kind == "skew":
        return lambda log_p, log_q: kl(log_p, between(log_p, log_q))

    def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
        middle = between(log_p, log_q)
        return mix * kl(log_p, middle) + (1 - mix) * kl(log_q, middle)
    return jensen_shannon


def mass_beyond(logits: Tensor, shared: int) -> Tensor:
    """-ln of the probability that logits [..., vocab] give to the first `shared` tokens together.

    What a divergence over those alone leaves out: with it, KL(p || q) has the gradient of one over all, p being 0 beyond.
    """
    logits = logits.float()
    return torch.logsumexp(logits, -1) - torch.logsumexp(logits[..., :shared], -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
