"""The keyword arguments of an engine: how a reply is made, and how its request is scheduled."""

import math
import numbers
from dataclasses import dataclass

import numpy as np

from .cli import arg
from .errors import UserError, shown
from .sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How a reply is made; the keyword arguments of `generate`, `stream`, `chat` and `stream_chat`. Where the model's
    generation_config.json has sampling values, an engine takes those in place of these defaults."""

    max_new_tokens: int | None = arg(None, help="tokens of a reply at most; default: 256, or what the context leaves")
    stop: tuple[str, ...] | str = arg((), help="end the reply before any of these texts; a special token's spelling counts")
    stop_tokens: tuple[int, ...] = ()         # token ids that end the reply, besides the model's own
    ignore_model_stop: bool = False           # go on past the model's own end-of-text tokens
    control_tokens: bool = arg(False, help="take control tokens that a text spells, such as <|im_end|>, for the token, not for text")

    def __post_init__(self):
        super().__post_init__()
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, (list, tuple)) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise UserError(f"stop strings are {shown(stops)}; each must be text of at least one character")
        self._check("max_new_tokens", lambda v: v is None or v >= 1, "a whole number of at least 1", (int, np.integer, type(None)))
        self._check("stop_tokens", lambda v: getattr(v, "ndim", 1) == 1 and all(is_id(token) and token >= 0 for token in v), "token ids",
                    (list, tuple, set, frozenset, np.ndarray))
        for name in ("ignore_model_stop", "control_tokens"):
            self._check(name, lambda v: True, "true or false", bool)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(GenerationOptions):
    """The keyword arguments of `submit` and `submit_chat`."""

    sample: int = 0                           # which of the replies to the same prompt this is, for its seed
    priority: float = 0                       # the larger, the sooner
    deadline_s: float | None = None           # given up (`Expired`) so many seconds from now
    user: str = ""                            # among equals, whose user has fewer running requests goes first
    prompt_logprobs: int | None = None        # tell the prompt's own log probabilities, and so many likeliest tokens of each
    constraint: object = None                 # what tokens may come next: see structured.py
    spelled: frozenset[int] = frozenset()     # control tokens whose spelling stands in the text

    def __post_init__(self):
        super().__post_init__()
        self._check("sample", lambda v: v >= 0, "a whole number of at least 0", (int, np.integer))
        self._check("priority", math.isfinite, "a finite number", numbers.Real)
        self._check("deadline_s", lambda v: v is None or v > 0, "a positive number of seconds, or None", (numbers.Real, type(None)))
        self._check("user", lambda v: True, "a text", str)
        self._check("prompt_logprobs", lambda v: v is None or v >= 0, "None or a number of tokens, 0 or more", (int, np.integer, type(None)))
        self._check("spelled", lambda v: all(map(is_id, v)), "a frozenset of token ids", frozenset)


def is_id(value) -> bool:
    """Whether it is a whole number, which numpy's are and True is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
