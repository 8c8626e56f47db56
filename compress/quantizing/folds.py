"""Folds: a layer rewritten so that its function stays and its weights are easier to round.

    fold(layer, walk, formats)       # in place; formats: the layer's linears that will be quantized, and how

The inputs of a group of linears are multiplied by s in the linears' weights and divided by s where they are made, so that
nothing costs a byte or an operation more:
    q, k, v and gate, up:  in the norm's gain (and bias) before them
    o:                     in the rows (and bias) of v; heads that share a value head share its factors
    down:                  in the rows (and bias) of up, which the gate's activation does not touch; a plain MLP, whose
                           activation stands between, is left alone

`awq` (Lin et al. 2024, "AWQ") makes inputs that matter larger: s = (mean square of the input)^(a/2), where a is the one of
EXPONENTS with the least output error sum (dW H dW^T) over the linears' sampled rows after rounding to nearest on the
clipped grid; a = 0 changes nothing, so the estimate never grows. GPTQ then starts from weights that are easier to round.

`smooth` (Xiao et al. 2023, "SmoothQuant") moves the outliers of activations into the weights, so that both fit 8 bits:
s = max|x_k|^a / max|w_k|^(1 - a), a = 1/2, maxima over calibration text and over all linears of the group.

`rotate_values` (Ashkboos et al. 2024, "QuaRot"; signs as in Tseng et al. 2024, "QuIP#") spreads outliers among a head's
channels over all: rows of v become R v and the columns of o in every head that reads it o R^T, R a Hadamard matrix with
random signs where head_dim is a power of two, else a random rotation. The softmax mixes tokens, so R passes through it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.layerwise import Walk, largest, second_moment
from compress.quantizing.clipping import clipped_grid
from compress.quantizing.gptq import damped
from models.network.decoder import Layer
from models.network.quantized import TensorFormat

EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
ROWS = 128                     # rows of each linear that AWQ's search rounds
STRENGTH = 0.5                 # SmoothQuant's a
Tie = Callable[[Tensor], Tensor]


@torch.no_grad()
def fold_scales(layer: Layer, choose: Callable[[dict[str, nn.Linear], Tie], Tensor | None]) -> None:
    """Fold what `choose` gives for each group of linears into `layer`, in place.

    choose(linears by name, tie) gives positive factors [K] that are their own `tie`, or None to leave the group alone;
    tie makes factors equal where they must be.
    """
    attention, mlp = layer.self_attn, layer.mlp
    groups = [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.input_layernorm),
              (("self_attn.o_proj",), attention.v_proj),
              (("mlp.up_proj",) if mlp.gate_proj is None else ("mlp.gate_proj", "mlp.up_proj"), layer.post_attention_layernorm)]
    if mlp.gate_proj is not None:
        groups.append((("mlp.down_proj",), mlp.up_proj))
    for names, maker in groups:
        linears = {name: layer.get_submodule(name) for name in names}
        values = maker is attention.v_proj
        scales = choose(linears, (lambda s: shared(s, attention)[1]) if values else (lambda s: s))
        if scales is None:
            continue
        for linear in linears.values():
            linear.weight *= scales
        made = shared(scales, attention)[0] if values else scales
        maker.weight /= made if maker.weight.ndim == 1 else made[:, None]             # a norm's gain, or a linear's rows
        if getattr(maker, "bias", None) is not None:
            maker.bias /= made


def shared(scales: Tensor, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Factors of o's inputs, made equal in the heads that share a value head: for v's rows, and for o's columns."""
    size = attention.head_dim
    grouped = scales.view(attention.v_proj.out_features // size, -1, size)
    mean = grouped.log().mean(1, keepdim=True).exp()
    return mean.flatten(), mean.expand_as(grouped).reshape(-1)


@torch.no_grad()
def awq(layer: Layer, walk: Walk, formats: dict[str, TensorFormat]) -> None:
    moments = walk.inputs(layer, second_moment)

    def choose(linears: dict[str, nn.Linear], tie: Tie) -> Tensor | None:
        wanted = {name: formats[name] for name in linears if name in formats}
        return _search(linears, damped(moments[next(iter(linears))]), wanted, tie) if wanted else None
    fold_scales(layer, choose)


def _search(linears: dict[str, nn.Linear], hessian: Tensor, formats: dict[str, TensorFormat], tie: Tie) -> Tensor:
    """The factors [K] with the least output error of the linears that will be rounded."""
    loudness = hessian.diagonal()
    best, found = None, None
    for exponent in EXPONENTS:
        scales = _even(tie(loudness ** (exponent / 2)))
        error = 0.0
        for name, form in formats.items():
            weight = linears[name].weight
            sample = weight[::max(1, len(weight) // ROWS)]
            grid = clipped_grid(sample * scales, form, loudness / scales**2)
            lost = grid.values(grid.codes(sample * scales)) / scales - sample
            error += float(((lost @ hessian) * lost).sum()) * len(weight) / len(sample)
        if best is None or error < best:
            best, found = error, scales
    return found


def smooth(layer: Layer, walk: Walk, formats: dict[str, TensorFormat]) -> None:
    maxima = walk.inputs(layer, largest)

    def choose(linears: dict[str, nn.Linear], tie: Tie) -> Tensor | None:
        if not any(name in formats for name in linears):
            return None
        activations = maxima[next(iter(linears))].clamp_min(1e-5)
        weights = torch.stack([linear.weight.abs().amax(0) for linear in linears.values()]).amax(0).clamp_min(1e-5)
        return _even(tie(activations**STRENGTH / weights ** (1 - STRENGTH)))
    fold_scales(layer, choose)


def _even(scales: Tensor) -> Tensor:
    """Of geometric mean 1."""
    return scales / scales.log().mean().exp()


@torch.no_grad()
def rotate_values(layer: Layer, walk: Walk | None = None, formats: dict[str, TensorFormat] | None = None, seed: int = 0) -> None:
    attention = layer.self_attn
    size, generator = attention.head_dim, torch.Generator().manual_seed(seed)
    values, heads = attention.v_proj.out_features // size, attention.o_proj.in_features // size
    turns = torch.stack([rotation(size, generator) for _ in range(values)])                   # [values, D, D]
    rows = attention.v_proj.weight.view(values, size, -1)
    attention.v_proj.weight.copy_((turns @ rows).flatten(0, 1))
    if attention.v_proj.bias is not None:
        attention.v_proj.bias.copy_((turns @ attention.v_proj.bias.view(values, size, 1)).flatten())
    columns = attention.o_proj.weight.view(-1, heads, size)
    read = turns.repeat_interleave(heads // values, 0)
    attention.o_proj.weight.copy_(torch.einsum("nhd,hed->nhe", columns, read).flatten(1))


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], float32: Hadamard with random signs for powers of two, else random."""
    if size & (size - 1):
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return (q * r.diagonal().sign()).float()              # signs make the distribution uniform (Haar)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return matrix * signs / size**0.5
