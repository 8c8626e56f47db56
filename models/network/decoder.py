"""The one network definition: a decoder-only transformer, its shape chosen by `ModelConfig`.

RMSNorm or LayerNorm before attention and MLP, RoPE (Llama-3 scaling) or learned positions, grouped-query attention
with optional sliding window and QK-norm, gated or plain MLP, optional biases, tied or untied head; layers may differ in
heads and MLP width. Modules and parameters carry Hugging Face's Llama names for every family.

Without a cache a token attends to itself and what stands before it in the row. Right padding needs no mask: nothing
real stands behind it, and what padding computes is not to be read. With a `KVCache`, slot i of a row holds the token at
position i: a call writes token j of row r into slot `write_index[r] + j`, and a token attends to the slots up to its
own position (runtime/backend.py has the same rules).

Attention is PyTorch's scaled_dot_product_attention, causal where there is no cache and no window that matters, else
with an explicit mask; in mixed precision on a CPU it stays in float32 where gradients are wanted, because its backward
pass is the faster there. No dropout. Sources: Vaswani et al. 2017; Su et al. 2021 (RoPE); Ainslie et al. 2023 (GQA);
Shazeer 2020 (gated MLP); Radford et al. 2019 (initialization).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network.activations import fake_int8
from models.network.config import LayerConfig, ModelConfig

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class KVCache:
    """A `runtime.backend.Cache`: per layer the keys and values [rows, kv_heads, capacity, head_dim] of `rows` sequences.

    `lengths` int64 [rows] counts the filled slots of each row; the forward pass does not touch it. `scales`, one (keys',
    values') pair a layer, float32 [1] or [kv_heads * head_dim], makes it hold the values of an int8 cache.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", scales: list[tuple[Tensor, Tensor]] | None = None):
        self.keys, self.values = ([torch.zeros(rows, layer.kv_heads, capacity, config.head_dim, dtype=dtype, device=device)
                                   for layer in config.layers] for _ in "kv")
        self.lengths, self.scales = np.zeros(rows, np.int64), scales

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(self.lengths[row], length)

    def fork(self, source: int, target: int) -> None:
        for tensor in (*self.keys, *self.values, self.lengths):
            tensor[target] = tensor[source]

    def view(self, start: int, stop: int) -> KVCache:
        part = copy.copy(self)
        part.keys, part.values = ([t[start:stop] for t in tensors] for tensors in (self.keys, self.values))
        part.lengths = self.lengths[start:stop]
        return part

    def grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self.keys, self.values = ([F.pad(t, (0, 0, 0, more)) for t in tensors] for tensors in (self.keys, self.values))

    def append(self, layer: int, slots: Tensor, filled: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Store a layer's new keys and values [b, kv_heads, s, head_dim] in int64 `slots` [b, s]; both up to slot `filled`."""
        held = []
        for number, (x, storage) in enumerate(((keys, self.keys[layer]), (values, self.values[layer]))):
            if self.scales is not None:
                scale = self.scales[layer][number]
                x = fake_int8(x, scale.view(-1, 1, x.shape[3] if len(scale) > 1 else 1))
            storage.scatter_(2, slots[:, None, :, None].expand_as(x), x.to(storage.dtype))
            held.append(storage[:, :, :filled].to(x.dtype))
        return held


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """RoPE's angle per position for each pair of dimensions, float32 [head_dim / 2], Llama-3 scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, context = (config.rope_scaling[key] for key in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    turns = context * frequencies / (2 * math.pi)           # full turns within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)      # 1: fast dimensions, kept; 0: slow ones, stretched
    return share * frequencies + (1 - share) * frequencies / factor


def rotations(frequencies: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles, float32 [..., head_dim / 2] for position_ids of any shape [...]."""
    angles = position_ids[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [b, s, heads, head_dim]: dimension i pairs with i + head_dim / 2. cos, sin [b or 1, s, 1, head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), mask, grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def for_products(x: Tensor) -> Tensor:
    """x as mixed precision multiplies it, converted once for all linears that read it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _norm(config: ModelConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


class Linear(nn.Linear):
    def reset_parameters(self):
        """Left to `Decoder`, which initializes every weight once."""


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Left to `Decoder`, which initializes every weight once."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.head_dim, self.grouped = config.head_dim, layer.heads != layer.kv_heads
        queries, keys = layer.heads * config.head_dim, layer.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                store: Callable | None) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim))
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if store is not None:
            k, v = store(k, v)
        return self.o_proj(_attend(q, k, v, mask, self.grouped).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        self.gate_proj = Linear(config.hidden_size, layer.mlp_size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = Linear(config.hidden_size, layer.mlp_size, bias=config.mlp_bias)
        self.down_proj = Linear(layer.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config, layer)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                store: Callable | None) -> Tensor:
        x = x + self.self_attn(for_products(self.input_layernorm(x)), rope, mask, store)
        return x + self.mlp(for_products(self.post_attention_layernorm(x)))


class Backbone(nn.Module):
    """Embeddings, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.window = config.sliding_window
        self.frequencies = inverse_frequencies(config) if config.positions == "rope" else None   # fp32 whatever .to()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (Embedding(config.context_length, config.hidden_size)
                                if config.positions == "learned" else None)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None,
                write_index: Tensor | None = None) -> Tensor:
        """Hidden states [b, s, hidden] after the final norm. Arguments as in `Decoder.forward`."""
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        slots = steps[None]
        if cache is not None:
            first = cache.lengths if write_index is None else write_index
            slots = torch.as_tensor(first, device=steps.device)[:, None] + steps
        if position_ids is None:
            position_ids = slots
        x = self.embed_tokens(input_ids)
        rope = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        else:
            self.frequencies = self.frequencies.to(x.device)
            rope = tuple(part[:, :, None].to(x.dtype) for part in rotations(self.frequencies, position_ids))
        if cache is None:
            mask = self._mask(slots, steps) if self.window is not None and self.window < len(steps) else None
        else:
            filled = int(slots.max()) + 1
            if filled > cache.capacity:
                raise ValueError(f"slot {filled - 1} is beyond the cache's capacity of {cache.capacity}")
            mask = self._mask(position_ids, torch.arange(filled, device=x.device))
        for number, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None if cache is None else partial(cache.append, number, slots, filled))
        return self.norm(x)

    def _mask(self, positions: Tensor, slots: Tensor) -> Tensor:
        """Which slots [n] each position [b, s] attends to: bool [b, 1, s, n]."""
        seen = slots <= positions[:, None, :, None]
        if self.window is not None:
            seen &= slots > positions[:, None, :, None] - self.window
        return seen


class Decoder(nn.Module):
    """The model: token ids to logits. Freshly made it has GPT-2's random initialization."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.cache_scales: list[tuple[Tensor, Tensor]] | None = None        # of an int8 KV cache, for who makes one
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.model.embed_tokens.weight.is_meta:
            self._initialize()

    @torch.no_grad()
    def _initialize(self):
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:       # what adds to the residual stream is narrower, by the depth
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(std=0.02 / math.sqrt(2 * len(self.config.layers)) if residual else 0.02)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None,
                write_index: Tensor | None = None, logits_positions: Tensor | None = None) -> Tensor:
        """Run rows of tokens one step.

        input_ids: int64 [b, s], right-padded.
        position_ids: int64 [b, s]; by default the slots the tokens go to (0..s-1 without a cache).
        cache: with b rows, updated in place (its lengths are the caller's). None: the rows stand alone.
        write_index: int64 [b], slot of each row's first token; by default the cache's lengths.
        logits_positions: int64 [b, k], indices into s whose logits are wanted; by default all.
        Returns float32 logits [b, k or s, vocab].
        """
        hidden = self.model(input_ids, position_ids, cache, write_index)
        if logits_positions is not None:
            hidden = hidden.gather(1, logits_positions[:, :, None].expand(-1, -1, hidden.shape[2]))
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocab] of hidden states [..., hidden]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float()


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `Decoder(config)`, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
