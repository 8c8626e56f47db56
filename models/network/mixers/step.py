"""What a mixer is told of a call, what every mixer has, and the linears and convolutions they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass
class Step:
    """One call, as one layer sees it.

    rope: cos and sin [b or 1, s, 1, head_dim / 2]. query_factors: float32 [b or 1, s, 1, 1]. mask: bool [b or 1, 1, s, n], None: causal.
    store: puts keys and values [b, kv_heads, s, head_dim] into the cache and gives all up to now; None: the rows stand alone.
    source: the layer whose keys and values this one reads. kept: those of the layers that later ones read; keeps: whether this is one.
    state: of a recurrent layer before the call, by the names of ModelConfig.state_shapes, which the mixer overwrites with that after it.
    None: zero, and nobody asks after it. counts: int64 [b], the tokens of each row that are real; None: all.
    """

    rope: tuple[Tensor, Tensor] | None = None
    query_factors: Tensor | None = None
    mask: Tensor | None = None
    store: Callable | None = None
    source: int | None = None
    number: int = 0
    keeps: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    state: dict[str, Tensor] | None = None
    counts: Tensor | None = None
    own: Tensor | None = None

    def real(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [b, s, ...] are real: bool [b, s]; None where all are."""
        return None if self.counts is None else torch.arange(x.shape[1], device=x.device) < self.counts[:, None]


@dataclass(frozen=True)
class Group:
    """Linears that read one input, and what makes that input: where compression can move a factor or a rotation between the two.

    maker: the norm (its gain is one factor a channel), or the linear (its rows are). None: what makes it is no single module, or stands
    before something that is not linear. head: where several channels of the input are one of the maker's, the size of the parts in which
    they lie: a head of v reaches the next heads of o, one after the other, as a delta rule's one gain reaches all heads. 0: the maker's
    channel i is the input's.
    """

    readers: tuple[nn.Module, ...]
    maker: nn.Module | None
    head: int = 0

    def sources(self, made: int, inputs: int) -> Tensor:
        """Of which of the maker's `made` channels each of the readers' inputs comes: int64 [inputs]."""
        head = self.head or made
        return torch.arange(made).view(-1, 1, head).expand(-1, inputs // made, -1).flatten()


class Linear(nn.Linear):
    def reset_parameters(self):
        """Left to `Decoder`, which initializes every weight once."""


class Convolution(nn.Module):
    """A causal convolution of every channel by itself: y[t] = bias + sum_j weight[:, j] x[t - kernel + 1 + j]."""

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [b, s, channels]; takes the inputs before it from the step's state, and leaves there those for the next call."""
        before = x.new_zeros(len(x), self.weight.shape[1] - 1, x.shape[2])
        if step.state is not None:
            before = step.state["conv"].transpose(1, 2).to(x.dtype)
        whole = torch.cat((before, x), 1)
        if step.state is not None:
            counts = x.new_full((len(x),), x.shape[1], dtype=torch.long) if step.counts is None else step.counts
            last = counts[:, None] + torch.arange(before.shape[1], device=x.device)
            step.state["conv"].copy_(whole.gather(1, last[:, :, None].expand(-1, -1, x.shape[2])).transpose(1, 2))
        found = F.conv1d(whole.transpose(1, 2), self.weight[:, None].to(x.dtype), None, groups=x.shape[2]).transpose(1, 2)
        return found if self.bias is None else found + self.bias
