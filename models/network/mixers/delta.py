"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks"), as Qwen3.5 has it.

Every value head keeps a matrix S [head_dim, state_dim] that maps keys to values, in float32. A token forgets a share of it, then writes
what its key should give and does not give yet, and reads by its query:

    S *= exp(g);   d = beta (v - S^T k);   S += k d^T;   o = S^T q

Many tokens go through in closed form, a chunk at a time: with G the running sum of g, the corrections d of a chunk solve a triangular
system (I + A) d = beta (v - exp(G) S^T k), A[t, s] = beta_t exp(G_t - G_s) k_t . k_s for s < t.

Weights: qkv, z, b, a and out linears, the taps of a convolution over queries, keys and values, A_log and dt_bias a head, a gain. State:
S, and the last kernel - 1 inputs of the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network.config import LayerConfig, ModelConfig
from models.network.mixers.step import Convolution, Group, Linear, Step

CHUNK = 64


class DeltaRule(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        size, hidden = config.head_size(layer), config.hidden_size
        self.heads, self.key_heads, self.size, self.value_size = layer.heads, layer.kv_heads, size, layer.state_dim
        keys, values = self.key_heads * size, self.heads * self.value_size
        self.parts = [keys, keys, values]
        self.qkv_proj = Linear(hidden, sum(self.parts), bias=False)
        self.z_proj = Linear(hidden, values, bias=False)
        self.b_proj, self.a_proj = (Linear(hidden, self.heads, bias=False) for _ in range(2))
        self.conv = Convolution(sum(self.parts), layer.kernel, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(2))
        self.norm = nn.RMSNorm(self.value_size, eps=config.norm_eps)
        self.out_proj = Linear(values, hidden, bias=False)

    @property
    def writer(self) -> nn.Module:
        return self.out_proj

    def groups(self, norm: nn.Module | None) -> list[Group]:
        return [Group((self.qkv_proj, self.z_proj, self.b_proj, self.a_proj), norm), Group((self.out_proj,), self.norm)]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k, v = F.silu(self.conv(self.qkv_proj(x), step)).float().split(self.parts, -1)
        q, k = (unit(part.unflatten(-1, (self.key_heads, -1))).repeat_interleave(self.heads // self.key_heads, 2) for part in (q, k))
        v = v.unflatten(-1, (self.heads, -1))
        beta, g = self.b_proj(x).float().sigmoid(), -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())
        if (real := step.real(x)) is not None:
            beta, g = beta * real[:, :, None], g * real[:, :, None]
        state = x.new_zeros(len(x), self.heads, self.size, self.value_size, dtype=torch.float32)
        if step.state is not None:
            state = step.state["state"]
        found = []
        for start in range(0, x.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            y, state = chunk(q[:, part] * self.size**-0.5, k[:, part], v[:, part], g[:, part], beta[:, part], state)
            found.append(y)
        if step.state is not None:
            step.state["state"].copy_(state)
        y = self.norm(torch.cat(found, 1)) * F.silu(self.z_proj(x).float().unflatten(-1, (self.heads, -1)))
        return self.out_proj(y.flatten(2).to(x.dtype))


def unit(x: Tensor) -> Tensor:
    """x [..., n] of length 1."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What s tokens read [b, s, heads, state_dim], and the state after them; q, k, v [b, s, heads, ...], g, beta [b, s, heads], state
    [b, heads, head_dim, state_dim]."""
    q, k, v, g, beta = (part.transpose(1, 2) for part in (q, k, v, g, beta))
    total = g.cumsum(-1)
    tril = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~tril, -torch.inf).exp()          # [b, heads, s, s]
    mixed = (k @ k.mT * beta[..., None] * decay).tril(-1) + torch.eye(g.shape[-1], device=g.device)
    wanted = beta[..., None] * (v - total.exp()[..., None] * (k @ state))
    change = torch.linalg.solve_triangular(mixed, wanted, upper=False, unitriangular=True)
    y = total.exp()[..., None] * (q @ state) + (q @ k.mT * decay) @ change
    left = (total[..., -1:] - total).exp()
    return y.transpose(1, 2), state * total[..., -1, None, None].exp() + (k * left[..., None]).mT @ change
