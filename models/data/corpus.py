"""From data files to blocks of token ids, streamed once and then memory-mapped.

    corpus = build_corpus(options, options.data, "checkpoint/tokenizer.json", eos=2)
    blocks = Blocks(corpus, context=512)
    input_ids, labels = blocks.rows(batch_indices(len(blocks), batch=8, seed=0, step=17))   # int64 [8, 512] each

`build_corpus` reads documents (records.py), cleans them (cleaning.py), tokenizes them on all cores, ends each with the EOS
token (of a task's examples prompt and answer) and writes one flat file of ids (uint16 or uint32) and one of document starts: memory-mapped, so that a corpus larger
than memory trains. The folder's name is a hash of the files' contents, the tokenizer and every option that matters, so equal
input is read from the cache and changed input never is. No BOS token is added.

`Blocks(boundaries="eos")` cuts the stream every `context` tokens; a document's first token is never a label, because nothing
before it belongs to it. With "block" every document starts a block of its own, so that no token attends to another document,
at the price of padding. The order of blocks is a function of (seed, step) alone: resuming needs no state, and every process of
a distributed run computes the same global batch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from models.data.cleaning import LANGUAGES, STEPS, clean
from models.data.records import as_text, find_sources, lot, read_records, source_digest
from models.data.tables import HEADERS
from models.progress import progress
from models.tasks.defaults import DECODER_TASKS
from runtime.cli import Checked, arg
from runtime.errors import UserError
from runtime.files import lock, new_folder, read_json, restored
from runtime.task import FILE
from runtime.text import Tokenizer

IGNORE = -100                    # a label without loss, as in torch.nn.functional.cross_entropy
CACHE_VERSION = 2
BATCH_DOCUMENTS, BATCH_CHARS = 1024, 8 << 20       # tokenized at once, over all cores


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """Which documents to read, and how to clean them."""
    data: tuple[str, ...] = arg(help="files, folders, globs or hf:NAME@SPLIT to learn from")
    format: str | None = arg(None, help="format of every file, in place of its ending",
                             choices=("text", "jsonl", "json", "tsv", "csv", "conll"), group="reading text")
    documents: str = arg("file", help="what a document of plain text is", choices=("file", "line", "paragraph"),
                         group="reading text")
    field: str | None = arg(None, help="JSON key or column that holds the text", group="reading text")
    task: str | None = arg(None, help="read records as this task asks and answers them (the model's own, where it was trained on that one)",
                           choices=DECODER_TASKS, group="reading text")
    header: str = arg("auto", help="whether the first row of CSV and TSV files names the columns", choices=HEADERS,
                      group="reading text")
    normalize: bool = arg(False, help="Unicode NFC, one kind of line end, no control characters", group="reading text")
    deduplicate: bool = arg(False, help="drop exact repetitions of a document", group="reading text")
    min_chars: int = arg(0, help="drop documents shorter than this", least=0, group="reading text")
    max_chars: int | None = arg(None, help="drop documents longer than this", least=1, group="reading text")
    languages: tuple[str, ...] = arg((), help="keep only documents that look like these languages (en zh ...)",
                                     group="reading text")
    cache: Path = arg(Path("~/.cache/edgewright/data"), help="where tokenized data is kept", group="reading text")

    def __post_init__(self):
        super().__post_init__()
        if unknown := [language for language in self.languages if language not in LANGUAGES]:
            raise UserError(f"--languages {unknown[0]}: unknown; choose from {', '.join(LANGUAGES)}")


@dataclass(frozen=True)
class Split:
    """One side of a deterministic split: a document is held out when the hash of its text and the seed says so."""
    part: str                    # "train" or "valid"
    fraction: float              # of documents in "valid"
    seed: int

    def has(self, text: str) -> bool:
        return (lot(text, self.seed) < self.fraction) == (self.part == "valid")


def read_documents(options: DataOptions, sources: list[str], counts: Counter, description: str) -> Iterator[str]:
    """The cleaned documents of `sources`, with a progress bar in bytes; `counts` says how many were kept or dropped."""
    if options.task:
        raise UserError(f"--task {options.task}: here texts are read, not the examples of a task: leave it out (or, where a text is to be "
                        "split, name what is held out with --valid)")
    sizes = [None if s.startswith("hf:") else os.path.getsize(s) for s in sources]
    total = None if None in sizes else sum(sizes)
    with progress(label=description, unit="B", total=total, unit_scale=True) as bar:
        def texts():
            for record in read_records(sources, options.format, options.documents, options.header, (options.field,)):
                text = as_text(record, options.field)
                bar.update(len(text.encode("utf-8", "surrogatepass")))
                yield text
                bar.set_postfix(counts, refresh=False)
        yield from clean(texts(), options, counts)


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, mapped from disk."""
    path: Path
    tokens: np.ndarray           # uint16 or uint32 [tokens]: every document followed by EOS
    starts: np.ndarray           # int64 [documents]: index of each document's first token
    text_bytes: int              # UTF-8 bytes of the documents
    eos: int

    @property
    def digest(self) -> str:
        return self.path.name


def build_corpus(options: DataOptions, names: tuple[str, ...], tokenizer_file: str | Path, eos: int,
                 split: Split | None = None) -> Corpus:
    """Tokenize the documents of `names` into the cache, or open what is there.

    Raises UserError for data that cannot be used (see records.py), and where cleaning or the split leaves nothing.
    """
    sources = find_sources(names)
    tokenizer, own = Tokenizer(tokenizer_file), Path(tokenizer_file).parent / FILE
    key = {"version": CACHE_VERSION, "sources": [source_digest(s) for s in sources],
           "tokenizer": source_digest(str(tokenizer_file)), "eos": eos, "split": split and asdict(split),
           "format": options.format, "documents": options.documents, "field": options.field, "header": options.header,
           **({"task": [options.task, source_digest(str(own)) if own.is_file() else None, *_template(tokenizer_file)]} if options.task else {}),
           "cleaning": {step: getattr(options, step) for step in STEPS}}
    folder = options.cache.expanduser() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if not restored(folder).is_dir():
        with lock(folder, wait=True):
            if not folder.is_dir():          # another process may have finished it meanwhile
                with new_folder(folder) as temporary:
                    _write_corpus(temporary, options, sources, tokenizer, eos, split, key, Path(tokenizer_file).parent)
    meta = read_json(folder / "corpus.json")
    return Corpus(folder, np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
                  np.memmap(folder / "starts.bin", dtype=np.int64, mode="r"), meta["text_bytes"], meta["eos"])


def _template(tokenizer_file) -> tuple[str, ...]:
    """Digest of the chat template beside a tokenizer."""
    from models.formats.chat import template_source
    return (hashlib.sha256((template_source(Path(tokenizer_file).parent) or "").encode()).hexdigest(),)


def _write_corpus(folder, options, sources, tokenizer, eos, split, key, model):
    dtype = np.uint16 if max(len(tokenizer) - 1, eos) < 1 << 16 else np.uint32
    counts, starts, length, text_bytes = Counter(), [], 0, 0
    read = _asked(options, sources, split, tokenizer, model, counts) if options.task else _read(options, sources, split, tokenizer, counts)
    with open(folder / "tokens.bin", "wb") as file:
        for found, size in read:
            ids = np.append(found, eos).astype(dtype)
            starts.append(length)
            length += len(ids)
            text_bytes += size
            ids.tofile(file)
    if not starts:
        side = f"the {split.part} side of the split is empty (give --valid, or --documents line); " if split else ""
        judged = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        raise UserError(f"{sources[0]}: no document is left to learn from; {side}cleaning found {judged}")
    np.array(starts, dtype=np.int64).tofile(folder / "starts.bin")
    meta = {"dtype": np.dtype(dtype).name, "text_bytes": text_bytes, "eos": eos, "counts": counts, "key": key}
    (folder / "corpus.json").write_text(json.dumps(meta, indent=1))


def _read(options, sources, split, tokenizer, counts) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids and UTF-8 bytes of every document."""
    documents = read_documents(options, sources, counts, f"tokenize {split.part if split else 'data'}")
    for batch in _batches(filter(split.has, documents) if split else documents):
        for text, found in zip(batch, tokenizer.encode_batch(batch)):
            yield found, len(text.encode("utf-8", "surrogatepass"))


def _asked(options, sources, split, tokenizer, model, counts) -> Iterator[tuple[np.ndarray, int]]:
    """The same of every example of the task: its prompt and its answer, as the model is asked."""
    for ids, _ in task_rows(options, sources, tokenizer, model, split):
        counts["kept"] += 1
        yield ids, len(tokenizer.decode(ids).encode("utf-8", "surrogatepass"))


def task_rows(options: DataOptions, sources: list[str], tokenizer: Tokenizer, model: Path, split: Split | None = None,
              end: int | None = None) -> list:
    """(ids, learned) of the examples of options.task (models/tasks/learning.py), as the checkpoint in `model` is asked. end: token that is
    learned behind a text. Raises UserError."""
    from models.formats.chat import chat_encoder
    from models.tasks import TaskOptions, open_task, read_examples
    from models.tasks.learning import encode
    examples = read_examples(options.task, sources, format=options.format, header=options.header, field=options.field)
    task = open_task(options.task, TaskOptions(), examples, model)
    chat = chat_encoder(model, tokenizer) if task.chat else None
    return [row for example in examples if not split or split.has(str(example.fields)) for row in encode(task, example, tokenizer, chat, end)]


def _batches(documents):
    """Lists of documents, bounded in number and in characters."""
    batch, chars = [], 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Blocks:
    """A corpus cut into blocks of `context` inputs and as many labels; see the module for `boundaries`."""

    lengths = None               # all rows are alike

    def __init__(self, corpus: Corpus, context: int, boundaries: str = "eos"):
        self.corpus, self.context = corpus, context
        stops = np.append(corpus.starts[1:], len(corpus.tokens))
        spans = [(0, len(corpus.tokens))] if boundaries == "eos" else zip(corpus.starts.tolist(), stops.tolist())
        pieces = [(np.arange(start, stop - 1, context), stop) for start, stop in spans]
        self.first = np.concatenate([firsts for firsts, _ in pieces])
        self.stop = np.concatenate([np.minimum(firsts + context + 1, stop) for firsts, stop in pieces])
        if not len(self.first):
            raise UserError(f"{corpus.path}: the data holds fewer than two tokens; give more text")

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks `indices` as (input_ids, labels), int64 [len(indices), context]; labels without loss are IGNORE."""
        input_ids = np.full((len(indices), self.context), self.corpus.eos, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for row, index in enumerate(indices):
            first, stop = self.first[index], self.stop[index]
            block = self.corpus.tokens[first:stop].astype(np.int64)
            input_ids[row, :len(block) - 1] = block[:-1]
            labels[row, :len(block) - 1] = block[1:]
            low, high = np.searchsorted(self.corpus.starts, (first + 1, stop))
            labels[row, self.corpus.starts[low:high] - first - 1] = IGNORE
        return input_ids, labels


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices below `count` of the global batch of `step`: every epoch visits each once, in an order of its own."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_order(count, seed, int(place // count))[place % count] for place in places])
