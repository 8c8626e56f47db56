"""Folds: a layer rewritten so that its function stays and its weights are easier to round.

    fold(layer, walk, formats)       # in place; formats: the layer's linears that will be quantized, and how

The inputs of a group of linears (Block.groups) are multiplied by s in the linears' weights and divided by s where they are
made, so that nothing costs a byte or an operation more:
    what reads a block's norm:  in the norm's gain (and bias); where no norm is, it is left alone
    what writes to the stream:  in the rows (and bias) of the linear that makes its inputs (v, up, the short convolution's c), or
                                the gain of the norm that does (Mamba-2, delta rule); inputs that have one row or gain in common share
                                a factor; where something stands between that is not linear, it is left alone

`awq` (Lin et al. 2024, "AWQ") makes inputs that matter larger: s = (mean square of the input)^(a/2), where a is the one of
EXPONENTS with the least output error sum (dW H dW^T) over the linears' sampled rows after rounding to nearest on the
clipped grid; a = 0 changes nothing, so the estimate never grows. GPTQ then starts from weights that are easier to round.

`smooth` (Xiao et al. 2023, "SmoothQuant") moves the outliers of activations into the weights, so that both fit 8 bits:
s = max|x_k|^a / max|w_k|^(1 - a), a = 1/2, maxima over calibration text and over all linears of the group.

`rotate_values` (Ashkboos et al. 2024, "QuaRot"; signs as in Tseng et al. 2024, "QuIP#") spreads outliers among a head's
channels over all: rows of v become R v and the columns of o in every head that reads it o R^T, R a Hadamard matrix with
random signs where head_dim is a power of two, else a random rotation. The softmax mixes tokens, so R passes through it, as
it does through a norm of v without a gain; a gate it does not pass. What is no attention stays as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.layerwise import Walk, largest, second_moment
from compress.quantizing.clipping import clipped_grid
from compress.quantizing.gptq import damped
from models.network.decoder import Layer
from models.network.mixers.attention import Attention
from models.network.quantized import TensorFormat
from runtime.errors import UserError

EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
ROWS = 128                     # rows of each linear that AWQ's search rounds, of many experts fewer
STRENGTH = 0.5                 # SmoothQuant's a
Tie = Callable[[Tensor], Tensor]


@torch.no_grad()
def fold_scales(layer: Layer, choose: Callable[[dict[str, nn.Linear], Tie], Tensor | None]) -> None:
    """Fold what `choose` gives for each group of linears into `layer`, in place.

    choose(linears by name, tie) gives positive factors [K] that are their own `tie`, or None to leave the group alone;
    tie makes factors equal where they must be.
    """
    names = {module: name for name, module in layer.named_modules()}
    for group in (group for block in layer.blocks for group in block.groups()):
        maker = group.maker
        if maker is None:
            continue
        linears = {names[reader]: reader for reader in group.readers}
        made, inputs = len(maker.weight), group.readers[0].in_features
        sources, head = group.sources(made, inputs).to(maker.weight.device), group.head or made

        def mean(scales: Tensor) -> Tensor:                     # of those that share a factor
            return scales.view(made // head, -1, head).log().mean(1).exp().flatten() if inputs > made or group.head else scales
        scales = choose(linears, lambda s: mean(s)[sources])
        if scales is None:
            continue
        for linear in linears.values():
            linear.weight *= scales
        made_by = mean(scales)
        maker.weight /= made_by if maker.weight.ndim == 1 else made_by[:, None]       # a norm's gain, or a linear's rows
        if getattr(maker, "bias", None) is not None:
            maker.bias /= made_by


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
    tried, errors, rows = [], [], ROWS if len(formats) <= 4 else max(4, 4 * ROWS // len(formats))
    for exponent in EXPONENTS:
        scales = _even(tie(loudness ** (exponent / 2)))
        error = 0.0
        for name, form in formats.items():
            weight = linears[name].weight
            sample = weight[::max(1, len(weight) // rows)]
            grid = clipped_grid(sample * scales, form, loudness / scales**2)
            lost = grid.values(grid.codes(sample * scales)) / scales - sample
            error = error + ((lost @ hessian) * lost).sum().double() * len(weight) / len(sample)
        tried.append(scales)
        errors.append(error)
    return tried[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]


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
    for block in layer.blocks:
        attention = block.mixer
        if not isinstance(attention, Attention):
            continue
        if attention.g_proj is not None:
            raise UserError("--fold values turns the values of each head, and the attention of this model multiplies them by a gate, "
                            "which no rotation passes: leave it out")
        size, generator = attention.head_dim, torch.Generator().manual_seed(seed)     # layers that share values turn them alike
        heads = attention.o_proj.in_features // size
        values = heads // attention.per_value
        turns = torch.stack([rotation(size, generator) for _ in range(values)]).to(attention.o_proj.weight.device)    # [values, D, D]
        if attention.v_proj is not None:
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
