"""Grouped-query attention: RoPE or none, a window or none, norms of queries, keys and values, a gate, a soft cap, another layer's cache.

Weights: q, k, v, o (and g) linears, gains of q_norm and k_norm. State: keys (after RoPE) and values. Sources: Vaswani et al. 2017;
Ainslie et al. 2023 (GQA); Henry et al. 2020 (norms of q and k); Gemma 2's report (soft cap).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network.config import LayerConfig, ModelConfig
from models.network.mixers.step import Group, Linear, Step


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.head_dim, self.per_value = config.head_size(layer), layer.heads // layer.kv_heads
        self.scale, self.softcap, self.norm_last = config.scale(layer), config.attention_softcap, config.qk_norm_last
        self.over_all, self.eps = config.qk_norm_over == "all", config.norm_eps
        self.norms_values = config.v_norm
        self.shares = any(other.cache_source is not None for other in config.layers)
        hidden, queries, keys = config.hidden_size, layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        own = layer.cache_source is None
        self.q_proj = Linear(hidden, queries, bias=config.attention_bias)
        self.k_proj = Linear(hidden, keys, bias=config.attention_bias) if own else None
        self.v_proj = Linear(hidden, keys, bias=config.attention_bias) if own else None
        self.g_proj = Linear(hidden, queries, bias=config.attention_bias) if config.attention_gate else None
        self.o_proj = Linear(queries, hidden, bias=config.output_bias)
        sizes = (queries, keys) if self.over_all else (self.head_dim, self.head_dim)
        self.q_norm = nn.RMSNorm(sizes[0], eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(sizes[1], eps=config.norm_eps) if config.qk_norm and own else None

    @property
    def writer(self) -> nn.Module:
        return self.o_proj

    def groups(self, norm: nn.Module | None) -> list[Group]:
        """Of linears that read one input, in the order of the data. norm: what makes the first input, if a norm does."""
        first = tuple(part for part in (self.q_proj, self.k_proj, self.v_proj, self.g_proj) if part is not None)
        maker = None if self.norms_values or self.shares else self.v_proj        # shared values reach other layers' o too
        return [Group(first, norm), Group((self.o_proj,), maker, self.head_dim)]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [b, s, hidden] to the same shape."""
        q = self._heads(self.q_proj(x), self.q_norm, step)
        if step.query_factors is not None:
            q = q * step.query_factors.to(q.dtype)
        if self.k_proj is None:
            k, v = step.kept[step.source]
        else:
            k, v = self._heads(self.k_proj(x), self.k_norm, step), self.v_proj(x).unflatten(-1, (-1, self.head_dim))
            if self.norms_values:
                v = F.rms_norm(v, (self.head_dim,), eps=self.eps)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if step.store is not None:
                k, v = step.store(k, v)
            if step.keeps:
                step.kept[step.number] = k, v
        y = self._attend(q.transpose(1, 2), k, v, step.mask).transpose(1, 2).flatten(2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid())

    def _heads(self, x: Tensor, norm: nn.Module | None, step: Step) -> Tensor:
        """Queries or keys [b, s, heads * head_dim], normalized and rotated: [b, s, heads, head_dim]."""
        if norm is not None and self.over_all:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        by_head = norm is not None and not self.over_all
        if by_head and not self.norm_last:
            x = norm(x)
        if step.rope is not None:
            x = rotate(x, *step.rope)
        return norm(x) if by_head and self.norm_last else x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """PyTorch's attention; in mixed precision on a CPU it stays in float32 where gradients are wanted, because its backward pass is
        the faster there."""
        if q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                return self._attend(q.float(), k.float(), v.float(), mask)
        if self.softcap is None:
            shared = self.per_value > 1
            # A GPU's kernels that store no scores share keys among heads in 16 bits without a mask only.
            if shared and q.device.type != "cpu" and (q.dtype == torch.float32 or mask is not None):
                k, v, shared = k.repeat_interleave(self.per_value, 1), v.repeat_interleave(self.per_value, 1), False
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared, scale=self.scale)
        scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2) * self.scale     # [b, kv_heads, group, s, n]
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
        weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
        return (weights @ v[:, :, None]).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [b, s, heads, head_dim]: dimension i pairs with i + head_dim / 2. cos, sin [b or 1, s, 1, head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
