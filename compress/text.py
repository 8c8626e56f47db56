"""The text that stages read: windows to calibrate on, and text to learn from and to be judged on, apart.

Windows are taken in equal shares from every --data a stage is given, because a model calibrated on ten megabytes of
speeches and half a megabyte of encyclopedia forgets the latter. A text too short for its share gives all it has, and the
others more. More texts than windows count as one.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.corpus import Corpus, DataOptions, build_corpus, read_documents
from models.data.records import find_sources
from models.checkpoint import Checkpoint
from runtime.errors import UserError
from runtime.files import new_file

HELD_OUT = 0.1


def read_corpus(checkpoint: Checkpoint, options: DataOptions, names: tuple[str, ...]) -> Corpus:
    """The tokens of `names`, read as `options` say, by the checkpoint's tokenizer. Raises UserError where it has none."""
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{checkpoint.path} has no tokenizer.json, which reading text needs")
    eos = checkpoint.config.eos_token_ids
    return build_corpus(options, names, tokenizer, eos=eos[0] if eos else 0)


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
    """How many of `wanted` windows each text gives, of those it has: the shortest chooses first, the longer ones share the rest."""
    shares = [0] * len(available)
    for rank, text in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[text] = min(available[text], wanted // (len(available) - rank))
        wanted -= shares[text]
    return shares


def corpus_windows(checkpoint: Checkpoint, options: DataOptions, windows: int, length: int) -> Tensor:
    """Windows int64 [windows, length] of options.data. Raises UserError for text shorter than one window."""
    texts = [(name,) for name in options.data] if len(options.data) <= windows else [options.data]
    texts = [torch.from_numpy(np.asarray(read_corpus(checkpoint, options, text).tokens).astype(np.int64)) for text in texts]
    shares = equal_shares([len(tokens) // length for tokens in texts], windows)
    if not any(shares):
        return calibration_windows(torch.cat(texts), windows, length)
    return torch.cat([calibration_windows(tokens, share, length) for tokens, share in zip(texts, shares) if share])


def split_text(options: DataOptions, folder: Path) -> tuple[Path, Path]:
    """Write options.data into `folder` as two JSONL files: to learn from, and the last tenth of every file, to be judged on.

    The document at the border is cut between two words. The same files give the same split. Raises UserError for data that
    cannot be used, or too short to split.
    """
    sides = folder / "learn.jsonl", folder / "held-out.jsonl"
    with (new_file(sides[1]) as judged, new_file(sides[0]) as learned,            # the last to appear says that both are there
          open(learned, "w", encoding="utf-8") as learn, open(judged, "w", encoding="utf-8") as judge):
        for source in find_sources(options.data):
            characters = sum(map(len, read_documents(options, [source], Counter(), "measure")))
            left = round(characters * (1 - HELD_OUT))
            for text in read_documents(options, [source], Counter(), "split"):
                for file, part in zip((learn, judge), _cut(text, left)):
                    if part.strip():
                        file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
                left -= len(text)
        if not learn.tell() or not judge.tell():
            raise UserError(f"{options.data[0]}: too little text to hold a tenth of it out: give more, or --valid FILES")
    return sides


def _cut(text: str, length: int) -> tuple[str, str]:
    """`text` in two, before the last blank within its first `length` characters; a text without blanks right there."""
    if length >= len(text) or length <= 0:
        return (text, "") if length > 0 else ("", text)
    place = max(text.rfind("\n", 0, length), text.rfind(" ", 0, length))
    if place < 0:
        place = 0 if " " in text or "\n" in text else length
    return text[:place], text[place:]
