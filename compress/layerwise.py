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

All is computed on the checkpoint's device (`checkpoint.on(device)`), a part of the windows at a time. Peak memory there is one layer
in float32, one Hessian, and where they fit the activations: windows * tokens * (2 hidden + widest input) * 4 bytes (of experts two
hidden more); else these stay in the host's memory or a file, and their parts travel (activations.py). Matrix products run in bfloat16 with float32 sums where the CPU has such units
(`fast_matmul`): twice as fast, and the Hessian stays the exact second moment of inputs rounded to 8 bits of mantissa.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from compress.activations import Parts, home_for, room
from models.checkpoint import CPU, Checkpoint, load_layer
from models.device import has_bf16, smaller
from models.network.config import ModelConfig
from models.network.decoder import Block, Layer, named_groups, steps, tensor_shapes
from models.network.mixers.attention import Attention
from models.network.mixers.experts import Experts
from models.network.mixers.mlp import MLP
from models.network.mixers.step import Step
from models.progress import progress

ROWS = 4                # windows computed at once on a CPU
TOKENS = 4096           # elsewhere: tokens, in windows, that fill a GPU's units
HESSIAN = 32            # bytes for each element of a Hessian: itself, damped, and three in float64
ALIKE = 4                 # inputs for each column that `cross_moment` takes for undisturbed, beside those it sees
PART = 1 << 23          # weights whose codes are chosen at once: what GPTQ holds in copies
PART_ON_DEVICE = 1 << 25    # elsewhere than on a CPU: a kernel for one input's weights is as long as these have rows
COPIES = 12             # float32 copies of a PART that quantizing/gptq.py makes at most
OTHER_EXPERT = re.compile(r"\.experts\.[1-9]")      # but the first: they work one after the other
Visit = Callable[[list[str], Sequence[Tensor]], None]


@contextmanager
def fast_matmul():
    """Let float32 products use the units for fewer bits inside: a CPU's for bfloat16, a GPU's for TF32; no effect where there are none."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_forward(device: torch.device = CPU):
    """Autocast to bfloat16 where the device computes in it (on a CPU a third less time, forward and backward), else nothing.

    For gradients and statistics: the residual stream stays float32, every product's result is rounded to 8 bits.
    """
    return torch.autocast(device.type, torch.bfloat16) if has_bf16(device) else nullcontext()


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

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, tables: dict[str, Tensor] | None = None, home: str | None = None,
                 rows: int | None = None):
        """ids: int64 [windows, tokens]. tables: float32 weights in place of the checkpoint's, where they are quantized already, by
        module: the embedding [vocab, hidden] and what projects it to the layers' own inputs. home: where activations are kept (None:
        where they fit); rows: windows computed at once."""
        config, device, tables = checkpoint.config, checkpoint.device, tables or {}
        self.checkpoint, self.device, self.ids = checkpoint, device, ids
        self.rows = rows or min(len(ids), ROWS if device.type == "cpu" else max(1, TOKENS // ids.shape[1]))
        self.home = home or home_for(4 * ids.numel() * stream_width(config), device, sum(work_bytes(config, ids.shape[1]).values()))
        stream = self._room(config.hidden_size).home
        if device.type != "cpu" and rows is None:
            _, self.rows = smaller(self.rows, lambda rows: _trial(checkpoint, ids[:rows], tables))
        self.x = Parts(stream, self.rows, device)               # float32 [windows, tokens, hidden], in parts
        self.cache: KeyValueRanges | None = None       # set to see the keys and values of the next step
        positions, table = torch.arange(ids.shape[1], device=device), tables.get("model.embed_tokens")
        table = self._mapped("model.embed_tokens") if table is None else table
        for number, part in enumerate(ids.split(self.rows)):
            embedded = table[part].to(device).float()
            if config.positions == "learned":
                embedded += checkpoint.read("model.embed_positions.weight").float()[positions]
            self.x.put(number, embedded)
        if config.per_layer_size:
            made = tables.get("model.per_layer_projection")
            self._embedded = self._copy(self.x)
            self._projection = checkpoint.weight("model.per_layer_projection") if made is None else made.to(device)
            self._table = self._mapped("model.per_layer_embed")
        self._steps = list(steps(config, positions[None]))
        self._kept: list[dict] = [{} for _ in self.x]           # what later layers read of earlier ones, by part
        self._unreached: set[str] = set()              # experts that a note has named
        self._read: tuple[dict[nn.Module, str], Layer, Block, Parts] | None = None      # what a visit sees of an attention
        self._paid: dict[str, Tensor] = {}             # of this the linears' token weights

    def _mapped(self, module: str) -> Tensor:
        """A token table on the host, of which rows go to the device: as it is in the file, unless it is quantized."""
        return self.checkpoint.on(CPU).stands_for(f"{module}.weight")

    def _room(self, *width: int) -> Parts:
        return Parts(room((*self.ids.shape, *width), self.home, self.device), self.rows, self.device)

    def _copy(self, parts: Parts) -> Parts:
        copied = self._room(parts.home.shape[2])
        copied.home.copy_(parts.home)
        return copied

    def _own_inputs(self, layer: int, part: int) -> Tensor | None:
        """The tokens' inputs to a layer (Gemma 4), float32 [b, tokens, per_layer_size] for a part of the windows."""
        size = self.checkpoint.config.per_layer_size
        if not size:
            return None
        columns, ids = slice(layer * size, (layer + 1) * size), self.ids[part * self.rows:(part + 1) * self.rows]
        gain = self.checkpoint.read("model.per_layer_norm.weight").float()
        made = self._embedded[part] @ self._projection[columns].T
        return F.rms_norm(made, (size,), gain, self.checkpoint.config.norm_eps) + self._table[:, columns][ids].to(self.device).float()

    def _told(self, layer: Layer, part: int) -> Step:
        """What a layer is told of a part; keys and values of earlier layers come to the device."""
        kept = {number: tuple(x.to(self.device) for x in pair) for number, pair in self._kept[part].items()}
        return replace(self._steps[layer.number], store=self.cache, kept=kept, own=self._own_inputs(layer.number, part))

    def told(self, layer: Layer, windows: Tensor) -> Step:
        """What `layer` is told of some windows, int64 [n], when the stream stands before it."""
        step, kept, own = self._steps[layer.number], {}, None
        if self._kept[0] or self.checkpoint.config.per_layer_size:                 # else no window's number is asked of the device
            places = [divmod(number, self.rows) for number in windows.tolist()]
            kept = {number: tuple(torch.stack([self._kept[part][number][which][row] for part, row in places]).to(self.device)
                                  for which in range(2)) for number in self._kept[0]}
            if self.checkpoint.config.per_layer_size:
                own = torch.stack([self._own_inputs(layer.number, part)[row] for part, row in places])
        return replace(step, kept=kept, own=own)

    def _keep(self, part: int, step: Step) -> None:
        self._kept[part] = step.kept if self.home == "device" else {n: tuple(x.cpu() for x in pair) for n, pair in step.kept.items()}

    def layers(self, label: str) -> Iterator[tuple[int, Layer]]:
        """Every layer with its number; who takes one steps through it before the next."""
        for number in progress(range(len(self.checkpoint.config.layers)), label=label, unit="layer"):
            yield number, self.load(number)

    def load(self, number: int) -> Layer:
        """One layer in float32, with the checkpoint's weights (those its codes stand for, where quantized)."""
        with torch.device("meta"):
            layer = Layer(self.checkpoint.config, number)
        return load_layer(self.checkpoint, layer).requires_grad_(False)

    def step(self, layer: Layer, visit: Visit | None = None) -> None:
        """Take the stream through `layer`; `visit` sees each group of linears before their data passes on."""
        for names, inputs in self.visits(layer, visit is not None):
            if visit is not None:
                visit(names, inputs)

    @torch.no_grad()
    def visits(self, layer: Layer, seen: bool = True) -> Iterator[tuple[list[str], Parts]]:
        """`step` for who goes along: what a visit is given, each group in turn; when all are taken, the stream is through. seen: False
        for who looks at none."""
        names = {module: name for name, module in layer.named_modules()}
        for block in layer.blocks:
            yield from (self._experts(names, layer, block, seen) if isinstance(block.mixer, Experts) else self._block(names, layer, block))
        if layer.layer_scalar is not None:
            for number, x in enumerate(self.x):
                x *= layer.layer_scalar
                self.x.put(number, x)

    def inputs(self, layer: Layer, measure: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Tensor]:
        """measure(inputs) of what each group of linears in `layer` reads, by the name of its first; the stream stays where it is."""
        before, kept, found = self._copy(self.x), [dict(part) for part in self._kept], {}
        names = {module: name for name, module in layer.named_modules()}
        first = {names[group.readers[0]] for block in layer.blocks for group in block.groups()}

        def visit(visited: list[str], inputs: Sequence[Tensor]) -> None:
            if visited[0] in first:
                found[visited[0]] = measure(inputs)
        self.step(layer, visit)
        self.x, self._kept = before, kept
        return found

    def token_weights(self, name: str) -> Tensor | None:
        """While `visit` sees what an attention's linears read: how much it matters what `name` makes of each token, float32 [windows,
        tokens], 1 in the mean. None: of every token alike.

        A token that many others attend to, as all do to a text's first, tells in all of their outputs by its key and value. Its weight is
        the mean of 1 and the squared change of the attention's output with the token's key (or value), over its mean: the expectation
        of (gradient of noise at the output)^2, noise of random signs (Hutchinson's estimate), one draw.
        """
        names, layer, block, normed = self._read or (None, None, None, None)
        if layer is None or not isinstance(block.mixer, Attention) or block.mixer.k_proj is None:
            return None
        linears = {names[part]: part for part in (block.mixer.k_proj, block.mixer.v_proj)}
        if name in linears and not self._paid:
            generator, found = torch.Generator().manual_seed(layer.number), {one: [] for one in linears}
            for number, x in enumerate(normed):
                step, made = replace(self._told(layer, number), store=None), []
                hooks = [part.register_forward_hook(lambda module, arguments, output: made.append(output.requires_grad_()))
                         for part in linears.values()]
                with passed_through(block.mixer.writer), torch.enable_grad(), fast_matmul():
                    mixed = block.mixer(x, step)
                for hook in hooks:
                    hook.remove()
                signs = (torch.randint(0, 2, mixed.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(mixed)
                for one, gradient in zip(linears, torch.autograd.grad(mixed, made, signs)):
                    found[one].append(gradient.square().sum(-1))
            for one, weights in ((one, torch.cat(parts)) for one, parts in found.items()):
                self._paid[one] = (1 + weights / weights.mean().clamp_min(1e-30)) / 2
        return self._paid.get(name)

    def _block(self, names: dict[nn.Module, str], layer: Layer, block: Block) -> Iterator[tuple[list[str], Parts]]:
        """x += after(writer(mix(readers(norm(x)))))."""
        readers, final = block.groups()[0].readers, block.mixer.writer
        # One tensor for all windows: freed, its memory goes back to the system, which a heap of chunks keeps in holes.
        normed, mixed = self._normed(block), self._room(final.in_features)
        self._read, self._paid = (names, layer, block, normed), {}
        yield [names[reader] for reader in readers], normed
        self._read = None
        with passed_through(final), fast_matmul():
            for number, x in enumerate(normed):
                step = self._told(layer, number)
                mixed.put(number, block.mixer(x, step))
                self._keep(number, step)
        del normed
        yield [names[final]], mixed
        with fast_matmul():
            for number, part in enumerate(mixed):
                self._add(number, block, final(part))

    def _experts(self, names: dict[nn.Module, str], layer: Layer, block: Block, seen: bool) -> Iterator[tuple[list[str], Parts]]:
        """x += after(sum over a token's experts of their weight * expert(norm(x)))."""
        experts, tokens, width = block.mixer, self.rows * self.ids.shape[1], self.x.home.shape[2]
        normed = self._normed(block).reshaped(-1, width, rows=tokens)
        shared = () if experts.shared is None else experts.shared.groups(None)[0].readers
        yield [names[reader] for reader in (experts.router, *shared)], normed
        weights, chosen = (torch.cat(found) for found in zip(*map(experts.route, normed)))
        found = self._room(width).reshaped(-1, width, rows=tokens)
        found.home.zero_()
        if experts.shared is not None:
            every = torch.arange(self.ids.numel(), device=self.device)
            yield from self._mlp(names, experts.shared, normed, found, (every, weights.new_ones(len(every), 1)))
        for number, expert in enumerate(experts.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            unreached = f"{names[expert]} of layer {layer.number}"
            if seen and not len(rows) and unreached not in self._unreached:
                self._unreached.add(unreached)
                tqdm.write(f"note: no token of the text reaches {unreached}: it is calibrated on all of them", file=sys.stderr)
            inputs = Parts(normed.home, tokens, self.device, rows) if len(rows) else normed
            yield [names[reader] for reader in expert.groups(None)[0].readers], inputs
            yield from self._mlp(names, expert, inputs, found, (rows, weights[rows, place, None]))
        for number, part in enumerate(found.reshaped(*self.x.home.shape, rows=self.rows)):
            self._add(number, block, part)

    def _mlp(self, names: dict[nn.Module, str], mlp: MLP, inputs: Parts, found: Parts,
             place: tuple[Tensor, Tensor]) -> Iterator[tuple[list[str], Parts]]:
        """found[rows] += weights * mlp(inputs), with (rows, weights) the place; of no rows, nothing is added."""
        (rows, weights), size = place, found.size
        count = sum(map(len, inputs)) if inputs.chosen is None else len(inputs.chosen)
        mixed = Parts(room((count, mlp.writer.in_features), self.home, self.device), size, self.device)
        with passed_through(mlp.writer), fast_matmul():
            for number, part in enumerate(inputs):
                mixed.put(number, mlp(part))
        yield [names[mlp.writer]], mixed
        with fast_matmul():
            for part, these, scale in zip(mixed, rows.split(size), weights.split(size)):
                if len(these):
                    found.home.index_add_(0, these.to(found.home.device), (mlp.writer(part) * scale).to(found.home.device))

    def _normed(self, block: Block) -> Parts:
        """What a block's first linears read of the stream."""
        normed = self._room(self.x.home.shape[2])
        for number, x in enumerate(self.x):
            normed.put(number, x if block.norm is None else block.norm(x))
        return normed

    def _add(self, number: int, block: Block, made: Tensor) -> None:
        """A part of the stream += what a block has made."""
        x = self.x[number]
        x += made if block.after is None else block.after(made)
        self.x.put(number, x)


def _trial(checkpoint: Checkpoint, ids: Tensor, tables: dict[str, Tensor]) -> None:
    """Take a few windows through one layer of each kind, so that too many of them fail before anything is done. One that reads what
    an earlier layer keeps needs no more than that one does."""
    walk, kinds = Walk(checkpoint, ids, tables, home="device", rows=len(ids)), set()
    for number, kind in enumerate(checkpoint.config.layers):
        if kind.cache_source is None and kind not in kinds:
            kinds.add(kind)
            walk.step(walk.load(number), lambda names, inputs: None)


class KeyValueRanges:
    """Stands where a layer's cache would, keeps nothing but max |x| of every channel: float32 [kv_heads * head_dim]."""

    def __init__(self, device: torch.device = CPU):
        self.largest = [torch.zeros(1, device=device), torch.zeros(1, device=device)]

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys (after RoPE) and values [b, kv_heads, s, head_dim], which are what attention sees."""
        self.largest = [torch.maximum(before, x.abs().amax((0, 2)).flatten())
                        for before, x in zip(self.largest, (keys, values))]
        return keys, values


def cross_moment(inputs: Sequence[Tensor], others: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """E[(y - x) x^T] over all inputs x and others y, alike in chunks [..., K]: [K, K]; weights: as of `second_moment`.

    As if ALIKE * K more had shown no difference: what few inputs show of it is mostly their own."""
    total, count, weights = None, 0, None if weights is None else weights.flatten()
    with fast_matmul():
        for part, other in zip(inputs, others):
            part, off = part.flatten(0, -2), (other - part).flatten(0, -2)
            if weights is not None:
                off *= weights[count:count + len(part), None]
            if total is None:
                total = part.new_zeros(part.shape[1], part.shape[1])
            total.addmm_(off.T, part)
            count += len(part)
    return total / (count + ALIKE * len(total))


def second_moment(inputs: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """E[x x^T] over all inputs x in chunks [..., K]: [K, K]; weights: of each, in one tensor in the inputs' order."""
    total, count, weights = None, 0, None if weights is None else weights.flatten()
    with fast_matmul():
        for part in inputs:
            part = part.flatten(0, -2)
            if weights is not None:
                part = part * weights[count:count + len(part), None].sqrt()
            if total is None:
                total = part.new_zeros(part.shape[1], part.shape[1])
            total.addmm_(part.T, part)
            count += len(part)
    return total / count


def largest(inputs: Sequence[Tensor]) -> Tensor:
    """max |x| of each input over chunks [..., K]: float32 [K]."""
    return torch.stack([part.flatten(0, -2).abs().amax(0) for part in inputs]).amax(0)


def stream_width(config: ModelConfig) -> int:
    """Numbers kept of a token, at most: the stream, what its norm gives, the widest input of a linear, and what layers share."""
    shapes = [shape for name, shape in tensor_shapes(config).items() if name.startswith("model.layers.") and len(shape) == 2]
    streams = 2 + 2 * any(layer.experts for layer in config.layers) + (config.per_layer_size > 0)
    read = {layer.cache_source for layer in config.layers if layer.cache_source is not None}           # whose keys and values stay
    kept = sum(2 * config.layers[n].kv_heads * config.head_size(config.layers[n]) for n in read) + 2 * config.per_layer_size
    return streams * config.hidden_size + max(columns for _, columns in shapes) + kept


def work_bytes(config: ModelConfig, tokens: int, streams: int = 1) -> dict[str, int]:
    """Bytes on a device by kind, at most, beside the activations that are kept there, while one layer is calibrated and `tokens` of
    the text are on their way through it: the layer as stored and in float32, a Hessian with what is made of it in float64, the
    largest linears that share their inputs with what their codes stand for, and what a layer makes of a token (twice: before and
    after a function). streams: walks that go together, each with a layer of its own."""
    layers = [{} for _ in config.layers]
    for name, shape in tensor_shapes(config).items():
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            layers[int(number)][rest.removesuffix(".weight")] = shape
    matrices = [shape for layer in layers for shape in layer.values() if len(shape) == 2]
    shared = max(sum(math.prod(layer[reader.split(".", 3)[3]]) for reader in group.readers if not OTHER_EXPERT.search(reader))
                 for layer, blocks in zip(layers, named_groups(config)) for groups in blocks for group in groups)
    made = max(2 * config.hidden_size + sum(shape[0] for name, shape in layer.items() if len(shape) == 2 and not OTHER_EXPERT.search(name))
               for layer in layers)
    return {"layer": (2 + 4 * streams) * max(sum(map(math.prod, layer.values())) for layer in layers),
            "Hessian": HESSIAN * max(columns for _, columns in matrices) ** 2,
            "matrix": 13 * shared + 4 * COPIES * min(shared, PART_ON_DEVICE), "windows at work": 8 * tokens * made}


def rewritten(walk: Walk, label: str, change: Callable[[int, Layer], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model, each layer's tensors being those of change(number, layer), which steps through it."""
    for name in walk.checkpoint.names():
        if not name.startswith("model.layers."):
            yield name, walk.checkpoint.on(CPU).read(name)
    for number, layer in walk.layers(label):
        for name, tensor in change(number, layer).items():
            yield f"model.layers.{number}.{name}", tensor.cpu().contiguous()
