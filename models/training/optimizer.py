"""AdamW (Loshchilov and Hutter 2019), or SGD with momentum (Polyak 1964), and the learning-rate schedules.

Matrices decay, with SGD by a part of them added to the gradient; norms and biases do not. Schedules warm up linearly from
0 to the peak over `warmup` steps, then: cosine (Loshchilov and Hutter 2017) falls along half a cosine to `floor` times the peak at the last step; WSD
(warm-up, stable, decay; Hu et al. 2024, MiniCPM) stays at the peak and falls linearly to the floor over the last
`decay_share` of the steps.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch

from models.training.options import BETAS, MOMENTUM, WEIGHT_DECAY, TrainerOptions


def optimizer(module: torch.nn.Module, options: TrainerOptions, rates: Callable[[str], float] = lambda name: 1.0) -> torch.optim.Optimizer:
    """What the options ask for, over the module's trainable parameters; at every step the learning rate is set, times `rates` of the
    name. Fused, because only that can be told on the device to leave everything as it is."""
    groups, usual = defaultdict(list), WEIGHT_DECAY if options.optimizer == "adamw" else 0.0
    weight_decay = usual if options.weight_decay is None else options.weight_decay
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[rates(name), weight_decay if parameter.dim() >= 2 else 0.0].append(parameter)
    found = [{"params": parameters, "rate": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
    if options.optimizer == "sgd":
        return torch.optim.SGD(found, lr=0.0, momentum=MOMENTUM if options.momentum is None else options.momentum, fused=True)
    return torch.optim.AdamW(found, lr=0.0, betas=options.betas or BETAS, fused=True)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD its momentum, 0, before the first step: fused, it would take what lies in memory after a first step that is left out."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


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
