"""Text for calibration and recovery: windows of tokens, in equal shares from every --data a stage is given.

Equal shares, because a model calibrated on ten megabytes of speeches and half a megabyte of encyclopedia forgets the
latter. A text too short for its share gives all it has, and the others more. More texts than windows count as one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.formats.checkpoint import Checkpoint
from models.data.corpus import DataOptions, build_corpus
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


def equal_shares(available: list[int], wanted: int) -> list[int]:
    """How many of `wanted` windows each text gives, of those it has: as equally as what they have allows.

    The shortest text chooses first, and what it leaves is shared among the longer ones.
    """
    shares = [0] * len(available)
    for rank, text in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[text] = min(available[text], wanted // (len(available) - rank))
        wanted -= shares[text]
    return shares


def corpus_windows(checkpoint: Checkpoint, options: DataOptions, windows: int, length: int) -> Tensor:
    """Windows [windows, length] of the text that `options` (DataOptions) names, tokenized by a checkpoint's tokenizer.

    Raises UserError for a checkpoint without tokenizer.json, and for text shorter than one window.
    """
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{checkpoint.path} has no tokenizer.json, which reading text needs")
    eos = checkpoint.config.eos_token_ids
    texts = [(name,) for name in options.data] if len(options.data) <= windows else [options.data]
    texts = [torch.from_numpy(np.asarray(build_corpus(options, text, tokenizer, eos=eos[0] if eos else 0).tokens).astype(np.int64))
             for text in texts]
    shares = equal_shares([len(tokens) // length for tokens in texts], windows)
    if not any(shares):
        return calibration_windows(torch.cat(texts), windows, length)
    return torch.cat([calibration_windows(tokens, share, length) for tokens, share in zip(texts, shares) if share])
