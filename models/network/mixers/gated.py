"""Gated recurrent units: the GRU (Cho et al. 2014) and the LSTM (Hochreiter and Schmidhuber 1997, with Gers et al.'s forget gate).

A token updates h (and c) [hidden] and gives h, as torch.nn.GRU and torch.nn.LSTM do, with their order of gates:

    GRU   r, z = sigmoid(Wx + b + Uh + d);  n = tanh(Wx + b + r (Uh + d));  h = (1 - z) n + z h
    LSTM  i, f, o = sigmoid(Wx + b + Uh + d);  g = tanh(Wx + b + Uh + d);  c = f c + i g;  h = o tanh(c)

Weights: W weight_ih and U weight_hh [gates * hidden, hidden], b bias_ih and d bias_hh [gates * hidden]; no linears, so that nothing
that walks linears finds them. State: [1, 1, hidden], h, or [1, 2, hidden], h and c. All of it is float32. A layer of them has no MLP.
"""

import torch
from torch import Tensor, nn

from models.network.config import GATED, LayerConfig, ModelConfig
from models.network.mixers.step import Group, Step


class Gated(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.cell, self.vectors, hidden = getattr(torch, layer.mixer), config.head_size(layer), config.hidden_size
        size = GATED[layer.mixer][0] * hidden
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(size, hidden)) for _ in range(2))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(size)) for _ in range(2))

    def groups(self, norm: nn.Module | None) -> list[Group]:
        return []

    def forward(self, x: Tensor, step: Step) -> Tensor:
        state = x.new_zeros(len(x), 1, self.vectors, x.shape[2], dtype=torch.float32) if step.state is None else step.state["state"]
        with torch.autocast(x.device.type, enabled=False):
            y, after = self._run(x.float(), state.permute(2, 1, 0, 3), step.counts)
        if step.state is not None:
            step.state["state"].copy_(after.permute(2, 1, 0, 3))
        return y.to(x.dtype)

    def _run(self, x: Tensor, before: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """h after each token, and the vectors [vectors, 1, b, hidden] after each row's last real one; those before it, as given."""
        if counts is not None:                     # rows of one length together: behind their last tokens nothing is run
            y, after = torch.zeros_like(x), before.clone()
            for count in set(counts.tolist()) - {0}:
                rows = (counts == count).nonzero()[:, 0]
                y[rows, :count], after[:, :, rows] = self._run(x[rows, :count], before[:, :, rows], None)
            return y, after
        weights = [part.float() for part in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        first = [part.contiguous() for part in before]
        y, *last = self.cell(x, first[0] if self.vectors == 1 else first, weights, True, 1, 0.0, self.training, False, True)
        return y, torch.stack(last)
