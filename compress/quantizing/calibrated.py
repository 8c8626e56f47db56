"""Codes chosen on calibration text, layer by layer: the driver of clipping, GPTQ and the folds that come before them.

    tensors = calibrated(checkpoint, ids, plan, gptq_descended, work=folder, folds=(awq,))
    write_checkpoint(out, config, tensors, ...)

Every layer is loaded, folded (folds.py: rewritten so that its function stays and its weights are easier to round), quantized in the order data flows through it, and then the calibration windows pass through what
its codes stand for (compress/layerwise.py). A finished layer is kept in the folder `work` until the checkpoint is
written, so an interrupted run goes on where it stopped. The embedding and the head are fitted to the Hessian that
sensitivity.py gives for them.

Static scales of activations and those of an int8 KV cache, max|x| / 127, are of the calibration
text, as the layer meets it in the end (models/network/quantized.py).
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from compress.quantizing.clipping import clipped_grid
from compress.quantizing.grid import TABLE, by_rows
from compress.quantizing.gptq import DAMPING, activation_order, damped, descend, factorize, gptq, refit
from compress.layerwise import KeyValueRanges, Walk, largest, second_moment
from models.checkpoint import Checkpoint
from models.network.activations import fake_int8
from models.network.config import ModelConfig
from models.network.decoder import Layer, tensor_shapes
from models.network.quantized import Quantization, QuantizedTensor, TensorFormat, unpack
from models.formats.safetensors_file import save_tensors
from models.training.memory import PROCESS_BYTES
from runtime.errors import UserError
from runtime.files import new_file

DESCENTS = 2
PART = 1 << 23            # weights whose codes are chosen at once: what GPTQ holds in copies
COPIES = 12               # float32 copies of PART weights that gptq.py makes at most
FACTORS = 32              # bytes for each element of a Hessian: itself, damped, and three in float64
RATIOS = [2 ** (-n / 2) for n in range(7)]         # of max|x| / 127: static scales that are tried
SAMPLE = 2048             # tokens whose error is measured
Fold = Callable[[Layer, Walk, dict[str, TensorFormat]], None]
Choose = Callable[[Tensor, Tensor, TensorFormat, bool], QuantizedTensor]


def clip(weight: Tensor, hessian: Tensor, form: TensorFormat, negative: bool = True) -> QuantizedTensor:
    """Codes of weight [N, K] for inputs of second moment hessian [K, K]: to nearest on the clipped grid, the Hessian's diagonal
    being the importance. negative: whether a scale may be negative (grid.py)."""
    grid = clipped_grid(weight, form, damped(hessian).diagonal(), negative)
    return grid.tensor(grid.codes(weight))


def gptq_descended(weight: Tensor, hessian: Tensor, form: TensorFormat, negative: bool = True) -> QuantizedTensor:
    """The same by GPTQ in activation order, the Hessian's pivots being the importance, then coordinate descent, the refit of
    scales and a last descent."""
    order = activation_order(hessian)
    factor, damping = factorize(hessian, order)
    if damping > DAMPING:
        tqdm.write(f"note: a Hessian was not positive definite, and was dampened by {damping:g}", file=sys.stderr)
    price = torch.empty(len(order))
    price[order] = factor.diagonal() ** -2                 # what is left of an error after compensation
    steady = damped(hessian, damping)

    def descended(rows: Tensor) -> QuantizedTensor:
        grid = clipped_grid(rows, form, price, negative)
        codes = descend(rows, steady, grid, gptq(rows, hessian, grid, factor=factor), DESCENTS)
        grid = refit(rows, steady, grid, codes)
        return grid.tensor(descend(rows, steady, grid, codes))
    return by_rows(weight, descended, PART)


def calibrated(checkpoint: Checkpoint, ids: Tensor, plan: Quantization, choose: Choose, work: Path,
               folds: tuple[Fold, ...] = (), vocabulary: dict[str, Tensor] | None = None,
               negative: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the quantized checkpoint, in a fixed order.

    ids: int64 [windows, tokens]. plan: formats (modules left out stay as they are), activations and cache. choose: clip or
    gptq_descended. work: folder for finished layers, made here; the caller removes it. vocabulary: Hessians [hidden, hidden]
    to which the embedding and the head are fitted (sensitivity.py); None clips them by their values alone. negative:
    whether scales may be negative. Raises UserError for a layer whose activations are zero or not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    formats, hessians, chosen = plan.tensors, dict(vocabulary or {}), {}
    for module in ("model.embed_tokens", "lm_head", "model.per_layer_embed", "model.per_layer_projection"):
        if module not in formats:
            continue
        if module == "model.per_layer_projection":
            table = chosen.get("model.embed_tokens")
            hessians[module] = second_moment([(checkpoint.weight("model.embed_tokens") if table is None else table)[ids]])
        if module in hessians:
            found = choose(checkpoint.weight(module), hessians[module], formats[module], negative)
        else:                                                                   # by its values alone
            even = torch.eye(checkpoint.shape(f"{module}.weight")[1])
            found = by_rows(checkpoint.read(f"{module}.weight"), lambda rows: clip(rows, even, formats[module], negative), TABLE)
        if module in ("model.embed_tokens", "model.per_layer_projection"):
            chosen[module] = found.dequantize()
        yield from found.tensors(module).items()
    walk = Walk(checkpoint, ids, chosen)
    for number, layer in walk.layers("quantizing"):
        file, prefix = work / f"layer-{number:03}.safetensors", f"model.layers.{number}."
        if not file.exists():
            tensors = _layer(walk, layer, number, plan, choose, folds, negative)
            with new_file(file) as partial:
                save_tensors(partial, tensors)
        else:
            tensors = load_file(file)
            walk.step(_restored(layer, tensors, prefix, formats))
        yield from ((prefix + name, tensor) for name, tensor in tensors.items())
    written = {f"{module}.weight" for module in formats}
    for name in checkpoint.names():
        if not name.startswith("model.layers.") and name not in written:
            yield name, checkpoint.read(name)


def _layer(walk: Walk, layer: Layer, number: int, plan: Quantization, choose: Choose, folds: tuple[Fold, ...],
           negative: bool) -> dict[str, Tensor]:
    """Fold and quantize one layer, and take the windows through it. Returns its stored tensors."""
    prefix, formats = f"model.layers.{number}.", plan.tensors
    ours = {name.removeprefix(prefix): form for name, form in formats.items() if name.startswith(prefix)}
    for fold in folds:
        fold(layer, walk, ours)
    stored: dict[str, Tensor] = {}
    rounded = plan.rounding_linears() if plan.activations.get("per") == "tensor" else []

    def visit(names: list[str], inputs: list[Tensor]) -> None:
        hessian = second_moment(inputs)
        rounding = [name for name in names if prefix + name in rounded]
        if rounding:                                            # one scale: an export may join these linears
            importance = sum(layer.get_submodule(name).weight.square().sum(0) for name in rounding)
            scale = static_scale(inputs, importance)
            stored.update({f"{name}.input_scale": scale.clone() for name in rounding})
        for name in filter(ours.get, names):
            weight = layer.get_submodule(name).weight
            try:
                if not torch.isfinite(weight).all():
                    raise UserError("a fold gave weights that are not finite: the checkpoint is broken")
                found = choose(weight.data, hessian, ours[name], negative)
            except UserError as error:
                raise UserError(f"{prefix}{name}: {error}") from None
            weight.data = found.dequantize()
            stored.update(found.tensors(name))

    walk.cache = KeyValueRanges() if plan.kv_cache else None
    walk.step(layer, visit)
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


def _restored(layer: Layer, tensors: dict[str, Tensor], prefix: str, formats: dict[str, TensorFormat]) -> Layer:
    """The layer that stored tensors stand for."""
    state = {}
    for name, weight in layer.state_dict().items():
        module = name.removesuffix(".weight")
        form = formats.get(prefix + module)
        if form is None:
            state[name] = tensors[name].float()
        else:
            codes = unpack(tensors[f"{module}.codes"], form.bits, weight.shape[1])
            state[name] = QuantizedTensor(codes, tensors[f"{module}.scales"], tensors.get(f"{module}.zeros"), form.bits,
                                          form.group, form.symmetric).dequantize()
    layer.load_state_dict(state, assign=True)
    return layer


def static_scale(inputs: list[Tensor], importance: Tensor) -> Tensor:
    """The step to int8 for an input of linears, whatever the text, that harms their outputs least: float32 [1].

    max|x| / 127 rounds every input to a grid that its one largest value has chosen. A smaller scale clips that value and
    rounds all others more finely: of RATIOS of it the one whose squared error, weighted by the importance [K] (the squared
    weights of the linears behind, summed over their outputs), is least over a sample of the inputs, chunks [..., K]. It does
    not help where a few values carry the model and all others too, as what down_proj reads in most models.
    """
    most = largest(inputs).amax(0, keepdim=True)
    if most == 0:
        return torch.ones(1)
    rows = torch.cat([part.flatten(0, -2) for part in inputs[::max(1, len(inputs) // 16)]])
    rows = rows[::-(-len(rows) // SAMPLE)]
    scales = [most * ratio / 127 for ratio in RATIOS]
    errors = torch.stack([((fake_int8(rows, scale) - rows).square() @ importance).sum() for scale in scales])
    return scales[int(errors.argmin())]


def calibration_bytes(config: ModelConfig, windows: int, length: int) -> dict[str, int]:
    """Predicted peak memory by kind: the residual stream of all windows, normed, a layer's widest input, and one layer at work.

    Experts: what they have added up too, and, should all tokens choose one, that one's input. What the resident set shows besides is
    the checkpoint's file, whose pages the system takes back when it needs them.
    """
    tokens, shapes = windows * min(length, config.context_length), tensor_shapes(config)
    layers = [{name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{number}.")}
              for number in range(len(config.layers))]
    matrices = [shape for layer in layers for name, shape in layer.items() if len(shape) == 2]
    widest = max(columns for _, columns in matrices)
    streams = 2 + 2 * any(layer.experts for layer in config.layers) + (config.per_layer_size > 0)
    read = {layer.cache_source for layer in config.layers if layer.cache_source is not None}           # whose keys and values stay
    kept = sum(2 * config.layers[n].kv_heads * config.head_size(config.layers[n]) for n in read) + 2 * config.per_layer_size
    table, more = (config.vocab_size * size for size in (config.hidden_size, config.per_layer_size * len(config.layers)))

    def chosen(weights: int) -> int:                # a matrix, what its codes stand for, the codes, and copies of a part of it
        return 9 * weights + 4 * COPIES * min(weights, PART)
    walking = {"token table": 4 * table, "activations": 4 * tokens * (streams * config.hidden_size + widest + kept),
               "layer": 5 * max(sum(map(math.prod, layer.values())) for layer in layers), "Hessian": FACTORS * widest**2,
               "matrix": chosen(max(map(math.prod, matrices)))}
    before = {"token table": max(chosen(table), 4 * table + 2 * more + chosen(min(more, TABLE))),
              "Hessian": FACTORS * config.hidden_size**2}
    return max(walking, before, key=lambda parts: sum(parts.values())) | {"process": PROCESS_BYTES}
