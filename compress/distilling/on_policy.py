"""Text that the student writes itself, for the teacher to score: generalized knowledge distillation (GKD).

    rows = OnPolicy(blocks, student, 0.5, 64, 0, lambda: trainer)        # in place of the blocks, for models.training.trainer

With probability `share` a micro-batch keeps the first `prompt` tokens of each block and lets the student write the rest
at temperature 1; the loss counts on what it wrote. A student that only ever reads others' text never learns to go on from
its own mistakes (Agarwal et al. 2024). Chance is drawn from the seed, the step and the rows, so a resumed run writes
the same. The gradient does not pass through the choice of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from compress.teacher import write
from models.data.corpus import IGNORE
from models.network.decoder import Decoder
from models.training.trainer import Rows, Trainer


class OnPolicy:
    """Rows of `blocks`, some continued by the student. `trainer()` asks for them, and knows the step and the precision."""

    lengths = None

    def __init__(self, blocks: Rows, student: Decoder, share: float, prompt: int, seed: int,
                 trainer: Callable[[], Trainer], vocabulary: int | None = None):
        self.blocks, self.student, self.share, self.prompt = blocks, student, share, prompt
        self.seed, self.trainer, self.vocabulary = seed, trainer, vocabulary

    def __len__(self) -> int:
        return len(self.blocks)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        input_ids, labels = self.blocks.rows(indices)
        chance = np.random.default_rng((self.seed, self.trainer().step, *map(int, indices)))
        if chance.random() >= self.share:
            return input_ids, labels
        device = self.student.model.embed_tokens.weight.device
        generator = torch.Generator(device).manual_seed(int(chance.integers(2**62)))
        with self.trainer().accelerator.autocast():
            written = write(self.student, torch.from_numpy(input_ids[:, :self.prompt]).to(device),
                            input_ids.shape[1] + 1 - self.prompt, generator, self.vocabulary).cpu().numpy()
        labels = np.concatenate((np.full_like(labels[:, 1:self.prompt], IGNORE), written), 1)
        return np.concatenate((input_ids[:, :self.prompt], written[:, :-1]), 1), labels
