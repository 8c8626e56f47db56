"""What a teacher says about a text: the top-k log-probabilities of every token, cached on disk.

    cache = build_cache(teacher_path, ids, k=64)               # ids int64 [windows, tokens]
    kl = cache.divergence(window, logits)                      # KL(teacher || student) per token, nats

For each token the cache holds the k most likely next tokens, their log-probabilities (fp16) and the log of the mass of
all others (fp16): (2 or 4 + 2) k + 2 bytes a token, 258 for k = 64 and vocabularies up to 65,536. The divergence counts
the others as one event, which makes it a lower bound of the full KL divergence, below it by the disagreement within the
others' mass. It feeds distillation, recovery after quantization and pruning, and evaluation.

The folder's name is a hash of teacher, tokens and k, so equal input is read from the cache and changed input never is.
Arrays are memory-mapped; `done` counts finished windows, so an interrupted run goes on where it stopped.

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
from runtime.cli import arg, run
from runtime.errors import UserError

VERSION = 1
ROWS = 256                        # tokens whose logits are in memory at once
EXAMPLES = """examples:
  python -m compress.teacher build/smollm2-135m --data corpus.txt --windows 400 -o build/teacher
  python -m compress.teacher build/smollm2-135m --self 64 -o build/teacher
"""


@dataclass(frozen=True)
class TeacherCache:
    """Arrays over windows w, tokens t: ids [w, t]; indices [w, t, k]; log_probabilities [w, t, k]; others [w, t]."""

    folder: Path
    ids: np.ndarray
    indices: np.ndarray
    log_probabilities: np.ndarray
    others: np.ndarray

    def divergence(self, window: int, logits: Tensor, tokens: slice = slice(None)) -> Tensor:
        """KL(teacher || student) in nats of each token, [t], for a student's logits [t, vocab] at window[tokens]."""
        index = torch.from_numpy(self.indices[window, tokens].astype(np.int64))
        teacher = torch.from_numpy(self.log_probabilities[window, tokens].astype(np.float32))
        rest = torch.from_numpy(self.others[window, tokens].astype(np.float32))
        if index.max() >= logits.shape[-1]:
            raise UserError(f"the teacher's vocabulary is larger than the student's {logits.shape[-1]} tokens: both must share one tokenizer")
        student = torch.log_softmax(logits.float(), -1).gather(-1, index)
        student_rest = torch.log1p(-student.exp().sum(-1).clamp(max=1 - 1e-6))
        return (teacher.exp() * (teacher - student)).sum(-1) + rest.exp() * (rest - student_rest)


def build_cache(teacher: Path, ids: Tensor, folder: Path, k: int = 64, done: int | None = None) -> TeacherCache:
    """The cache of a teacher's predictions for ids [windows, tokens] under `folder`, read where it is there already.

    Raises UserError where the cache in the way is of another version. `done` stops after so many windows (for tests).
    """
    checkpoint = open_checkpoint(teacher)
    vocabulary = checkpoint.config.vocab_size
    if not 1 <= k < vocabulary:
        raise UserError(f"top-k is {k}, which should be from 1 to one less than the {vocabulary} tokens of the vocabulary")
    windows, tokens = ids.shape
    key = hashlib.sha256(f"{VERSION} {checkpoint.sha256()} {k} {windows} {tokens}".encode())
    key.update(ids.numpy().tobytes())
    place = folder / key.hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    arrays = {"ids": (np.int32, (windows, tokens)), "others": (np.float16, (windows, tokens)),
              "indices": (np.uint16 if vocabulary <= 1 << 16 else np.int32, (windows, tokens, k)),
              "log_probabilities": (np.float16, (windows, tokens, k))}
    opened = {name: np.memmap(place / f"{name}.bin", dtype, "r+" if (place / f"{name}.bin").exists() else "w+", shape=shape)
              for name, (dtype, shape) in arrays.items()}
    state = place / "state.json"
    finished = json.loads(state.read_text())["done"] if state.exists() else 0
    if finished < windows:
        decoder = load_decoder(teacher).requires_grad_(False)
        for window in tqdm(range(finished, windows if done is None else done), desc="teacher", unit="window", initial=finished,
                           total=windows, file=sys.stderr):
            _fill(decoder, ids[window], k, {name: array[window] for name, array in opened.items()})
            for array in opened.values():
                array.flush()
            state.write_text(json.dumps({"version": VERSION, "done": window + 1, "k": k, "teacher": str(teacher)}))
    return TeacherCache(place, **{name: np.memmap(place / f"{name}.bin", dtype, "r", shape=shape)
                                  for name, (dtype, shape) in arrays.items()})


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
