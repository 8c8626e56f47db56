"""Codes chosen on calibration text, layer by layer: the driver of clipping, GPTQ and the folds that come before them.

    tensors = calibrated(checkpoint, ids, plan, gptq_descended, work=folder, folds=(awq,))
    write_checkpoint(out, config, tensors, ...)

Every layer is loaded, folded (folds.py: rewritten so that its function stays and its weights are easier to round), quantized in the order data flows through it, and then the calibration windows pass through what
its codes stand for (compress/layerwise.py). A finished layer is kept in the folder `work` until the checkpoint is
written, so an interrupted run goes on where it stopped. The embedding and the head are fitted to the Hessian that
sensitivity.py gives for them.

GPTQ takes the text through the original layers too, beside the quantized ones, and rounds weights that make up for CORRECTION of what
the errors before a layer do to its outputs (Li et al. 2025, "GPTAQ"). At 3 bits in groups of 64 that took the divergence of SmolLM2
from 0.375 to 0.234 on held-out text; it costs a second layer, and activations twice. The keys and values of tokens that many others
attend to count for more in a Hessian (layerwise.py, `token_weights`).

Static scales of activations and those of an int8 KV cache, max|x| / 127, are of the calibration
text, as the layer meets it in the end (models/network/quantized.py).
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from compress.quantizing.clipping import clipped_grid, fitted
from compress.quantizing.grid import TABLE, by_rows
from compress.quantizing.gptq import DAMPING, activation_order, damped, descend, factorize, gptq, refit
from compress.activations import home_for
from compress.layerwise import (COPIES, HESSIAN, PART, PART_ON_DEVICE, ROWS, TOKENS, KeyValueRanges, Walk, cross_moment, largest,
                                second_moment, stream_width, work_bytes)
from models.checkpoint import CPU, Checkpoint
from models.device import free_bytes
from models.network.activations import fake_int8
from models.network.config import ModelConfig
from models.network.decoder import Layer, tensor_shapes
from models.network.quantized import Quantization, QuantizedTensor, TensorFormat
from models.formats.safetensors_file import save_tensors
from models.training.memory import PROCESS_BYTES
from runtime.errors import UserError
from runtime.files import new_file

DESCENTS = 2
CORRECTION = 0.5          # of what the errors before a layer do to its outputs, what its weights take upon them
RATIOS = [2 ** (-n / 2) for n in range(7)]         # of max|x| / 127: static scales that are tried
EXPERT = re.compile(r"\.experts\.\d")
SAMPLE = 2048             # tokens whose error is measured
Fold = Callable[[Layer, Walk, dict[str, TensorFormat]], None]
Choose = Callable[[Tensor, Tensor, TensorFormat, bool, Tensor | None], QuantizedTensor]


def clip(weight: Tensor, hessian: Tensor, form: TensorFormat, negative: bool = True, cross: Tensor | None = None) -> QuantizedTensor:
    """Codes of weight [N, K] for inputs of second moment hessian [K, K]: to nearest on the clipped grid, the Hessian's diagonal
    being the importance. negative: whether a scale may be negative (grid.py). cross: of no use here. Computed where the Hessian is;
    codes come to the weight."""
    importance = damped(hessian).diagonal()

    levels = fitted(weight, form, importance, negative) if form.kind == "levels" else None         # one table for all parts

    def nearest(rows: Tensor) -> QuantizedTensor:
        grid = clipped_grid(rows, form, importance, negative, levels)
        return grid.tensor(grid.codes(rows))
    return by_rows(weight, nearest, TABLE, hessian.device)


def gptq_descended(weight: Tensor, hessian: Tensor, form: TensorFormat, negative: bool = True,
                   cross: Tensor | None = None) -> QuantizedTensor:
    """The same by GPTQ in activation order, the Hessian's pivots being the importance, then coordinate descent, the refit of
    scales and a last descent. cross: D = E[(y - x) x^T], y being the inputs x as the original model has them; what is rounded is then
    W (I + CORRECTION D H^-1)."""
    order = activation_order(hessian)
    factor, damping = factorize(hessian, order)
    if damping > DAMPING:
        tqdm.write(f"note: a Hessian was not positive definite, and was dampened by {damping:g}", file=sys.stderr)
    price = torch.empty_like(factor.diagonal())
    price[order] = factor.diagonal() ** -2                 # what is left of an error after compensation
    steady = damped(hessian, damping)
    levels = fitted(weight, form, price, negative) if form.kind == "levels" else None

    def descended(rows: Tensor) -> QuantizedTensor:
        if cross is not None:                              # H^-1 = U^T U, in activation order
            moved = torch.empty_like(rows)
            moved[:, order] = (rows @ cross)[:, order] @ factor.T @ factor
            rows = rows + CORRECTION * moved
        grid = clipped_grid(rows, form, price, negative, levels)
        codes = descend(rows, steady, grid, gptq(rows, hessian, grid, factor=factor), DESCENTS)
        grid = refit(rows, steady, grid, codes)
        return grid.tensor(descend(rows, steady, grid, codes))
    return by_rows(weight, descended, PART if hessian.device == CPU else PART_ON_DEVICE, hessian.device)


def calibrated(checkpoint: Checkpoint, ids: Tensor, plan: Quantization, choose: Choose, work: Path,
               folds: tuple[Fold, ...] = (), vocabulary: dict[str, Tensor] | None = None,
               negative: bool = True, corrected: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the quantized checkpoint, in a fixed order.

    ids: int64 [windows, tokens]. plan: formats (modules left out stay as they are), activations and cache. choose: clip or
    gptq_descended. work: folder for finished layers, made here; the caller removes it. vocabulary: Hessians [hidden, hidden]
    to which the embedding and the head are fitted (sensitivity.py); None clips them by their values alone. negative:
    whether scales may be negative. corrected: the text also goes through the original layers, and `choose` is told how far the
    quantized ones are off. Raises UserError for a layer whose activations are zero or not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    formats, hessians, chosen, host = plan.tensors, dict(vocabulary or {}), {}, checkpoint.on(CPU)
    for module in ("model.embed_tokens", "lm_head", "model.per_layer_embed", "model.per_layer_projection"):
        if module not in formats:
            continue
        if module == "model.per_layer_projection":
            table = chosen.get("model.embed_tokens")
            table = host.read("model.embed_tokens.weight") if table is None else table
            hessians[module] = second_moment(table[part].to(checkpoint.device).float() for part in ids.split(ROWS))
        weight = host.read(f"{module}.weight")                                  # a table stays on the host, its parts go to the device
        if module in hessians:
            found = choose(weight, hessians[module].to(checkpoint.device), formats[module], negative, None)
        else:                                                                   # by its values alone
            found = clip(weight, torch.eye(weight.shape[1], device=checkpoint.device), formats[module], negative)
        if module in ("model.embed_tokens", "model.per_layer_projection"):
            chosen[module] = found.dequantize()
        yield from found.tensors(module).items()
    home = home_for(4 * (1 + corrected) * ids.numel() * stream_width(checkpoint.config), checkpoint.device,
                    sum(work_bytes(checkpoint.config, ids.shape[1], 1 + corrected).values()))
    walk = Walk(checkpoint, ids, chosen, home)
    exact = Walk(checkpoint, ids, home=home, rows=walk.rows) if corrected else None
    for number, layer in walk.layers("quantizing"):
        file, prefix = work / f"layer-{number:03}.safetensors", f"model.layers.{number}."
        if corrected or not file.exists():
            ours = {name.removeprefix(prefix): form for name, form in formats.items() if name.startswith(prefix)}
            for fold in folds:
                fold(layer, walk, ours)
        original = walk.load(number) if corrected else None
        if corrected and folds:
            original.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
        if not file.exists():
            found = _layer((walk, exact), (layer, original), number, plan, choose, negative)
            tensors = {name: tensor.cpu() for name, tensor in found.items()}
            with new_file(file) as partial:
                save_tensors(partial, tensors)
        else:
            tensors = load_file(file)
            walk.step(_restored(layer, tensors, prefix, formats, walk.device))
            if exact:
                exact.step(original)
        yield from ((prefix + name, tensor) for name, tensor in tensors.items())
    written = {f"{module}.weight" for module in formats}
    for name in checkpoint.names():
        if not name.startswith("model.layers.") and name not in written:
            yield name, host.read(name)


def _layer(walks: tuple[Walk, Walk | None], layers: tuple[Layer, Layer | None], number: int, plan: Quantization, choose: Choose,
           negative: bool) -> dict[str, Tensor]:
    """Quantize one layer, and take the windows through it, beside them those that go through the original layers, if any do. Returns
    its stored tensors."""
    (walk, exact), (layer, original) = walks, layers
    prefix, formats = f"model.layers.{number}.", plan.tensors
    ours = {name.removeprefix(prefix): form for name, form in formats.items() if name.startswith(prefix)}
    stored: dict[str, Tensor] = {}
    rounded = plan.rounding_linears() if plan.activations.get("per") == "tensor" else []

    def visit(names: list[str], inputs: Sequence[Tensor], exact_inputs: Sequence[Tensor] | None) -> None:
        moments: dict[str, tuple[Tensor, Tensor | None]] = {}       # of all tokens alike (""), and of an attention's keys and values

        def moments_for(name: str) -> tuple[Tensor, Tensor | None]:
            weights = walk.token_weights(name)
            key = "" if weights is None else name
            if key not in moments:
                cross = None if exact_inputs is None else cross_moment(inputs, exact_inputs, weights)
                moments[key] = second_moment(inputs, weights), cross
            return moments[key]
        rounding = [name for name in names if prefix + name in rounded]
        if rounding:                                            # one scale: an export may join these linears
            importance = sum(layer.get_submodule(name).weight.square().sum(0) for name in rounding)
            scale = static_scale(inputs, importance)
            stored.update({f"{name}.input_scale": scale.clone() for name in rounding})
        # Rows do not depend on each other: those of one format and one Hessian go together.
        for (form, _), members in _alike(names, ours, walk).items():
            weights = [layer.get_submodule(name).weight for name in members]
            try:
                joined = weights[0] if len(weights) == 1 else torch.cat(weights)
                if not torch.isfinite(joined).all():
                    raise UserError("a fold gave weights that are not finite: the checkpoint is broken")
                hessian, cross = moments_for(members[0])
                found = choose(joined, hessian, form, negative, cross)
            except UserError as error:
                raise UserError(f"{prefix}{members[0]}: {error}") from None
            for name, part in zip(members, found.split([len(weight) for weight in weights])):
                layer.get_submodule(name).weight = nn.Parameter(part.dequantize(), requires_grad=False)
                stored.update(part.tensors(name))

    walk.cache = KeyValueRanges(walk.device) if plan.kv_cache else None
    if exact is None:
        walk.step(layer, lambda names, inputs: visit(names, inputs, None))
    else:
        for (names, inputs), (_, exact_inputs) in zip(walk.visits(layer), exact.visits(original, seen=False), strict=True):
            # Each stream has tokens of its own for an expert: no token of one stands beside the same of the other.
            visit(names, inputs, None if EXPERT.search(names[0]) else exact_inputs)
    seen, walk.cache = walk.cache, None
    keeps = walk.checkpoint.config.cache_heads(walk.checkpoint.config.layers[number]) > 0
    for part, most in zip("kv", seen.largest if seen and keeps else ()):
        most = most if plan.kv_cache["per"] == "channel" else most.amax(0, keepdim=True)
        stored[f"self_attn.{part}_scale"] = torch.where(most > 0, most / 127, torch.ones_like(most))
    for name, tensor in layer.state_dict().items():
        if name.removesuffix(".weight") not in ours:            # in its own type, unless a fold has changed it
            original = walk.checkpoint.read(prefix + name)
            stored[name] = original if torch.equal(original.float(), tensor) else tensor
    return stored


def _alike(names: list[str], formats: dict[str, TensorFormat], walk: Walk) -> dict[tuple[TensorFormat, str], list[str]]:
    """Of these linears those that have a format, by format and, where tokens weigh differently for one, its name."""
    found: dict[tuple[TensorFormat, str], list[str]] = {}
    for name in filter(formats.get, names):
        found.setdefault((formats[name], "" if walk.token_weights(name) is None else name), []).append(name)
    return found


def _restored(layer: Layer, tensors: dict[str, Tensor], prefix: str, formats: dict[str, TensorFormat], device: torch.device) -> Layer:
    """The layer that stored tensors stand for, on a device."""
    state, tensors = {}, {name: tensor.to(device) for name, tensor in tensors.items()}
    for name, weight in layer.state_dict().items():
        module = name.removesuffix(".weight")
        form = formats.get(prefix + module)
        if form is None:
            state[name] = tensors[name].float()
        else:
            parts = {suffix: tensors[f"{module}.{suffix}"] for suffix in form.stored_shapes(*weight.shape)}
            state[name] = QuantizedTensor.stored(form, weight.shape[1], parts).dequantize()
    layer.load_state_dict(state, assign=True)
    return layer


def static_scale(inputs: Sequence[Tensor], importance: Tensor) -> Tensor:
    """The step to int8 for an input of linears, whatever the text, that harms their outputs least: float32 [1].

    max|x| / 127 rounds every input to a grid that its one largest value has chosen. A smaller scale clips that value and
    rounds all others more finely: of RATIOS of it the one whose squared error, weighted by the importance [K] (the squared
    weights of the linears behind, summed over their outputs), is least over a sample of the inputs, chunks [..., K]. It does
    not help where a few values carry the model and all others too, as what down_proj reads in most models.
    """
    most = largest(inputs).amax(0, keepdim=True)
    if most == 0:
        return torch.ones_like(most)
    parts = range(0, len(inputs), max(1, len(inputs) // 16))
    count, rows, seen = sum(inputs[number].shape[:-1].numel() for number in parts), [], 0
    step = -(-count // SAMPLE)
    for number in parts:                              # every step-th of all their rows, and no more of them in memory
        part = inputs[number].flatten(0, -2)
        rows.append(part[-seen % step::step].clone())
        seen += len(part)
    rows = torch.cat(rows)
    scales = [most * ratio / 127 for ratio in RATIOS]
    errors = torch.stack([((fake_int8(rows, scale) - rows).square() @ importance).sum() for scale in scales])
    return scales[int(errors.argmin())]


def calibration_bytes(config: ModelConfig, windows: int, length: int, streams: int = 1) -> dict[str, int]:
    """Predicted peak memory on a CPU by kind: the residual stream of all windows, normed, a layer's widest input, and one layer at
    work. streams: 2 where the text goes through the original layers too.

    Experts: what they have added up too, and, should all tokens choose one, that one's input. What the resident set shows besides is
    the checkpoint's file, whose pages the system takes back when it needs them.
    """
    tokens, shapes = windows * min(length, config.context_length), tensor_shapes(config)
    layers = [{name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{number}.")}
              for number in range(len(config.layers))]
    matrices = [shape for layer in layers for name, shape in layer.items() if len(shape) == 2]
    widest = max(columns for _, columns in matrices)
    table, more = (config.vocab_size * size for size in (config.hidden_size, config.per_layer_size * len(config.layers)))

    def chosen(weights: int) -> int:                # a matrix, what its codes stand for, the codes, and copies of a part of it
        return 9 * weights + 4 * COPIES * min(weights, PART)
    walking = {"token table": 4 * table, "activations": 4 * streams * tokens * stream_width(config),
               "layer": (1 + 4 * streams) * max(sum(map(math.prod, layer.values())) for layer in layers), "Hessian": HESSIAN * widest**2,
               "matrix": chosen(max(map(math.prod, matrices)))}
    before = {"token table": max(chosen(table), 4 * table + 2 * more + chosen(min(more, TABLE))),
              "Hessian": HESSIAN * config.hidden_size**2}
    return max(walking, before, key=lambda parts: sum(parts.values())) | {"process": PROCESS_BYTES}


def device_bytes(config: ModelConfig, windows: int, length: int, device: torch.device,
                 streams: int = 1) -> tuple[dict[str, int], dict[str, int]]:
    """Predicted peak memory by kind, on a device and on its host: activations are where they fit (compress/activations.py).

    Raises UserError where the device has no room for one layer at work.
    """
    length, tables = min(length, config.context_length), 5 * config.vocab_size * (config.hidden_size + config.per_layer_size * len(config.layers))
    least, free = work_bytes(config, length, streams), free_bytes(device)
    if free is not None and sum(least.values()) > free:
        raise UserError(f"{device} has {free / 1e9:.2f} GB free, and one layer of this model at work takes {sum(least.values()) / 1e9:.2f} GB "
                        f"({sum(least.values())} bytes): free memory there, give shorter windows (--length), or --device cpu")
    kept = 4 * streams * windows * length * stream_width(config)
    home = home_for(kept, device, sum(least.values()))
    there = work_bytes(config, min(windows, max(1, TOKENS // length)) * length, streams)
    host = {"token table": tables, "process": PROCESS_BYTES}
    if home == "device":
        return there | {"activations": kept}, host
    return there, host | ({"activations": kept} if home == "memory" else {})
