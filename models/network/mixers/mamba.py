"""Mamba-2 (Dao and Gu 2024, "Transformers are SSMs"), as Granite 4 has it: every head keeps a matrix S [head_dim, state_dim] in float32.

    S = exp(decay dt) S + dt x B^T;   y = S C + D x;   decay = -exp(A_log), dt = softplus(dt(u) + dt_bias)

x, B and C pass a convolution; heads of one group share B and C; y is multiplied by silu(z) and then normalized over each group's heads.
A chunk of tokens goes through in closed form: y_t reads exp(G_t - G_s) dt_s (C_t . B_s) x_s of every s <= t, G the running sum of decay dt.

Weights: z, xbc, dt and out linears, the taps of the convolution, A_log, dt_bias and D a head, a gain. State: S, and the last kernel - 1
inputs of the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network.config import LayerConfig, ModelConfig
from models.network.mixers.step import Convolution, Group, Linear, Step

CHUNK = 64


class Mamba(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        hidden, size = config.hidden_size, config.head_size(layer)
        self.heads, self.per_group = layer.heads, layer.heads // layer.kv_heads
        inner, shared = layer.heads * size, layer.kv_heads * layer.state_dim
        self.parts, self.size, self.state_dim = [inner, shared, shared], size, layer.state_dim
        self.z_proj, self.xbc_proj = Linear(hidden, inner, bias=False), Linear(hidden, sum(self.parts), bias=False)
        self.dt_proj = Linear(hidden, layer.heads, bias=False)
        self.conv = Convolution(sum(self.parts), layer.kernel, config.conv_bias)
        self.A_log, self.dt_bias, self.D = (nn.Parameter(torch.empty(layer.heads)) for _ in range(3))
        self.norm = nn.RMSNorm(inner, eps=config.norm_eps)
        self.out_proj = Linear(inner, hidden, bias=False)

    @property
    def writer(self) -> nn.Module:
        return self.out_proj

    def groups(self, norm: nn.Module | None) -> list[Group]:
        return [Group((self.z_proj, self.xbc_proj, self.dt_proj), norm), Group((self.out_proj,), self.norm)]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        u, b, c = F.silu(self.conv(self.xbc_proj(x), step)).float().split(self.parts, -1)
        u = u.unflatten(-1, (self.heads, -1))
        b, c = (part.unflatten(-1, (-1, self.state_dim)).repeat_interleave(self.per_group, 2) for part in (b, c))
        dt = F.softplus(self.dt_proj(x).float() + self.dt_bias.float())
        if (real := step.real(x)) is not None:
            dt = dt * real[:, :, None]
        g, state = -self.A_log.float().exp() * dt, x.new_zeros(len(x), self.heads, self.size, self.state_dim, dtype=torch.float32)
        if step.state is not None:
            state = step.state["state"]
        found = []
        for start in range(0, x.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            y, state = chunk(u[:, part] * dt[:, part, :, None], b[:, part], c[:, part], g[:, part], state)
            found.append(y)
        if step.state is not None:
            step.state["state"].copy_(state)
        y = (torch.cat(found, 1) + self.D.float()[:, None] * u).flatten(2) * F.silu(self.z_proj(x).float())
        normed = F.rms_norm(y.unflatten(-1, (self.heads // self.per_group, -1)), (y.shape[-1] * self.per_group // self.heads,), None,
                            self.norm.eps)
        return self.out_proj((normed.flatten(-2) * self.norm.weight).to(x.dtype))


def chunk(x: Tensor, b: Tensor, c: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What s tokens read [b, s, heads, head_dim], and the state after them; x (times dt), b, c [b, s, heads, ...], g [b, s, heads], state
    [b, heads, head_dim, state_dim]."""
    x, b, c, g = (part.transpose(1, 2) for part in (x, b, c, g))
    total = g.cumsum(-1)
    tril = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~tril, -torch.inf).exp()
    y = (c @ b.mT * decay) @ x + total.exp()[..., None] * (c @ state.mT)
    left = (total[..., -1:] - total).exp()[..., None]
    return y.transpose(1, 2), state * total[..., -1, None, None].exp() + (x * left).mT @ b
