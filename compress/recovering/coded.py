"""Linears whose weight is made of codes, and which learn: their scales alone, or every weight.

    coded(decoder, checkpoint, "", originals)        # every quantized linear of the layers becomes a CodedLinear
    linear.frozen()                                  # the QuantizedTensor it has become

    W[n, k] = values[n, k] * scales[n, k // group]

Scales learn as factors of what they were (`log_factor`), and are in the forward pass what a checkpoint stores of them.
Where weights learn, each has a latent value in units of its scale (of levels: of a mean step between two), and the forward
pass uses the nearest value that the format has; the gradient goes to the latent as if it had not been rounded, except
where it lies beyond the last value (Bengio et al. 2013). A zero point learns from those that do: it moves the range, not the
values in it (Esser et al. 2020, "LSQ"; Bhalgat et al. 2020, "LSQ+"; Chen et al. 2024, "EfficientQAT").

A latent starts where the original weight lies within its code's reach, but NEAR its middle: the rounding that was chosen with
care stays, and what would be next is known. Nothing that is made of latents stays for the backward pass: it is made anew.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.quantizing.grid import stored_scales
from compress.quantizing.levels import nearest, snapped
from models.checkpoint import Checkpoint
from models.network.decoder import for_products
from models.network.quantized import QuantizedTensor

NEAR = 0.8                # of the way to where the next code begins, that a latent is from its own at most, to begin with
KINDS = ("int", "levels")


class _Values:
    """The values that the codes of a weight stand for, in units of its scales: those of a table, or the whole numbers -zero .. top - zero.

    A table's are taken in mean steps between two, so that rounding moves a weight as far as it would without one."""

    def __init__(self, tensor: QuantizedTensor):
        self.top, self.levels, self.unit = 2**tensor.bits - 1, None, 1.0
        if tensor.levels is not None:
            table = tensor.levels.float()
            self.unit = float(table[-1] - table[0]) / self.top
            self.levels, self.nearest = table / self.unit, nearest(table, table / self.unit)
            self.codes = nearest(table, torch.arange(self.top + 1))

    def range(self, zeros: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """The least and the largest, [N, G, 1] or one for all."""
        if self.levels is not None:
            return float(self.levels[0]), float(self.levels[-1])
        zeros = zeros.round().clamp(0, self.top)[:, :, None]
        return -zeros, self.top - zeros

    def reach(self, codes: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """How far below and above its value a code's latents end: half of the step to the next, which a table has of many sizes."""
        if self.levels is None:
            return 0.5, 0.5
        half = F.pad(self.levels.diff() / 2, (1, 1), value=0.5).to(codes.device)
        return half[codes.int()], half[codes.int() + 1]

    def of(self, coded: Tensor, zeros: Tensor) -> Tensor:
        """What codes uint8 [N, G, K/G] stand for, or the nearest such of latents: float32."""
        if self.levels is not None:
            if coded.dtype == torch.uint8:
                return self.levels.to(coded.device)[coded.int()]
            return snapped(coded * self.unit, self.nearest.to(coded.device))
        low, high = self.range(zeros)
        return coded.float() + low if coded.dtype == torch.uint8 else torch.clamp(coded.round(), low, high)

    def codes_of(self, coded: Tensor, zeros: Tensor) -> Tensor:
        """The codes of latents, uint8; codes as they are."""
        if coded.dtype == torch.uint8:
            return coded
        if self.levels is not None:
            return snapped(coded * self.unit, self.codes.to(coded.device)).to(torch.uint8)
        return (self.of(coded, zeros) - self.range(zeros)[0]).to(torch.uint8)


class _Product(torch.autograd.Function):
    """values * scales, [N, K] in the type of products. coded [N, G, K/G]: codes uint8, or float32 latents; zeros, scales [N, G]."""

    @staticmethod
    def forward(context, coded: Tensor, zeros: Tensor, scales: Tensor, values: _Values) -> Tensor:
        context.save_for_backward(coded, zeros, scales)
        context.values = values
        return for_products(values.of(coded, zeros).mul_(scales[:, :, None]).flatten(1))

    @staticmethod
    def backward(context, gradient: Tensor):
        (coded, zeros, scales), values = context.saved_tensors, context.values
        gradient = gradient.float().view(coded.shape)
        of_scales = (gradient * values.of(coded, zeros)).sum(-1)
        if not context.needs_input_grad[0]:
            return None, None, of_scales, None
        gradient = gradient * scales[:, :, None]
        low, high = values.range(zeros)
        beyond = (coded < low - 0.5) | (coded > high + 0.5)
        of_zeros = -(gradient * beyond).sum(-1) if context.needs_input_grad[1] else None
        return gradient.masked_fill_(beyond, 0), of_zeros, of_scales, None


class CodedLinear(nn.Module):
    """A linear whose weight is made of codes; original [N, K]: the weight they came from, where weights are to learn."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, original: Tensor | None = None):
        super().__init__()
        self.tensor, self.bias, self.values = tensor, bias, _Values(tensor)
        scales, codes = tensor.scales.float(), tensor.codes.unflatten(1, (tensor.scales.shape[1], -1))
        zeros = torch.full_like(scales, 2.0 ** (tensor.bits - 1)) if tensor.zeros is None else tensor.zeros.float()
        self.register_buffer("scales", scales, persistent=False)
        self.log_factor = nn.Parameter(torch.zeros_like(scales))
        if original is None:
            self.register_buffer("coded", codes, persistent=False)
        else:
            values = self.values.of(codes, zeros)
            away = original.float().view(values.shape) / (scales * self.values.unit)[:, :, None] - values
            below, above = self.values.reach(codes)
            self.latent = nn.Parameter(values + away.clamp(-NEAR * below, NEAR * above))
        if original is not None and tensor.zeros is not None:
            self.zeros = nn.Parameter(zeros)
        else:
            self.register_buffer("zeros", zeros, persistent=False)

    def stored_scales(self) -> Tensor:
        """The scales as a checkpoint has them, float32; to the factors' gradient they are not rounded."""
        scales = self.scales * self.log_factor.exp()
        return scales + (stored_scales(scales.detach(), self.tensor.format) - scales.detach())

    def weight(self) -> Tensor:
        coded = self.coded if hasattr(self, "coded") else self.latent
        return _Product.apply(coded, self.zeros, self.stored_scales() * self.values.unit, self.values)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)

    @torch.no_grad()
    def frozen(self) -> QuantizedTensor:
        """What a checkpoint stores, on the host."""
        coded, scales = self.coded if hasattr(self, "coded") else self.latent, stored_scales(self.stored_scales(), self.tensor.format).cpu()
        return replace(self.tensor, codes=self.values.codes_of(coded, self.zeros).flatten(1).cpu(), scales=scales.to(self.tensor.scales.dtype),
                       zeros=None if self.tensor.zeros is None else self.zeros.round().clamp(0, self.values.top).to(torch.uint8).cpu())


def coded(module: nn.Module, checkpoint: Checkpoint, prefix: str, original: Checkpoint | None) -> None:
    """Make every quantized linear of a layer, or of a decoder's layers, a CodedLinear; nothing else is trained but norms.

    prefix: what stands before the module's own names in the checkpoint. original: where weights are to learn, the model they came from.
    """
    module.requires_grad_(False)
    for name, form in checkpoint.quantization.tensors.items():
        if name.startswith(prefix or "model.layers.") and form.kind in KINDS:
            parent, last = name.removeprefix(prefix).rpartition(".")[::2]
            linear = module.get_submodule(name.removeprefix(prefix))
            found = CodedLinear(checkpoint.quantized(name), linear.bias, None if original is None else original.weight(name))
            setattr(module.get_submodule(parent), last, found)
    for part in module.modules():
        if isinstance(part, (nn.RMSNorm, nn.LayerNorm)):
            part.requires_grad_(True)


def rates(peak: float, weights: float) -> Callable[[str], float]:
    """Shares of the learning rate `peak` by parameters' names: what has steps of codes for its unit learns at `weights`."""
    return lambda name: weights / peak if name.rpartition(".")[2] in ("latent", "zeros") else 1.0
