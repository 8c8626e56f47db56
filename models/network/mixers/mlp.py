"""The MLP: down(act(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x)))."""

from torch import Tensor, nn

from models.network.config import ModelConfig
from models.network.mixers.step import ACTIVATIONS, Group, Linear, Step


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(config.hidden_size, size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = Linear(size, config.hidden_size, bias=config.mlp_bias)

    @property
    def writer(self) -> nn.Module:
        return self.down_proj

    def groups(self, norm: nn.Module | None) -> list[Group]:
        """The activation of a plain MLP stands between up and down, so nothing can be moved there."""
        if self.gate_proj is None:
            return [Group((self.up_proj,), norm), Group((self.down_proj,), None)]
        return [Group((self.gate_proj, self.up_proj), norm), Group((self.down_proj,), self.up_proj)]

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
