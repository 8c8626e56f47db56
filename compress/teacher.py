"""Have a teacher say what it expects at every token of a text, and keep it on disk.

    cache = build_cache(teacher_path, ids, folder, k=64)       # ids int64 [windows, tokens]

models/teacher_cache.py has the format, and reads it. The folder's name is a hash of teacher, tokens and k, so equal
input is read from the cache and changed input never is. An interrupted run goes on after the last finished window.

    python -m compress.teacher CKPT --data FILES -o CACHE
    python -m compress.teacher CKPT --self 200 -o CACHE        # no text at hand: the teacher writes its own
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from compress.calibration_text import corpus_windows
from compress.layerwise import fast_matmul
from models.checkpoint import load_decoder, open_checkpoint
from models.data import DataOptions
from models.decoder import Decoder, KVCache
from models.teacher_cache import STATE, TeacherCache, array_types, is_cache, open_cache, tokenizer_digest, write_state
from runtime.cli import arg, run
from runtime.errors import UserError

VERSION = 2                       # of the arrays and their state; part of the name
ROWS = 256                        # tokens whose logits are in memory at once
EXAMPLES = """examples:
  python -m compress.teacher build/smollm2-135m --data corpus.txt --windows 400 -o build/teacher
  python -m compress.teacher build/smollm2-135m --self 64 -o build/teacher
"""


def build_cache(teacher: Path, ids: Tensor, folder: Path, k: int = 64) -> TeacherCache:
    """The cache of a teacher's predictions for ids [windows, tokens] under `folder`, read where it is there already."""
    checkpoint = open_checkpoint(teacher)
    vocabulary = checkpoint.config.vocab_size
    if not 1 <= k < vocabulary:
        raise UserError(f"top-k is {k}, which should be from 1 to one less than the {vocabulary} tokens of the vocabulary")
    windows, tokens = ids.shape
    key = hashlib.sha256(f"{VERSION} {checkpoint.sha256()} {k} {windows} {tokens}".encode())
    key.update(ids.numpy().tobytes())
    place = folder / key.hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    finished = json.loads((place / STATE).read_text())["done"] if is_cache(place) else 0
    if finished < windows:
        _build(teacher, place, ids, finished, {
            "windows": windows, "tokens": tokens, "k": k, "vocabulary": vocabulary, "teacher": teacher.name,
            "tokenizer": tokenizer_digest(teacher)})
    return open_cache(place)


def _build(teacher: Path, place: Path, ids: Tensor, finished: int, state: dict) -> None:
    types = array_types(*(state[name] for name in ("windows", "tokens", "k", "vocabulary")))
    arrays = {name: np.memmap(place / f"{name}.bin", dtype, "r+" if (place / f"{name}.bin").exists() else "w+", shape=shape)
              for name, (dtype, shape) in types.items()}
    decoder = load_decoder(teacher).requires_grad_(False)
    for window in tqdm(range(finished, len(ids)), desc="teacher", unit="window", initial=finished, total=len(ids),
                       file=sys.stderr):
        _fill(decoder, ids[window], state["k"], {name: array[window] for name, array in arrays.items()})
        for array in arrays.values():
            array.flush()
        write_state(place, state | {"done": window + 1})


@torch.no_grad()
def _fill(decoder: Decoder, ids: Tensor, k: int, rows: dict[str, np.ndarray]) -> None:
    rows["ids"][:] = ids.numpy()
    hidden = decoder.model(ids[None])[0]
    for start in range(0, len(ids), ROWS):
        part = slice(start, start + ROWS)
        log_probabilities = torch.log_softmax(decoder.head(hidden[part]), -1)
        top, index = log_probabilities.topk(k)
        mass = log_probabilities.exp().scatter_(1, index, 0).sum(-1)              # summed, not 1 - sum: it may be tiny
        rows["indices"][part] = index.numpy()
        rows["log_probabilities"][part] = top.numpy()
        rows["others"][part] = mass.clamp_min(1e-7).log().numpy()


@torch.no_grad()
def write_own_text(decoder: Decoder, windows: int, tokens: int, seed: int = 0, batch: int = 16) -> Tensor:
    """Token ids [windows, tokens] drawn from the model itself, temperature 1, each after a random first token."""
    generator = torch.Generator().manual_seed(seed)
    config, rows = decoder.config, []
    with fast_matmul():
        for start in tqdm(range(0, windows, batch), desc="writing", unit="batch", file=sys.stderr):
            count = min(batch, windows - start)
            ids = torch.randint(0, config.vocab_size, (count, 1), generator=generator)
            cache = KVCache(config, count, tokens)
            for _ in range(tokens - 1):
                logits = decoder(ids[:, -1:], cache=cache)[:, -1]
                cache.lengths += 1
                ids = torch.cat((ids, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)), 1)
            rows.append(ids)
    return torch.cat(rows)


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Keep what a teacher says about a text: top-k log-probabilities of every token."""

    checkpoint: Path = arg(positional=True, help="the teacher's checkpoint folder")
    data: tuple[str, ...] = arg((), help="files, folders or globs to read")
    self: int = arg(0, help="windows the teacher writes itself, where there is no --data", metavar="N")
    out: Path = arg(help="folder of caches; this one goes into a subfolder named by its contents", short="-o")
    windows: int = arg(400, help="windows of the text to use, spread evenly")
    length: int = arg(512, help="tokens in a window")
    top: int = arg(64, help="tokens whose log-probability is kept")


def build(options: Options) -> None:
    if bool(options.data) == bool(options.self):
        raise UserError("give either --data FILES or --self N")
    if options.self:
        length = min(options.length, open_checkpoint(options.checkpoint).config.context_length)
        ids = write_own_text(load_decoder(options.checkpoint), options.self, length)
    else:
        ids = corpus_windows(open_checkpoint(options.checkpoint), options, options.windows, options.length)
    cache = build_cache(options.checkpoint, ids, options.out, options.top)
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    print(f"{ids.numel()} tokens, {size / ids.numel():.0f} bytes each: {cache.folder}")


def main(argv=None) -> int:
    return run(Options, build, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
