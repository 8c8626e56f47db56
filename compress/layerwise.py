"""Calibration text on its way through a model, one layer in memory at a time.

    walk = Walk(checkpoint, ids)                       # ids int64 [windows, tokens]
    for number, layer in walk.layers("quantizing"):
        walk.step(layer, visit)                        # visit(names, inputs) may change the layer's weights

Within a layer the linears are visited in the order in which data reaches them, block by block: those that read the stream
together, then the one that writes to it. `visit` is given the modules' names and their common inputs, in chunks [..., K], and
what it writes into the layer is what the data then passes through: every later linear is calibrated on the errors of the
earlier ones, as the finished model will make them. Of a mixture of experts the router comes first (with the MLP that all tokens
pass), then every expert's linears, with the tokens that are routed to it; one that none is routed to sees all of them, and a
note says so.

Peak memory is one layer in float32, one Hessian, and the activations: windows * tokens * (2 hidden + widest input) * 4
bytes (of experts two hidden more). Matrix products run in bfloat16 with float32 sums where the CPU has such units
(`fast_matmul`): twice as fast, and the Hessian stays the exact second moment of inputs rounded to 8 bits of mantissa.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.checkpoint import Checkpoint
from models.network.decoder import Block, Layer, steps
from models.network.mixers.experts import Experts
from models.network.mixers.mlp import MLP
from models.network.mixers.step import Step
from models.progress import progress

ROWS = 4                # windows computed at once
Visit = Callable[[list[str], list[Tensor]], None]


@contextmanager
def fast_matmul():
    """Let float32 products use bfloat16 units inside; no effect on a CPU without them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_forward():
    """Autocast to bfloat16 where the CPU computes in it (a third less time, forward and backward), else nothing.

    For gradients and statistics: the residual stream stays float32, every product's result is rounded to 8 bits.
    """
    units = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16) if units.get("amx_bf16") or units.get("avx512_bf16") else nullcontext()


def has_tiles() -> bool:
    """Whether the CPU has AMX tiles, which make bfloat16 worth choosing unasked."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@contextmanager
def passed_through(linear: nn.Module):
    """While open, the linear gives out what it is given."""
    linear.forward = lambda x: x
    try:
        yield
    finally:
        del linear.forward


class Walk:
    """The residual stream of all calibration windows, before the next layer."""

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, tables: dict[str, Tensor] | None = None):
        """tables: float32 weights in place of the checkpoint's, where they are quantized already, by module: the embedding
        [vocab, hidden] and what projects it to the layers' own inputs."""
        config, positions, tables = checkpoint.config, torch.arange(ids.shape[1]), tables or {}
        table = tables.get("model.embed_tokens")
        self.checkpoint, self.ids = checkpoint, ids
        self.x = (checkpoint.weight("model.embed_tokens") if table is None else table)[ids]     # float32 [windows, tokens, hidden]
        self.cache: KeyValueRanges | None = None       # set to see the keys and values of the next step
        if config.positions == "learned":
            self.x += checkpoint.read("model.embed_positions.weight").float()[positions]
        if config.per_layer_size:
            made, own = tables.get("model.per_layer_projection"), "model.per_layer_embed"
            self._embedded = self.x.clone()
            self._projection = checkpoint.weight("model.per_layer_projection") if made is None else made
            dense = checkpoint.quantized(own) is None                               # then it is mapped, not read
            self._table = checkpoint.read(f"{own}.weight") if dense else checkpoint.weight(own)
        self._steps = list(steps(config, positions[None]))
        self._kept: list[dict] = [{} for _ in self.x.split(ROWS)]      # what later layers read of earlier ones, by part
        self._unreached: set[str] = set()              # experts that a note has named

    def _own_inputs(self, number: int) -> list[Tensor | None]:
        """The tokens' inputs to a layer (Gemma 4), float32 [b, tokens, per_layer_size] for each part of the windows."""
        size = self.checkpoint.config.per_layer_size
        if not size:
            return [None] * len(self._kept)
        columns = slice(number * size, (number + 1) * size)
        gain = self.checkpoint.read("model.per_layer_norm.weight").float()
        projection, table, eps = self._projection[columns], self._table[:, columns], self.checkpoint.config.norm_eps
        return [F.rms_norm(x @ projection.T, (size,), gain, eps) + table[ids].float()
                for x, ids in zip(self._embedded.split(ROWS), self.ids.split(ROWS))]

    def layers(self, label: str) -> Iterator[tuple[int, Layer]]:
        """Every layer with its number; who takes one steps through it before the next."""
        for number in progress(range(len(self.checkpoint.config.layers)), label=label, unit="layer"):
            yield number, self.load(number)

    def load(self, number: int) -> Layer:
        """One layer in float32, with the checkpoint's weights (those its codes stand for, where quantized)."""
        config, state = self.checkpoint.config, {}
        with torch.device("meta"):
            layer = Layer(config, number)
        for name in layer.state_dict():
            full = f"model.layers.{number}.{name}"
            dense = full in self.checkpoint.names()
            state[name] = (self.checkpoint.read(full).float().clone() if dense
                           else self.checkpoint.weight(full.removesuffix(".weight")))
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    @torch.no_grad()
    def step(self, layer: Layer, visit: Visit | None = None) -> None:
        """Take the stream through `layer`; `visit` sees each group of linears before their data passes on."""
        told = replace(self._steps[layer.number], store=self.cache)
        parts = [replace(told, kept=kept, own=own) for kept, own in zip(self._kept, self._own_inputs(layer.number))]
        names = {module: name for name, module in layer.named_modules()}
        for block in layer.blocks:
            (self._experts if isinstance(block.mixer, Experts) else self._block)(names, block, parts, visit or _unseen)
        if layer.layer_scalar is not None:
            self.x *= layer.layer_scalar

    def inputs(self, layer: Layer, measure: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
        """measure(inputs) of what each group of linears in `layer` reads, by the name of its first; the stream stays where it is."""
        before, found = self.x.clone(), {}
        names = {module: name for name, module in layer.named_modules()}
        first = {names[group.readers[0]] for block in layer.blocks for group in block.groups()}

        def visit(visited: list[str], inputs: list[Tensor]) -> None:
            if visited[0] in first:
                found[visited[0]] = measure(inputs)
        self.step(layer, visit)
        self.x = before
        return found

    def _block(self, names: dict[nn.Module, str], block: Block, told: list[Step], visit: Visit) -> None:
        """x += after(writer(mix(readers(norm(x)))))."""
        readers, final = block.groups()[0].readers, block.mixer.writer
        # One tensor for all windows: freed, its memory goes back to the system, which a heap of chunks keeps in holes.
        normed, mixed = self._normed(block), self.x.new_empty(*self.x.shape[:2], final.in_features)
        visit([names[reader] for reader in readers], list(normed.split(ROWS)))
        with passed_through(final), fast_matmul():
            for part, x, step in zip(mixed.split(ROWS), normed.split(ROWS), told):
                part.copy_(block.mixer(x, step))
        del normed
        visit([names[final]], list(mixed.split(ROWS)))
        with fast_matmul():
            for x, part in zip(self.x.split(ROWS), mixed.split(ROWS)):
                x += final(part) if block.after is None else block.after(final(part))

    def _experts(self, names: dict[nn.Module, str], block: Block, told: list[Step], visit: Visit) -> None:
        """x += after(sum over a token's experts of their weight * expert(norm(x)))."""
        experts, normed = block.mixer, self._normed(block).flatten(0, 1)
        shared = () if experts.shared is None else experts.shared.groups(None)[0].readers
        visit([names[reader] for reader in (experts.router, *shared)], list(normed.split(ROWS * self.x.shape[1])))
        weights, chosen = (torch.cat(found) for found in zip(*map(experts.route, normed.split(ROWS * self.x.shape[1]))))
        found, tokens = torch.zeros_like(normed), ROWS * self.x.shape[1]
        if experts.shared is not None:
            self._mlp(names, experts.shared, normed, found, (torch.arange(len(normed)), torch.ones(len(normed), 1)), visit)
        for number, expert in enumerate(experts.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            unreached = f"{names[expert]} of layer {told[0].number}"
            if visit is not _unseen and not len(rows) and unreached not in self._unreached:
                self._unreached.add(unreached)
                tqdm.write(f"note: no token of the text reaches {unreached}: it is calibrated on all of them", file=sys.stderr)
            inputs = normed[rows] if len(rows) else normed
            visit([names[reader] for reader in expert.groups(None)[0].readers], list(inputs.split(tokens)))
            self._mlp(names, expert, inputs, found, (rows, weights[rows, place, None]), visit)
        for x, part in zip(self.x.flatten(0, 1).split(tokens), found.split(tokens)):
            x += part if block.after is None else block.after(part)

    def _mlp(self, names: dict[nn.Module, str], mlp: MLP, inputs: Tensor, found: Tensor, place: tuple[Tensor, Tensor],
             visit: Visit) -> None:
        """found[rows] += weights * mlp(inputs), with (rows, weights) the place; of no rows, nothing is added."""
        tokens, (rows, weights) = ROWS * self.x.shape[1], place
        with passed_through(mlp.writer), fast_matmul():
            mixed = torch.cat([mlp(part) for part in inputs.split(tokens)])
        visit([names[mlp.writer]], list(mixed.split(tokens)))
        with fast_matmul():
            for part, these, scale in zip(mixed.split(tokens), rows.split(tokens), weights.split(tokens)):
                if len(these):
                    found.index_add_(0, these, mlp.writer(part) * scale)

    def _normed(self, block: Block) -> Tensor:
        """What a block's first linears read of the stream."""
        normed = torch.empty_like(self.x)
        for part, x in zip(normed.split(ROWS), self.x.split(ROWS)):
            part.copy_(x if block.norm is None else block.norm(x))
        return normed


def _unseen(names: list[str], inputs: list[Tensor]) -> None:
    """The visit of who only passes."""


class KeyValueRanges:
    """Stands where a layer's cache would, keeps nothing but max |x| of every channel: float32 [kv_heads * head_dim]."""

    def __init__(self):
        self.largest = [torch.zeros(1), torch.zeros(1)]

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys (after RoPE) and values [b, kv_heads, s, head_dim], which are what attention sees."""
        self.largest = [torch.maximum(before, x.abs().amax((0, 2)).flatten())
                        for before, x in zip(self.largest, (keys, values))]
        return keys, values


def second_moment(inputs: list[Tensor]) -> Tensor:
    """E[x x^T] over all inputs x in chunks [..., K]: [K, K]."""
    width = inputs[0].shape[-1]
    total, count = inputs[0].new_zeros(width, width), 0
    with fast_matmul():
        for part in inputs:
            part = part.flatten(0, -2)
            total.addmm_(part.T, part)
            count += len(part)
    return total / count


def largest(inputs: list[Tensor]) -> Tensor:
    """max |x| of each input over chunks [..., K]: float32 [K]."""
    return torch.stack([part.flatten(0, -2).abs().amax(0) for part in inputs]).amax(0)


def rewritten(walk: Walk, label: str, change: Callable[[int, Layer], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model, each layer's tensors being those of change(number, layer), which steps through it."""
    for name in walk.checkpoint.names():
        if not name.startswith("model.layers."):
            yield name, walk.checkpoint.read(name)
    for number, layer in walk.layers(label):
        for name, tensor in change(number, layer).items():
            yield f"model.layers.{number}.{name}", tensor.contiguous()
