"""Rotary positions and the ways they are stretched over longer contexts.

Every pair of a head's dimensions (i, i + head_dim / 2) has a frequency; pairs that do not rotate have 0. Sources: Su et al. 2021
(RoPE); Chen et al. 2023 (linear); Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); Llama 3's and Gemma 4's ("proportional", whose
exponents are shares of the whole head) are those of their published configurations.
"""

import math

import torch
from torch import Tensor

from models.network.config import Rope

# rope_type -> {parameter: its default; None: it must be there}
SCALINGS = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None, "original_max_position_embeddings": None},
    "yarn": {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
             "attention_factor": 1.0, "llama_4_scaling_beta": 0.0},
    "longrope": {"short_factor": None, "long_factor": None, "original_max_position_embeddings": None, "attention_factor": 1.0},
    "proportional": {"factor": 1.0},
}


def frequencies(rope: Rope, head_dim: int, length: int) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [head_dim / 2]. length: of the context, which LongRoPE looks at."""
    dims, scaling = rope.dims(head_dim), rope.scaling or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    over = head_dim if kind == "proportional" else dims
    found = 1.0 / rope.theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / over)
    if kind in ("linear", "proportional"):
        found = found / factor
    elif kind == "longrope":
        wide = length > scaling["original_max_position_embeddings"]
        found = found / torch.tensor(scaling["long_factor" if wide else "short_factor"], device="cpu")
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * found / (2 * math.pi)       # full turns within the original context
        share = ((turns - low) / (high - low)).clamp(0, 1)      # 1: fast dimensions, kept; 0: slow ones, stretched
        found = share * found + (1 - share) * found / factor
    elif kind == "yarn":
        first, last = (dims * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
                       for turns in (scaling["beta_fast"], scaling["beta_slow"]))         # pairs that turn so often in it
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        ramp = ((torch.arange(dims // 2, device="cpu") - first) / max(last - first, 0.001)).clamp(0, 1)
        found = found / factor * ramp + found * (1 - ramp)
    return torch.nn.functional.pad(found, (0, (head_dim - dims) // 2))


def rotations(rope: Rope, head_dim: int, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, float32 [..., head_dim / 2], for int positions of any shape [...] in a context of `length`."""
    angles = positions[..., None].float() * frequencies(rope, head_dim, length).to(positions.device, non_blocking=True)
    factor = torch.ones(head_dim // 2, device=positions.device)
    factor[:rope.dims(head_dim) // 2] = (rope.scaling or {}).get("attention_factor", 1.0)
    return angles.cos() * factor, angles.sin() * factor


def query_factors(rope: Rope | None, positions: Tensor) -> Tensor | None:
    """What queries at `positions` are multiplied by after their rotation, float32 [...] (Ministral 3); None: nothing."""
    scaling = rope.scaling if rope and rope.scaling else {}
    if not scaling.get("llama_4_scaling_beta"):
        return None
    return 1 + scaling["llama_4_scaling_beta"] * torch.log1p((positions // scaling["original_max_position_embeddings"]).float())
