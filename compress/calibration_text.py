"""Text for calibration and recovery: windows of tokens spread evenly over the files a stage is given."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.data import DataOptions, build_corpus
from runtime.errors import UserError


def calibration_windows(tokens: Tensor, windows: int, length: int) -> Tensor:
    """int64 [windows, length], spread evenly over a stream of token ids.

    Raises UserError where the text is shorter than one window; fewer windows are given where it has fewer.
    """
    found = len(tokens) // length
    if found == 0:
        raise UserError(f"the calibration text has {len(tokens)} tokens, which is less than one window of {length}: "
                        f"give more --data, or a shorter --window")
    rows = torch.linspace(0, found - 1, min(windows, found)).round().long()
    return tokens[:found * length].view(found, length)[rows].long()


def corpus_windows(checkpoint: Checkpoint, options: DataOptions, windows: int, length: int) -> Tensor:
    """Windows [windows, length] of the text that `options` (DataOptions) names, tokenized by a checkpoint's tokenizer.

    Raises UserError for a checkpoint without tokenizer.json, and for text shorter than one window.
    """
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{checkpoint.path} has no tokenizer.json, which reading text needs")
    eos = checkpoint.config.eos_token_ids
    corpus = build_corpus(options, options.data, tokenizer, eos=eos[0] if eos else 0)
    return calibration_windows(torch.from_numpy(np.asarray(corpus.tokens).astype(np.int64)), windows, length)
