"""Have a teacher say what it expects at every token of a text, and keep it on disk.

    cache = build_cache(teacher_path, ids, folder, k=64)       # ids int64 [windows, tokens]

models/formats/teacher_cache.py has the format, and reads it. The folder's name is a hash of teacher, tokens, k and
precision, so equal input is read from the cache and changed input never is. An interrupted run goes on after the last
finished window.

In "bf16", chosen unasked on a CPU with AMX, layers compute in mixed precision and the head's products lose bits that
float32 keeps: half the time, and a KL divergence from the teacher in fp32 of 4e-4 nats a token (SmolLM2-135M), far below
what a student is ever near. A cache that something nearly lossless is judged against should be in "fp32".

    python -m compress.teacher CKPT --data FILES -o CACHE
    python -m compress.teacher CKPT --self 200 -o CACHE        # no text at hand: the teacher writes its own
"""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.data.corpus import DataOptions
from models.progress import progress
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import lock, read_json

EXAMPLES = """examples:
  python -m compress.teacher build/smollm2-135m --data corpus.txt --windows 400 -o build/teacher
  python -m compress.teacher build/smollm2-135m --self 64 -o build/teacher
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Keep what a teacher says about a text: top-k log-probabilities of every token."""

    checkpoint: Path = arg(positional=True, help="the teacher's checkpoint folder")
    data: tuple[str, ...] = arg((), help="files, folders or globs to read")
    self: int = arg(0, help="windows the teacher writes itself, where there is no --data", metavar="N", least=0)
    out: Path = arg(help="folder of caches; this one goes into a subfolder named by its contents", short="-o")
    windows: int = arg(400, help="windows of the text to use, spread evenly", least=1)
    length: int = arg(512, help="tokens in a window", least=1)
    top: int = arg(64, help="tokens whose log-probability is kept", least=1)
    precision: str = arg("auto", help="of its layers; auto: bf16 on a CPU with AMX, else fp32", choices=("auto", "fp32", "bf16"))

    def __post_init__(self):
        super().__post_init__()
        if bool(self.data) == bool(self.self):
            raise UserError("give either --data FILES or --self N")


def main(argv=None) -> int:
    return run(Options, "build", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
from torch import Tensor

from compress.distilling.chunked_loss import chunks, top_events
from compress.layerwise import fast_matmul, has_tiles
from compress.text import corpus_windows
from models.checkpoint import load_decoder, open_checkpoint
from models.network.cache import KVCache
from models.network.decoder import Decoder
from models.formats.teacher_cache import STATE, TeacherCache, array_types, is_cache, open_cache, tokenizer_digest, tokenizer_size, write_state

VERSION = 3                       # of the arrays and their state; part of the name
ROWS = 64                         # tokens whose logits are in memory at once: memory that the allocator uses again
LEAST = math.log(1e-7)            # of the others' mass, which fp16 keeps as a logarithm


def build_cache(teacher: Path, ids: Tensor, folder: Path, k: int = 64, precision: str = "auto",
                vocabulary: int | None = None) -> TeacherCache:
    """The cache of a teacher's predictions for ids [windows, tokens] under `folder`, read where it is there already.

    vocabulary: predict among this many first tokens (by default all of the table). Raises UserError for a k that the
    vocabulary has not.
    """
    if precision == "auto":
        precision = "bf16" if has_tiles() else "fp32"
    checkpoint = open_checkpoint(teacher)
    table = checkpoint.config.vocab_size
    vocabulary = table if vocabulary is None else vocabulary
    if not 1 <= k < vocabulary:
        raise UserError(f"top-k is {k}, which should be from 1 to one less than the {vocabulary} tokens of the vocabulary")
    windows, tokens = ids.shape
    key = hashlib.sha256(f"{VERSION} {checkpoint.sha256()} {k} {windows} {tokens} {precision}".encode())
    key.update(ids.numpy().tobytes() + (f" {vocabulary}".encode() if vocabulary < table else b""))
    place = folder / key.hexdigest()[:16]
    with lock(place, wait=True):                # two stages may want the same predictions at once
        place.mkdir(parents=True, exist_ok=True)
        finished = read_json(place / STATE)["done"] if is_cache(place) else 0
        if finished < windows:
            _build(teacher, place, ids, finished, {
                "windows": windows, "tokens": tokens, "k": k, "vocabulary": vocabulary, "teacher": teacher.name,
                "tokenizer": tokenizer_digest(teacher), "precision": precision})
    return open_cache(place)


def _build(teacher: Path, place: Path, ids: Tensor, finished: int, state: dict) -> None:
    types = array_types(*(state[name] for name in ("windows", "tokens", "k", "vocabulary")))
    arrays = {name: np.memmap(place / f"{name}.bin", dtype, "r+" if (place / f"{name}.bin").exists() else "w+", shape=shape)
              for name, (dtype, shape) in types.items()}
    low = state["precision"] == "bf16"
    decoder = frozen_decoder(teacher, low)
    with fast_matmul() if low else nullcontext():
        for window in progress(range(finished, len(ids)), label="teacher", unit="window", initial=finished, total=len(ids)):
            with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
                hidden = decoder.model(ids[window][None])[0]
            _fill(decoder, ids[window], hidden, state["k"], state["vocabulary"], {name: array[window] for name, array in arrays.items()})
            for array in arrays.values():
                array.flush()
            write_state(place, state | {"done": window + 1})


def frozen_decoder(folder: Path, low: bool) -> Decoder:
    """A model to ask and not to train; `low`: the linears of its layers in bfloat16, as mixed precision multiplies them."""
    decoder = load_decoder(folder).requires_grad_(False)
    for module in decoder.model.layers.modules() if low else ():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    return decoder


@torch.no_grad()
def _fill(decoder: Decoder, ids: Tensor, hidden: Tensor, k: int, vocabulary: int, rows: dict[str, np.ndarray]) -> None:
    rows["ids"][:] = ids.numpy()
    for part in chunks(len(ids), ROWS):
        logits = decoder.head(hidden[part])[..., :vocabulary]
        index = logits.topk(k).indices
        events = top_events(logits, index)
        rows["indices"][part] = index.numpy()
        rows["log_probabilities"][part] = events[:, :-1].numpy()
        rows["others"][part] = events[:, -1].clamp_min(LEAST).numpy()


@torch.no_grad()
def write(decoder: Decoder, prompts: Tensor, tokens: int, generator: torch.Generator, vocabulary: int | None = None) -> Tensor:
    """int64 [b, tokens] that the model continues prompts [b, s] with, drawn at temperature 1 among the first `vocabulary`."""
    cache = KVCache(decoder.config, len(prompts), prompts.shape[1] + tokens, device=prompts.device)
    ids, written = prompts, []
    for _ in range(tokens):
        last = torch.full((len(prompts), 1), ids.shape[1] - 1, device=ids.device)
        probabilities = torch.softmax(decoder(ids, cache=cache, logits_positions=last)[:, 0, :vocabulary], -1)
        cache.lengths += ids.shape[1]
        ids = torch.multinomial(probabilities, 1, generator=generator)
        written.append(ids)
    return torch.cat(written, 1)


def write_own_text(decoder: Decoder, windows: int, tokens: int, vocabulary: int, seed: int = 0, batch: int = 16) -> Tensor:
    """Token ids [windows, tokens] below `vocabulary` that the model writes, each window after a random first token."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, vocabulary, (windows, 1), generator=generator)
    with fast_matmul():
        return torch.cat([torch.cat((prompts, write(decoder, prompts, tokens - 1, generator, vocabulary)), 1)
                          for prompts in progress(first.split(batch), label="writing", unit="batch")])


def build(options: Options) -> None:
    config = open_checkpoint(options.checkpoint).config
    vocabulary = min(tokenizer_size(options.checkpoint), config.vocab_size)     # any model of this tokenizer can be held against it
    if options.self:
        length = min(options.length, config.context_length)
        ids = write_own_text(load_decoder(options.checkpoint), options.self, length, vocabulary)
    else:
        ids = corpus_windows(open_checkpoint(options.checkpoint), options, options.windows, options.length)
    cache = build_cache(options.checkpoint, ids, options.out, options.top, options.precision, vocabulary)
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    print(f"{ids.numel()} tokens, {size / ids.numel():.0f} bytes each: {cache.folder}")
