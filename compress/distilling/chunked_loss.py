"""A loss over the vocabulary whose logits are never in memory all at once, and the top-k form of a student's prediction.

    total = chunked_loss(hidden, head_weight, loss)             # loss(logits [n, vocab], slice of the tokens) -> sum

`chunked_loss` makes the logits of CHUNK tokens at a time, in autocast's type, and puts their gradient in their place
right there, ROWS tokens at a time: what stays for the backward pass is one gradient the size of `hidden` and one the
size of the head, and float32 copies of logits are never longer than ROWS (small enough for memory that the allocator
reuses instead of asking the system anew). That is a CPU's way. A GPU would do nothing but begin such small kernels: there both
are as many tokens as have FAR_LOGITS logits.

`top_events` turns logits into log-probabilities of given tokens and of "any other token" as one more event. Its
gradient is written out, because autograd's way keeps several float32 copies of the logits:
for event gradients g, with S their sum, d/dz_j = g_j - q_j S where j is given, (g_other / q_other - S) q_j elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.network.decoder import for_products

CHUNK = 1024                      # tokens whose logits are in memory at once
FROZEN_CHUNK = 256                # the same where the head is not trained
ROWS = 64                         # tokens whose logits go through the loss at once
FAR_LOGITS = 1 << 26              # on a GPU, numbers: 0.3 GB in float32, of which a loss keeps some six copies for a moment
ChunkLoss = Callable[[Tensor, slice], Tensor]


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits, in float32, go through a loss at once."""
    return ROWS if device.type == "cpu" else max(ROWS, FAR_LOGITS // vocabulary)


def chunks(tokens: int, size: int, first: int = 0) -> list[slice]:
    """first .. tokens in slices of `size`."""
    return [slice(start, min(start + size, tokens)) for start in range(first, tokens, size)]


def chunked_loss(hidden: Tensor, head: Tensor, loss: ChunkLoss) -> Tensor:
    """Sum of `loss` over the chunks of hidden [n, hidden] through head [vocab, hidden]; differentiable in both."""
    return _ChunkedLoss.apply(hidden, head, loss)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, head: Tensor, loss: ChunkLoss) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        hidden_gradient, head_gradient = torch.empty_like(hidden), None
        weight, inputs = for_products(head), for_products(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            # each chunk adds up a gradient the size of the head; where it is frozen, short chunks cost nothing
            rows_each, size = tokens_at_once(hidden.device, len(head)), CHUNK if head.requires_grad else min(CHUNK, FROZEN_CHUNK)
            if hidden.device.type != "cpu":
                size = rows_each
            buffer = inputs.new_empty(min(size, len(inputs)), len(weight))
            for part in chunks(len(inputs), size):
                logits = torch.mm(inputs[part], weight.T, out=buffer[:part.stop - part.start])
                for rows in chunks(part.stop, rows_each, part.start):
                    here = logits[rows.start - part.start:rows.stop - part.start]
                    with torch.enable_grad():
                        leaf = here.detach().requires_grad_()
                        value = loss(leaf, rows)
                    here.copy_(torch.autograd.grad(value, leaf)[0])
                    total += value.detach()
                hidden_gradient[part] = logits @ weight
                if head.requires_grad:
                    more = logits.T @ inputs[part]
                    head_gradient = more.to(head.dtype) if head_gradient is None else head_gradient.add_(more)
        context.save_for_backward(hidden_gradient, head_gradient)
        return total

    @staticmethod
    def backward(context, gradient: Tensor):
        hidden, head = context.saved_tensors
        return hidden * gradient, None if head is None else head.mul_(gradient), None


def top_events(logits: Tensor, index: Tensor) -> Tensor:
    """Float32 log-probabilities [n, k + 1] of the tokens index [n, k] and, last, of all others; logits [n, vocab]."""
    return _TopEvents.apply(logits, index)


class _TopEvents(torch.autograd.Function):
    @staticmethod
    def forward(context, logits: Tensor, index: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        largest = logits.amax(-1, keepdim=True).to(wide)
        weights = (logits - largest).exp_()
        given = logits.gather(-1, index).to(wide) - largest
        weights.scatter_(-1, index, 0.0)
        others = weights.sum(-1, keepdim=True)                      # summed, not 1 - the rest: it may be tiny
        total = others + given.exp().sum(-1, keepdim=True)
        others = others.clamp_min(torch.finfo(wide).tiny)
        context.save_for_backward(weights, index, given, others, total)
        context.dtype = logits.dtype
        return torch.cat((given, others.log()), -1) - total.log()

    @staticmethod
    def backward(context, gradient: Tensor):
        weights, index, given, others, total = context.saved_tensors
        every = gradient.sum(-1, keepdim=True)
        found = weights * (gradient[:, -1:] / others - every / total)
        found.scatter_(-1, index, gradient[:, :-1] - given.exp() / total * every)
        return found.to(context.dtype), None
