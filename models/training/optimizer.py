"""AdamW (Loshchilov and Hutter 2019) with its learning-rate schedules.

Matrices decay; norms and biases do not. Schedules warm up linearly from 0 to the peak over `warmup` steps, then:
cosine (Loshchilov and Hutter 2017) falls along half a cosine to `floor` times the peak at the last step; WSD
(warm-up, stable, decay; Hu et al. 2024, MiniCPM) stays at the peak and falls linearly to the floor over the last
`decay_share` of the steps.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch

BETAS = (0.9, 0.95)


def adamw(module: torch.nn.Module, weight_decay: float, rates: Callable[[str], float] = lambda name: 1.0) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters; at every step the learning rate is set, times `rates` of the name."""
    groups = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[rates(name), weight_decay if parameter.dim() >= 2 else 0.0].append(parameter)
    return torch.optim.AdamW([{"params": parameters, "rate": rate, "weight_decay": decay}
                              for (rate, decay), parameters in groups.items()], lr=0.0, betas=BETAS, fused=True)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, schedule: str, floor: float,
                  decay_share: float) -> float:
    """The rate of update number `step` (0 to steps - 1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    decay = max(1, round(decay_share * steps))
    return peak * (floor + (1 - floor) * min(1.0, (steps - step) / decay))
