"""Have a teacher say what it expects at every token of a text, and keep it on disk.

    cache = build_cache(teacher_path, ids, folder, k=64)       # ids int64 [windows, tokens]

models/formats/teacher_cache.py has the format, and reads it. The folder's name is a hash of teacher, tokens, k and
precision, so equal input is read from the cache and changed input never is. An interrupted run goes on after the last
finished window.

In "bf16", chosen unasked on a GPU and on a CPU with AMX, layers compute in mixed precision and the head's products lose
bits that float32 keeps: half the time, and a KL divergence from the teacher in fp32 of 4e-4 nats a token (SmolLM2-135M), far
below what a student is ever near. A cache that something nearly lossless is judged against should be in "fp32".

A CPU takes a window at a time. A GPU takes as many together as its memory holds, of about BATCH tokens, chooses the likeliest
tokens there and sends home once a batch what the cache keeps of them. A teacher larger than the GPU sends its layers through it
once a batch (models/network/streamed.py), so a larger batch is what makes it fast; where memory was overestimated, half the
batch is tried.

    python -m compress.teacher CKPT --data FILES -o CACHE
    python -m compress.teacher CKPT --self 200 -o CACHE        # no text at hand: the teacher writes its own
    python -m compress.teacher CKPT --data FILES -o CACHE --ray local          # shared out over a Ray cluster (compress/cluster.py)
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from compress.cluster import Cluster, ClusterOptions, cluster, held
from models.data.corpus import DataOptions
from models.device import DeviceOptions, computing_on, free_bytes, prefers_bf16, smaller
from models.progress import progress
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import lock, read_json

EXAMPLES = """examples:
  python -m compress.teacher build/smollm2-135m --data corpus.txt --windows 400 -o build/teacher
  python -m compress.teacher build/smollm2-135m --self 64 -o build/teacher
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, DeviceOptions, ClusterOptions):
    """Keep what a teacher says about a text: top-k log-probabilities of every token."""

    checkpoint: Path = arg(positional=True, help="the teacher's checkpoint folder")
    data: tuple[str, ...] = arg((), help="files, folders or globs to read")
    self: int = arg(0, help="windows the teacher writes itself, where there is no --data", metavar="N", least=0)
    out: Path = arg(help="folder of caches; this one goes into a subfolder named by its contents", short="-o")
    windows: int = arg(400, help="windows of the text to use, spread evenly", least=1)
    length: int = arg(512, help="tokens in a window", least=1)
    top: int = arg(64, help="tokens whose log-probability is kept", least=1)
    precision: str = arg("auto", help="of its layers; auto: bf16 on a GPU or a CPU with AMX, else fp32", choices=("auto", "fp32", "bf16"))

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
from compress.drawing import drawn
from compress.layerwise import fast_matmul
from compress.text import corpus_windows
from models.checkpoint import CPU, SPARE, load_decoder, open_checkpoint
from models.network.cache import KVCache
from models.network.config import ModelConfig
from models.network.decoder import Decoder, tensor_shapes
from models.formats.teacher_cache import STATE, TeacherCache, array_types, is_cache, open_cache, tokenizer_digest, tokenizer_size, write_state
from models.training.memory import kept_numbers, memory_line

VERSION = 3                       # of the arrays and their state; part of the name
ROWS = 64                         # tokens whose logits are in memory at once on a CPU: memory that the allocator uses again
LOGITS = 1 << 30                  # bytes of logits and what is made of them at once, on a device
BATCH = 1 << 15                   # tokens asked about at once on a device: a layer computes on them as long as its weights travel
LEAST = math.log(1e-7)            # of the others' mass, which fp16 keeps as a logarithm
SHARED = 16                       # windows of a piece that a worker of a cluster does
WRITTEN, WRITTEN_ON_DEVICE = 16, 256                # windows written at once
_TYPES = {np.uint16: torch.uint16, np.int32: torch.int32, np.float16: torch.float16}


@dataclass(frozen=True)
class Question:
    """What is asked about every token: the k likeliest next ones among the first `vocabulary`; low: in bf16."""

    k: int
    vocabulary: int
    low: bool


def build_cache(teacher: Path, ids: Tensor, folder: Path, k: int = 64, precision: str = "auto",
                vocabulary: int | None = None, device: torch.device = CPU, shared: Cluster | None = None) -> TeacherCache:
    """The cache of a teacher's predictions for ids [windows, tokens] under `folder`, read where it is there already.

    vocabulary: predict among this many first tokens (by default all of the table). shared: a cluster that does the work, with the
    same result. Raises UserError for a k that the vocabulary has not.
    """
    if precision == "auto":
        precision = "bf16" if shared and shared.device == "cuda" or prefers_bf16(device) else "fp32"
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
            question = Question(k, vocabulary, precision == "bf16")
            _build(place, finished, {
                "windows": windows, "tokens": tokens, "k": k, "vocabulary": vocabulary, "teacher": teacher.name,
                "tokenizer": tokenizer_digest(teacher), "precision": precision},
                answers(teacher, ids[finished:], question, device) if shared is None else
                shared.share(partial(_answers_there, teacher.absolute(), question), ids[finished:].split(SHARED)))
    return open_cache(place)


def _build(place: Path, finished: int, state: dict, found: Iterator[dict[str, np.ndarray]]) -> None:
    """Write what is found, some windows at a time, from window `finished` on."""
    types = array_types(*(state[name] for name in ("windows", "tokens", "k", "vocabulary")))
    arrays = {name: np.memmap(place / f"{name}.bin", dtype, "r+" if (place / f"{name}.bin").exists() else "w+", shape=shape)
              for name, (dtype, shape) in types.items()}
    with progress(label="teacher", unit="window", initial=finished, total=state["windows"]) as bar:
        for part in found:
            stop = finished + len(part["ids"])
            for name, array in arrays.items():
                array[finished:stop] = part[name]
                array.flush()
            write_state(place, state | {"done": stop})
            bar.update(stop - finished)
            finished = stop


def answers(teacher: Path, ids: Tensor, question: Question, device: torch.device) -> Iterator[dict[str, np.ndarray]]:
    """The cache's arrays for ids [windows, tokens], some windows at a time. Raises UserError where a device has no room for one."""
    rows, spare = 1, SPARE
    if device.type != "cpu":
        rows, needed = batch(open_checkpoint(teacher).config, ids.shape, question, device, teacher)
        spare = needed["activations"] + needed["logits"]
        print(f"{rows} windows at once on {device}, with layers that come for their turn {memory_line(needed, device)}")
    decoder, start = frozen_decoder(teacher, question.low, device, spare), 0
    while start < len(ids):
        part, rows = smaller(min(rows, len(ids) - start), lambda count: ask(decoder, ids[start:start + count], question))
        yield part
        start += len(part["ids"])


def _answers_there(teacher: Path, question: Question, ids: Tensor, device: torch.device) -> dict[str, np.ndarray]:
    """The arrays for a few windows by a worker of a cluster, which holds the teacher from one piece to the next."""
    decoder, parts, start, rows = held(frozen_decoder, teacher, question.low, device), [], 0, 1 if device == CPU else len(ids)
    while start < len(ids):
        part, rows = smaller(min(rows, len(ids) - start), lambda count: ask(decoder, ids[start:start + count], question))
        parts.append(part)
        start += len(part["ids"])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batch(config: ModelConfig, shape: tuple[int, int], question: Question, device: torch.device, teacher: Path) -> tuple[int, dict[str, int]]:
    """How many of `shape` windows a device takes at once, and the bytes they need. Raises UserError where it has no room for one."""
    windows, tokens = shape
    free, rows = free_bytes(device), max(1, min(windows, BATCH // tokens))
    while free is not None and sum(asking_bytes(config, rows, tokens, question).values()) > free:
        if rows == 1:
            need = sum(asking_bytes(config, 1, tokens, question).values())
            raise UserError(f"{device} has {free / 1e9:.2f} GB free, and one window of {tokens} tokens with one layer of {teacher} takes "
                            f"{need / 1e9:.2f} GB: free memory there, choose a shorter --length, or --device cpu")
        rows //= 2
    return rows, asking_bytes(config, rows, tokens, question)


def asking_bytes(config: ModelConfig, rows: int, tokens: int, question: Question) -> dict[str, int]:
    """Bytes on a device by kind that it cannot do without: the token tables, one layer, and what is made of `rows` windows at a time."""
    shapes, layers = tensor_shapes(config), [0] * len(config.layers)
    tables = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("model.layers."))
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += math.prod(shape)
    width = 2 if question.low else 4
    made = 12 * config.hidden_size + width * max(kept_numbers(config, layer) for layer in config.layers)
    if config.per_layer_size:                                   # every layer's own inputs, made at once
        made += 12 * config.per_layer_size * len(config.layers)
    logits = min(LOGITS, 16 * rows * tokens * question.vocabulary)
    return {"tables": 4 * tables, "a layer": (4 + width) * max(layers), "activations": rows * tokens * made, "logits": logits}


def frozen_decoder(folder: Path, low: bool, device: torch.device = CPU, spare: int = SPARE) -> Decoder:
    """A model to ask and not to train; `low`: the linears of its layers in bfloat16, as mixed precision multiplies them.

    spare: bytes of the device to leave free; layers that leave less come for their turn (models/network/streamed.py)."""
    return load_decoder(folder, device=device, spare=spare, linears=torch.bfloat16 if low else None).requires_grad_(False)


@torch.no_grad()
def ask(decoder: Decoder, ids: Tensor, question: Question) -> dict[str, np.ndarray]:
    """The cache's arrays [n, tokens, ...] for ids [n, tokens], which the decoder's device reads together and sends home once."""
    low, device, k = question.low, decoder.model.embed_tokens.weight.device, question.k
    types = array_types(*ids.shape, k, question.vocabulary)
    with fast_matmul() if low else nullcontext():
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            hidden = decoder.model(ids.to(device)).flatten(0, 1)
        found = {name: torch.empty(math.prod(shape[:2]), *shape[2:], dtype=_TYPES[kind], device=device)
                 for name, (kind, shape) in types.items() if name != "ids"}
        for part in chunks(len(hidden), ROWS if device.type == "cpu" else max(ROWS, LOGITS // (16 * question.vocabulary))):
            logits = decoder.head(hidden[part])[..., :question.vocabulary]
            index = logits.topk(k).indices
            events = top_events(logits, index)
            found["indices"][part] = index.to(found["indices"].dtype)
            found["log_probabilities"][part] = events[:, :-1].half()
            found["others"][part] = events[:, -1].clamp_min(LEAST).half()
    return {"ids": ids.numpy()} | {name: tensor.cpu().numpy().reshape(types[name][1]) for name, tensor in found.items()}


@torch.no_grad()
def write(decoder: Decoder, prompts: Tensor, tokens: int, generator: torch.Generator, vocabulary: int | None = None) -> Tensor:
    """int64 [b, tokens] that the model continues prompts [b, s] with, drawn at temperature 1 among the first `vocabulary`.

    generator: of any device."""
    return _written(decoder, prompts, torch.rand(len(prompts), tokens, generator=generator, device=generator.device), vocabulary)


@torch.no_grad()
def _written(decoder: Decoder, prompts: Tensor, chance: Tensor, vocabulary: int | None) -> Tensor:
    """`write`, with numbers [b, tokens] from 0 to 1 that decide where in the cumulative distribution a token is drawn."""
    device, (rows, tokens) = prompts.device, chance.shape
    cache, chance = KVCache(decoder.config, rows, prompts.shape[1] + tokens, device=device), chance.to(device)
    ids, written = prompts, [prompts[:, :0]]
    for number in range(tokens):
        last = torch.full((rows, 1), ids.shape[1] - 1, device=device)
        logits = decoder(ids, cache=cache, logits_positions=last)[:, 0, :vocabulary]
        cache.lengths += ids.shape[1]
        ids = drawn(torch.softmax(logits, -1), chance[:, number, None])
        written.append(ids)
    return torch.cat(written, 1)


def write_own_text(decoder: Decoder, windows: int, tokens: int, vocabulary: int, seed: int = 0, batch: int | None = None) -> Tensor:
    """Token ids [windows, tokens] below `vocabulary` that the model writes, each window after a random first token.

    batch: windows written together, which do not depend on it (None: 16 on a CPU; elsewhere more, since a step costs what its kernels
    cost to begin)."""
    generator, device, parts = torch.Generator().manual_seed(seed), decoder.model.embed_tokens.weight.device, []
    first = torch.randint(0, vocabulary, (windows, 1), generator=generator)
    chance = torch.rand(windows, tokens - 1, generator=generator)
    rows, start = min(windows, batch or (WRITTEN if device.type == "cpu" else WRITTEN_ON_DEVICE)), 0
    with fast_matmul(), progress(label="writing", unit="window", total=windows) as bar:
        while start < windows:
            def more(count: int) -> Tensor:
                here = slice(start, start + count)
                return _written(decoder, first[here].to(device), chance[here], vocabulary).cpu()
            part, rows = smaller(min(rows, windows - start), more)
            parts.append(part)
            start += len(part)
            bar.update(len(part))
    return torch.cat((first, torch.cat(parts)), 1)


def build(options: Options) -> None:
    checkpoint = open_checkpoint(options.checkpoint)
    config = checkpoint.config
    vocabulary = min(tokenizer_size(options.checkpoint), config.vocab_size)     # any model of this tokenizer can be held against it
    with cluster(options.ray, options.device) as shared, computing_on("cpu" if shared and not options.self else options.device) as device:
        if options.self:
            length = min(options.length, config.context_length)
            ids = write_own_text(load_decoder(options.checkpoint, device=device), options.self, length, vocabulary)
        else:
            ids = corpus_windows(checkpoint, options, options.windows, options.length)
        cache = build_cache(options.checkpoint, ids, options.out, options.top, options.precision, vocabulary, device, shared)
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    print(f"{ids.numel()} tokens, {size / ids.numel():.0f} bytes each: {cache.folder}")
