"""A mixture of experts: a router chooses a few MLPs for every token, and weighs what they give (Shazeer et al. 2017).

Weights: a router [experts, hidden] (and a bias for the choice alone), an MLP for each expert, perhaps one that all tokens pass. No state.
Routers: "softmax" of all experts' scores (Qwen3, OLMoE), "chosen": softmax of those chosen (Granite), "sigmoid" (LFM2).
"""

import torch
from torch import Tensor, nn

from models.network.config import LayerConfig, ModelConfig
from models.network.mixers.mlp import MLP
from models.network.mixers.step import Group, Linear, Step


class Experts(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self.kind, self.chosen, self.normalized = config.router, layer.experts_per_token, config.router_normalized
        self.router = Linear(config.hidden_size, layer.experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(layer.experts) if config.router_bias else None)     # nothing trains it
        self.experts = nn.ModuleList(MLP(config, layer.mlp_size) for _ in range(layer.experts))
        self.shared = MLP(config, layer.shared_size) if layer.shared_size else None

    @property
    def parts(self) -> list[MLP]:
        """The MLPs, that which all tokens pass last."""
        return [*self.experts, *([] if self.shared is None else [self.shared])]

    def groups(self, norm: nn.Module | None) -> list[Group]:
        """The router and the first linears of all MLPs read one input; a factor there is all of theirs."""
        inner = [part.groups(norm) for part in self.parts]
        return [Group((self.router, *(reader for first, _ in inner for reader in first.readers)), norm), *(last for _, last in inner)]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For x [tokens, hidden]: the weights, float32, and numbers of the chosen experts, both [tokens, chosen]."""
        scores = self.router(x).float()
        if self.kind == "chosen":
            scores, chosen = scores.topk(self.chosen)
            return scores.softmax(-1), chosen
        scores = scores.sigmoid() if self.kind == "sigmoid" else scores.softmax(-1)
        chosen = (scores if self.router_bias is None else scores + self.router_bias).topk(self.chosen).indices
        weights = scores.gather(-1, chosen)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-6 if self.kind == "sigmoid" else 0))
        return weights, chosen

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        found = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        experts, places = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(self.experts), device=x.device), right=True).tolist()   # all that the host asks
        for expert, start, end in zip(self.experts, (0, *ends), ends):
            if end > start:
                rows = places[start:end] // self.chosen
                shares = weights.flatten()[places[start:end], None]
                found = found.index_add(0, rows, (expert(tokens[rows]) * shares).to(found.dtype))
        return found.view_as(x)
