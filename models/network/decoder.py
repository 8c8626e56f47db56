"""The one network definition: a decoder-only model of blocks in layers, its shape chosen by `ModelConfig`.

A block is a norm, a mixer (models/network/mixers), perhaps a norm after it, and the residual; a layer is a block of attention, short
convolution, gated delta rule or Mamba-2, then one of an MLP or experts, or it is one block of a GRU or an LSTM. RMSNorm or LayerNorm,
tied or untied head. Modules and parameters carry Hugging Face's Llama names where Llama has them.

Without a cache a token attends to itself and what stands before it in the row. Right padding needs no mask: nothing
real stands behind it, and what padding computes is not to be read. With a `KVCache`, slot i of a row holds the token at
position i: a call writes token j of row r into slot `write_index[r] + j`, and a token attends to the slots up to its
own position (runtime/backend.py has the same rules).

No dropout. Source of the initialization: Radford et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network.cache import KVCache, sent
from models.network.config import ModelConfig
from models.network.mixers.attention import Attention
from models.network.mixers.delta import DeltaRule
from models.network.mixers.experts import Experts
from models.network.mixers.gated import Gated
from models.network.mixers.mamba import Mamba
from models.network.mixers.mlp import MLP
from models.network.mixers.short_conv import ShortConv
from models.network.mixers.step import ACTIVATIONS, Group, Linear, Step
from models.network.rope import query_factors, rotations

MIXERS = {"attention": ("self_attn", Attention), "conv": ("conv", ShortConv), "delta": ("linear_attn", DeltaRule),
          "mamba": ("mamba", Mamba), "gru": ("gru", Gated), "lstm": ("lstm", Gated)}


def steps(config: ModelConfig, positions: Tensor, slots: Tensor | None = None, filled: int | None = None, cache: KVCache | None = None,
          counts: Tensor | None = None, dtype: torch.dtype = torch.float32, context: int | None = None) -> Iterator[Step]:
    """What each layer is told of one call, in order; what layers have in common is made once.

    positions, slots: int64 [b or 1, s]; slots None: the rows stand alone. filled: how many slots to look at. counts: int64 [b],
    tokens of each row that are real. context: the longest that a row may become, which LongRoPE looks at; None: the cache's capacity, or
    the rows' length.
    """
    length = context or (cache.capacity if cache is not None else positions.shape[1])
    seen = torch.arange(filled if cache is not None else positions.shape[1], device=positions.device)
    turns, masks, kept, sources = {}, {}, {}, {layer.cache_source for layer in config.layers}
    for number, layer in enumerate(config.layers):
        step = Step(number=number, source=layer.cache_source, keeps=number in sources, kept=kept, counts=counts)
        if layer.mixer == "attention":
            window, rope, size = config.window(layer), config.rope(layer), config.head_size(layer)
            if rope is not None and (layer.rope, size) not in turns:
                factors = query_factors(rope, positions)
                turns[layer.rope, size] = (tuple(part[:, :, None].to(dtype) for part in rotations(rope, size, positions, length)),
                                           None if factors is None else factors[:, :, None, None])
            step.rope, step.query_factors = turns[layer.rope, size] if rope is not None else (None, None)
            if cache is not None or window is not None and window < len(seen):
                if window not in masks:
                    masks[window] = _mask(positions, seen, window)
                step.mask = masks[window]
            if cache is not None and layer.cache_source is None:
                step.store = partial(cache.append, number, slots, filled)
        elif cache is not None:
            step.state = cache.states[number]
        yield step


def _mask(positions: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Which slots [n] each position [b, s] attends to: bool [b, 1, s, n]."""
    seen = slots <= positions[:, None, :, None]
    return seen if window is None else seen & (slots > positions[:, None, :, None] - window)


def for_products(x: Tensor) -> Tensor:
    """x as mixed precision multiplies it, converted once for all linears that read it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _norm(config: ModelConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Left to `Decoder`, which initializes every weight once."""


@dataclass(frozen=True)
class Block:
    """x + after(mixer(norm(x))); a norm that is None is not there."""

    name: str                               # of the mixer in its layer
    norm: nn.Module | None
    mixer: nn.Module
    after: nn.Module | None

    def groups(self) -> list[Group]:
        """Of linears that read one input, in the order of the data: first those that read the stream, then those that write to it."""
        return self.mixer.groups(self.norm)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = self.mixer(for_products(x if self.norm is None else self.norm(x)), step)
        return x + (y if self.after is None else self.after(y))


@dataclass(frozen=True)
class OwnInput:
    """The mixer of Gemma 4's last block: proj(act(gate(x)) * own), own the token's input to this layer. It has no norm."""

    gate: nn.Module
    writer: nn.Module
    activation: Callable[[Tensor], Tensor]

    def groups(self, norm: nn.Module | None) -> list[Group]:
        return [Group((self.gate,), norm), Group((self.writer,), None)]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.writer(self.activation(self.gate(x)) * step.own)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        layer, self.number = config.layers[number], number
        before, after = config.norm_order != "post", config.norm_order != "pre"
        self._mixer, kind = MIXERS[layer.mixer]
        self.input_layernorm = _norm(config) if before else None
        self.add_module(self._mixer, kind(config, layer))
        self.post_mixer_norm = _norm(config) if after else None
        self._feed = "moe" if layer.experts else "mlp" if layer.mlp_size else None
        if self._feed:
            self.post_attention_layernorm = _norm(config) if before else None
            self.add_module(self._feed, Experts(config, layer) if layer.experts else MLP(config, layer.mlp_size))
            self.post_mlp_norm = _norm(config) if after else None
        size = config.per_layer_size
        if size:
            self.activation = ACTIVATIONS[config.activation]
            self.per_layer_gate, self.per_layer_proj = Linear(config.hidden_size, size, bias=False), Linear(size, config.hidden_size, bias=False)
            self.post_per_layer_norm = _norm(config)
        self.layer_scalar = nn.Parameter(torch.ones(1)) if config.layer_scalar else None

    @property
    def blocks(self) -> list[Block]:
        found = [Block(self._mixer, self.input_layernorm, getattr(self, self._mixer), self.post_mixer_norm)]
        if self._feed:
            found.append(Block(self._feed, self.post_attention_layernorm, getattr(self, self._feed), self.post_mlp_norm))
        if hasattr(self, "per_layer_gate"):
            found.append(Block("per_layer", None, OwnInput(self.per_layer_gate, self.per_layer_proj, self.activation),
                               self.post_per_layer_norm))
        return found

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [b, s, hidden] to the same shape."""
        for block in self.blocks:
            x = block(x, step)
        return x if self.layer_scalar is None else x * self.layer_scalar


class Backbone(nn.Module):
    """Embeddings, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.context = config, None             # context: see steps; set by who knows it beforehand
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (Embedding(config.context_length, config.hidden_size)
                                if config.positions == "learned" else None)
        if config.per_layer_size:
            width = len(config.layers) * config.per_layer_size
            self.per_layer_embed = Embedding(config.vocab_size, width)
            self.per_layer_projection = Linear(config.hidden_size, width, bias=False)
            self.per_layer_norm = nn.RMSNorm(config.per_layer_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(len(config.layers)))
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None,
                write_index: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """Hidden states [b, s, hidden] after the final norm. Arguments as in `Decoder.forward`."""
        ahead, filled = torch.arange(input_ids.shape[1], device=input_ids.device), None
        slots = ahead[None]
        if cache is not None:                           # where the rows are is known to the host: nothing here waits for a device
            first = torch.from_numpy(cache.lengths) if write_index is None else write_index
            filled = cache.begin(first.cpu().numpy(), input_ids.shape[1], None if counts is None else counts.cpu().numpy())
            slots = sent(first, ahead.device)[:, None] + ahead
            counts = None if counts is None else sent(counts, ahead.device)
        if position_ids is None:
            position_ids = slots
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        own = self.own_inputs(input_ids, x)
        told = list(steps(self.config, position_ids, slots, filled, cache, counts, x.dtype, self.context))
        for layer in self.layers:                       # some may have been taken out (compress/pruning/depth.py)
            step = told[layer.number]
            step.own = None if own is None else own[:, :, layer.number]
            x = layer(x, step)
        return self.norm(x)

    def own_inputs(self, input_ids: Tensor, x: Tensor) -> Tensor | None:
        """The tokens' inputs to every layer [b, s, layers, per_layer_size] (Gemma 4), of embeddings x [b, s, hidden]."""
        if not self.config.per_layer_size:
            return None
        shape = (-1, self.config.per_layer_size)
        return (self.per_layer_norm(self.per_layer_projection(x).unflatten(-1, shape))
                + self.per_layer_embed(input_ids).unflatten(-1, shape))


class Decoder(nn.Module):
    """The model: token ids to logits. Freshly made it has GPT-2's random initialization."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.cache_scales: list[tuple[Tensor, Tensor] | None] | None = None     # of an int8 KV cache, for who makes one
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.model.embed_tokens.weight.is_meta:
            self._initialize()

    @torch.no_grad()
    def _initialize(self):
        writers = {id(group.readers[0].weight) for layer in self.model.layers for block in layer.blocks for group in block.groups()[1:]}
        for name, parameter in self.named_parameters():
            last = name.rpartition(".")[2]
            if last in ("bias", "dt_bias"):
                parameter.zero_()
            elif last in ("A_log", "D"):
                parameter.copy_(torch.linspace(1, 4, len(parameter)).log() if last == "A_log" else torch.ones(len(parameter)))
            elif last.endswith(("_ih", "_hh")):             # as torch.nn.GRU and LSTM are
                parameter.uniform_(-self.config.hidden_size**-0.5, self.config.hidden_size**-0.5)
            elif parameter.ndim == 2:       # what adds to the residual stream is narrower, by the depth
                parameter.normal_(std=0.02 / math.sqrt(2 * len(self.config.layers)) if id(parameter) in writers else 0.02)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None,
                write_index: Tensor | None = None, logits_positions: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """Run rows of tokens one step.

        input_ids: int64 [b, s], right-padded.
        position_ids: int64 [b, s]; by default the slots the tokens go to (0..s-1 without a cache).
        cache: with b rows, updated in place (its lengths are the caller's). None: the rows stand alone.
        write_index: int64 [b], on the host, slot of each row's first token; by default the cache's lengths.
        logits_positions: int64 [b, k], indices into s whose logits are wanted; by default all.
        counts: int64 [b], on the host, tokens of each row that are real, which recurrent layers must know; by default all.
        Returns float32 logits [b, k or s, vocab].
        """
        hidden = self.model(input_ids, position_ids, cache, write_index, counts)
        if logits_positions is not None:
            hidden = hidden.gather(1, logits_positions[:, :, None].expand(-1, -1, hidden.shape[2]))
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., vocab] of hidden states [..., hidden]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return self.capped(F.linear(hidden, head.weight).float())

    def capped(self, logits: Tensor) -> Tensor:
        """What the head's products become."""
        cap = self.config.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `Decoder(config)`, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def named_groups(config: ModelConfig) -> list[list[list[Group]]]:
    """For every layer of `Decoder(config)` its blocks' groups, with modules' names ("model.layers.0.mlp.up_proj") in place of modules."""
    with torch.device("meta"):
        decoder = Decoder(config)
    names = {module: name for name, module in decoder.named_modules()}
    return [[[replace(group, readers=tuple(names[reader] for reader in group.readers), maker=names.get(group.maker))
              for group in block.groups()] for block in layer.blocks] for layer in decoder.model.layers]
