"""LFM2's short convolution: out(c(u) * conv(b(u) * x(u))), a gated causal convolution of a few taps over every channel.

Weights: b, c, x and out linears, the taps [hidden, kernel]. State: the last kernel - 1 values of b * x (Liquid AI, LFM2, 2025).
"""

from torch import Tensor, nn

from models.network.config import LayerConfig, ModelConfig
from models.network.mixers.step import Convolution, Group, Linear, Step


class ShortConv(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.b_proj, self.c_proj, self.x_proj, self.out_proj = (
            Linear(config.hidden_size, config.hidden_size, bias=config.conv_bias) for _ in range(4))
        self.conv = Convolution(config.hidden_size, layer.kernel, config.conv_bias)

    @property
    def writer(self) -> nn.Module:
        return self.out_proj

    def groups(self, norm: nn.Module | None) -> list[Group]:
        return [Group((self.b_proj, self.c_proj, self.x_proj), norm), Group((self.out_proj,), self.c_proj)]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.out_proj(self.c_proj(x) * self.conv(self.b_proj(x) * self.x_proj(x), step))
