"""Move a model's weights off the grid of an earlier quantization without changing what it computes.

Weights dequantized from a 4-bit file lie on a 4-bit grid, so quantizing them to 4 bits again looks lossless, and no
figure may rest on that. Here each channel between two linear operations is multiplied by a random factor
exp(uniform(-0.1, 0.1)) on one side and divided by it on the other, for every group of linears that read one input (`Block.groups`):

    the gain of the norm that makes it / s,     columns of the linears * s
    rows of the linear that makes it * s,       columns of the linears / s

The logits stay equal to rounding. Factors depend only on seed, layer and channel. Embeddings, output matrix and
q/k-norms are left as they are. A model with a linear that has no such neighbour is refused by the linear's name: a plain MLP's
second one (GPT-2), what reads the stream without a norm (OLMo 2), Gemma 4's o.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from models.network.config import ModelConfig
from models.network.decoder import named_groups, tensor_shapes
from runtime.errors import UserError

SPREAD = 0.1


def off_grid(config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]],
             seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors` (names of `Decoder`, any order) rescaled, in float32.

    Raises UserError where a linear of the layers would stay as it is.
    """
    shapes, changes = tensor_shapes(config), {}
    for layer, blocks in enumerate(named_groups(config)):
        for index, group in enumerate(group for block in blocks for group in block):
            if group.maker is None:
                continue
            made, gain = shapes[f"{group.maker}.weight"][0], len(shapes[f"{group.maker}.weight"]) == 1
            random = np.random.default_rng([seed, layer, index])
            factors = torch.from_numpy(np.exp(random.uniform(-SPREAD, SPREAD, made)).astype(np.float32))
            for part in ("weight", "bias"):
                rows = factors if gain or part == "bias" else factors[:, None]
                changes.setdefault(f"{group.maker}.{part}", []).insert(0, (rows, -1 if gain else 1))
            for reader in group.readers:
                columns = factors[group.sources(made, shapes[f"{reader}.weight"][1])]
                changes.setdefault(f"{reader}.weight", []).append((columns, 1 if gain else -1))
        for still in (reader for block in blocks for group in block for reader in group.readers if f"{reader}.weight" not in changes):
            raise UserError(f"--off-grid cannot move {still} of family {config.family}: what it reads is made by nothing linear")
    return ((name, _rescaled(tensor.float(), changes.get(name, ()))) for name, tensor in tensors)


def _rescaled(tensor: torch.Tensor, changes: Iterable[tuple[torch.Tensor, int]]) -> torch.Tensor:
    for factors, sign in changes:
        tensor = tensor / factors if factors.ndim == tensor.ndim == 1 and sign < 0 else tensor * factors**sign
    return tensor
