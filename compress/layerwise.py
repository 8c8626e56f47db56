"""Calibration text on its way through a model, one layer in memory at a time.

    walk = Walk(checkpoint, ids)                       # ids int64 [windows, tokens]
    for number, layer in walk.layers("quantizing"):
        walk.step(layer, visit)                        # visit(names, inputs) may change the layer's weights

Within a layer the linears are visited in the order in which data reaches them, four at most: q, k and v together, o,
gate and up together, down. `visit` is given the modules' names and their common inputs, in chunks [b, tokens, K], and
what it writes into the layer is what the data then passes through: every later linear is calibrated on the errors of the
earlier ones, as the finished model will make them.

Peak memory is one layer in float32, one Hessian, and the activations: windows * tokens * (2 hidden + widest input) * 4
bytes. Matrix products run in bfloat16 with float32 sums where the CPU has such units (`fast_matmul`): twice as fast, and
the Hessian stays the exact second moment of inputs rounded to 8 bits of mantissa.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.checkpoint import Checkpoint
from models.network.decoder import Block, Layer, steps
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


class Walk:
    """The residual stream of all calibration windows, before the next layer."""

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, embedding: Tensor | None = None):
        """embedding: float32 [vocab, hidden] in place of the checkpoint's, where it is quantized already."""
        config, positions = checkpoint.config, torch.arange(ids.shape[1])
        table = checkpoint.weight("model.embed_tokens") if embedding is None else embedding
        self.checkpoint, self.x = checkpoint, table[ids]                            # float32 [windows, tokens, hidden]
        self.cache: KeyValueRanges | None = None       # set to see the keys and values of the next step
        if config.positions == "learned":
            self.x += checkpoint.read("model.embed_positions.weight").float()[positions]
        self._own = self._own_inputs(ids) if config.per_layer_size else None
        self._steps = list(steps(config, positions[None]))
        self._kept: list[dict] = [{} for _ in self.x.split(ROWS)]      # what later layers read of earlier ones, by part

    def _own_inputs(self, ids: Tensor) -> Tensor:
        """The tokens' inputs to every layer (Gemma 4): float32 [windows, tokens, layers, per_layer_size]."""
        shape, eps = (-1, self.checkpoint.config.per_layer_size), self.checkpoint.config.norm_eps
        made = (self.x @ self.checkpoint.weight("model.per_layer_projection").T).unflatten(-1, shape)
        gain = self.checkpoint.read("model.per_layer_norm.weight").float()
        return nn.functional.rms_norm(made, shape[1:], gain, eps) + self.checkpoint.weight("model.per_layer_embed")[ids].unflatten(-1, shape)

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
        for block in layer.blocks:
            self._block(layer, block, [replace(told, kept=kept) for kept in self._kept], visit)
        if layer.has_end:
            for n, x in enumerate(self.x.split(ROWS)):
                x.copy_(layer.finish(x, None if self._own is None else self._own[n * ROWS:(n + 1) * ROWS, :, layer.number]))

    def inputs(self, layer: Layer, measure: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
        """measure(inputs) of each linear in `layer`, by name; the stream stays where it is."""
        before, found = self.x.clone(), {}
        self.step(layer, lambda names, inputs: found.update(dict.fromkeys(names, measure(inputs))))
        self.x = before
        return found

    def _block(self, layer: Layer, block: Block, told: list[Step], visit: Visit | None) -> None:
        """x += after(writer(mix(readers(norm(x)))))."""
        names = {module: name for name, module in layer.named_modules()}
        first, last = (group.readers for group in block.groups())
        # One tensor for all windows: freed, its memory goes back to the system, which a heap of chunks keeps in holes.
        normed, mixed = torch.empty_like(self.x), self.x.new_empty(*self.x.shape[:2], last[0].in_features)
        for part, x in zip(normed.split(ROWS), self.x.split(ROWS)):
            part.copy_(x if block.norm is None else block.norm(x))
        if visit:
            visit([names[reader] for reader in first], list(normed.split(ROWS)))
        final, place = last[0], names[last[0]].rpartition(".")[2]
        setattr(block.mixer, place, nn.Identity())
        try:
            with fast_matmul():
                for part, x, step in zip(mixed.split(ROWS), normed.split(ROWS), told):
                    part.copy_(block.mixer(x, step))
        finally:
            setattr(block.mixer, place, final)
        del normed
        if visit:
            visit([names[final]], list(mixed.split(ROWS)))
        with fast_matmul():
            for x, part in zip(self.x.split(ROWS), mixed.split(ROWS)):
                x += final(part) if block.after is None else block.after(final(part))


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
