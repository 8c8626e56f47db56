"""A recurrent language model: a baseline to beat, and a draft whose state is one vector a layer.

Token embedding -> gated recurrent units (Cho et al. 2014; torch.nn.GRU) -> projection back onto the embedding (tied).
Trained by `python -m models.train --architecture gru` with the same data, loss and checkpoints as the decoder.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.formats.baseline import read_baseline, write_baseline

MODEL_TYPE = "edgewright_gru"
LAYERS = 2


class GRULanguageModel(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, layers: int = LAYERS):
        super().__init__()
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, layers
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, layers, batch_first=True)
        nn.init.normal_(self.embed_tokens.weight, std=hidden_size ** -0.5)

    def forward(self, input_ids: Tensor, logits_positions: Tensor | None = None) -> Tensor:
        """int64 [b, s] -> float32 logits [b, s, vocab], or [b, k, vocab] at `logits_positions` int64 [b, k]."""
        hidden, _ = self.gru(self.embed_tokens(input_ids))
        if logits_positions is not None:
            hidden = hidden.gather(1, logits_positions[:, :, None].expand(-1, -1, hidden.shape[2]))
        return F.linear(hidden, self.embed_tokens.weight).float()

    def step(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Continue from `state` [layers, b, hidden] (None: the beginning) over input_ids int64 [b, s].

        Returns (float32 logits of the last token [b, vocab], new state).
        """
        hidden, state = self.gru(self.embed_tokens(input_ids), state)
        return F.linear(hidden[:, -1], self.embed_tokens.weight).float(), state


def gru_of_size(parameters: float, vocab_size: int) -> GRULanguageModel:
    """The model with about that many parameters: vocab·h for the tied embedding, about 6·h² a layer."""
    hidden = (math.sqrt(vocab_size ** 2 + 24 * LAYERS * parameters) - vocab_size) / (12 * LAYERS)
    return GRULanguageModel(vocab_size, max(16, 16 * round(hidden / 16)))


def write_gru(out: Path, model: GRULanguageModel, tokenizer: Path, stage: dict) -> None:
    sizes = {"vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers}
    write_baseline(out, {"model_type": MODEL_TYPE} | sizes, model.state_dict(), tokenizer, stage)


def load_gru(path: Path | str) -> GRULanguageModel:
    """Open a folder that `write_gru` made."""
    config, tensors = read_baseline(path, MODEL_TYPE)
    model = GRULanguageModel(config["vocab_size"], config["hidden_size"], config["num_hidden_layers"])
    model.load_state_dict(tensors)
    return model
