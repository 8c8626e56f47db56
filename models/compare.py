"""The classic language models and a transformer on equal text with an equal budget: `python -m models.compare`.

    python -m models.compare --data wiki.txt -o build/compared

Counts n-grams, and trains a GRU, an LSTM and a transformer of --preset parameters with the same batches, as `models.train` does, on
the documents that its split by seed leaves; then judges each on those that are held out, in windows of --context tokens of which the
second half is scored (models/judging/fidelity.py), and measures how fast one reply is written. The networks are judged and measured
as bundles, by the engine that runs them here; the n-grams in Python. What is trained is kept in --out, and a run that was interrupted
goes on there.

The n-grams read the training text once, whole: what a network learns from is --steps x --batch x --context tokens of it.
"""

import dataclasses
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from models.data.corpus import Corpus, DataOptions, Split, build_corpus
from models.formats import lineage
from models.formats.chat import tokenizer_facts, tokenizer_file
from runtime.cli import arg, run, table
from runtime.errors import CheckFailed, UserError
from runtime.files import new_folder, read_json, write

NETWORKS = {"gru": "GRU", "lstm": "LSTM", "decoder": "transformer"}
NAMES = {"ngram": "n-grams"} | NETWORKS
KEPT = {"tokenizer", "comparison.json", "comparison.html", *NAMES}
PROMPT, NEW, ROUNDS = 32, 64, 3                          # tokens of the replies that are timed, and how often each is written


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Train n-grams, a GRU, an LSTM and a transformer on equal text, and show them side by side."""
    out: Path = arg(short="-o", help="folder for the models, comparison.json and comparison.html")
    documents: str = arg("line", help="what a document of plain text is", choices=("file", "line", "paragraph"), group="reading text")
    tokenizer: Path | None = arg(None, help="tokenizer folder, or a checkpoint (default: one is trained on the text)")
    vocab_size: int = arg(4096, help="tokens of the tokenizer that is trained", least=300)
    models: tuple[str, ...] = arg(tuple(NAMES), help=f"which: {', '.join(NAMES)}")
    preset: str = arg("2m", help="parameters of a network")
    order: int = arg(4, help="tokens of the longest n-gram", least=1)
    steps: int = arg(120, help="updates of a network", least=1)
    batch: int = arg(16, help="blocks that one update learns from", least=1)
    context: int = arg(256, help="tokens of a block and of a window", least=4)
    learning_rate: float | None = arg(None, help="peak learning rate (default: the preset's)", above=0)
    valid_share: float = arg(0.02, help="share of documents that is held out", above=0, below=1)
    windows: int = arg(100, help="windows of held-out text, at most", least=1)
    seed: int = arg(0, help="of the split, the first weights and the order of the text", least=0, most=2**63 - 1)
    threads: int | None = arg(None, help="CPU threads (default: those available)", least=1)

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.models if name not in NAMES]:
            raise UserError(f"--models {unknown[0]}: choose from {', '.join(NAMES)}")


def main(argv=None) -> int:
    return run(Options, "compare", argv)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

from models.evaluate import write_json
from models.judging.fidelity import Window, measure
from models.judging.language_model import LanguageModel, open_model
from models.judging.page import Section, document
from models.ngram import count_ngrams, write_ngram
from models.train import TrainOptions, train


def compare(options: Options) -> None:
    """Raises UserError for input that cannot be used, and where --out holds something else, or models of other options."""
    if options.out.exists() and (strangers := sorted({file.name for file in options.out.iterdir()} - KEPT)):
        raise UserError(f"{options.out} holds {strangers[0]}, which is not of a comparison: choose another -o")
    tokenizer = options.tokenizer or options.out / "tokenizer"
    if options.tokenizer is None and not tokenizer.exists():
        _command("models.tokenizer", "train", "--data", *options.data, "-o", tokenizer, "--vocab-size", options.vocab_size,
                 "--documents", options.documents, *(["--format", options.format] if options.format else []))
    file, (eos, vocab) = tokenizer_file(tokenizer), tokenizer_facts(tokenizer)
    learned, held = (build_corpus(options, options.data, file, eos, Split(part, options.valid_share, options.seed)) for part in ("train", "valid"))
    folders = {}
    for name in dict.fromkeys(options.models):
        print(f"\n{NAMES[name]}", flush=True)
        folders[name] = _ngrams(options, learned, tokenizer, vocab) if name == "ngram" else _network(options, name, tokenizer)
    opened = {name: open_model(folder, threads=options.threads) for name, folder in folders.items()}
    windows = held_out(held, next(iter(opened.values())).tokenizer, options.context, options.windows)
    found = {name: measure(model.backend, windows, label=f"judging {NAMES[name]}").metrics() for name, model in opened.items()}
    speeds = _speeds(opened, windows[0].ids)
    result = [{"model": NAMES[name], **found[name], "bytes": _bytes(folders[name]), "tokens_per_s": speeds[name],
               "run_by": opened[name].backend.name} for name in folders]
    write_json(options.out / "comparison.json", {"models": result})
    about = (f"{len(learned.tokens):,} tokens of training text, of which a network saw {options.steps * options.batch * options.context:,}; "
             f"{result[0]['tokens']:,} tokens held out")
    write(options.out / "comparison.html", document("Language models on equal text", _sections(result, about)))
    print(f"\n{about}\n{table([_row(one) for one in result])}\n{options.out / 'comparison.html'}")


def held_out(corpus: Corpus, tokenizer, length: int, most: int) -> list[Window]:
    """Windows of a corpus that score their second half. Raises UserError where there is not one whole one."""
    first, windows = length // 2, []
    for start in range(0, len(corpus.tokens) - length + 1, length - first)[:most]:
        ids = np.asarray(corpus.tokens[start:start + length], np.int64)
        whole, before = (len(tokenizer.decode(part.tolist()).encode()) for part in (ids, ids[:first]))
        windows.append(Window(ids, first, whole - before))
    if not windows:
        raise UserError(f"{len(corpus.tokens)} tokens are held out, fewer than --context {length}: raise --valid-share, or give more text")
    return windows


def _ngrams(options: Options, learned: Corpus, tokenizer: Path, vocab: int) -> Path:
    start, out = time.perf_counter(), options.out / "ngram"
    model = count_ngrams(learned.tokens, options.order, vocab)
    with new_folder(out) as folder:
        write_ngram(folder, model, tokenizer, lineage.stage("compare", options, {"data": learned.digest}))
    print(f"{out}: {sum(len(order.keys) for order in model.orders):,} n-grams in {time.perf_counter() - start:.1f} s")
    return out


def _network(options: Options, name: str, tokenizer: Path) -> Path:
    """Train it, or go on, and export it; gives the bundle."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(DataOptions)}
    run, bundle = options.out / name / "run", options.out / name / "bundle"
    train(TrainOptions(**shared, out=run, tokenizer=tokenizer, preset=options.preset, architecture=name, steps=options.steps, batch=options.batch,
                       context=options.context, learning_rate=options.learning_rate, valid_share=options.valid_share, seed=options.seed,
                       resume=(run / "last").exists()))
    _command("export.onnx", run / "last", "-o", bundle)
    _command("export.ort", bundle)
    return bundle


def _command(module: str, *words) -> None:
    """A command as a user types it, in this process. Raises CheckFailed where it does not do its work; it has said why."""
    if importlib.import_module(module).main([str(word) for word in words]):
        raise CheckFailed(f"python -m {module} {' '.join(map(str, words))} did not succeed")


def _speeds(opened: dict[str, LanguageModel], text: np.ndarray) -> dict[str, float]:
    """Tokens a second of a reply to the text's beginning: the median of some, written by the models in turn."""
    found: dict[str, list[float]] = {name: [] for name in opened}
    prompt = text[:min(PROMPT, len(text) // 2)]
    for _ in range(ROUNDS + 1):
        for name, model in opened.items():
            endless = dataclasses.replace(model, eos=frozenset())
            reply, = endless.generate([prompt], min(NEW, len(text) - len(prompt)), progress=False)
            found[name].append(reply.timings.decode_tokens_per_s)
    return {name: median(values[1:]) for name, values in found.items()}                # the first one warms up


def _bytes(folder: Path) -> int:
    """Of a bundle what its manifest lists, of n-grams their files."""
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return sum(entry["bytes"] for entry in read_json(manifest)["files"].values())
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _row(one: dict) -> dict:
    low, high = one["bits_per_byte_interval"]               # of one window unknown
    return {"model": one["model"], "bits a byte": f"{one['bits_per_byte']:.3f}", "95%": f"{low:.3f} to {high:.3f}" if low <= high else "",
            "perplexity": f"{one['perplexity']:.1f}", "token accuracy": f"{one['token_accuracy']:.1%}", "MB": f"{one['bytes'] / 1e6:.2f}",
            "tokens/s": f"{one['tokens_per_s']:.0f}", "run by": one["run_by"]}


def _sections(result: list[dict], about: str) -> list[Section]:
    rows = [_row(one) for one in result]

    def bars(key: str) -> list[tuple[float, float, float]]:
        intervals = [one.get(f"{key}_interval", (np.nan, np.nan)) for one in result]
        return [(one[key], *(interval if np.isfinite(interval).all() else (one[key], one[key]))) for one, interval in zip(result, intervals)]
    return [Section("Bits a byte", f"What a byte of unseen text costs to write down with the model's help: lower is better. {about}. The line "
                    "across a bar is its 95% interval over windows. Token accuracy is how often the next token is the likeliest one.",
                    rows, bars("bits_per_byte")),
            Section("Bytes on disk", "Weights, graphs and tokenizer, as an app would ship them.",
                    [{"model": row["model"], "MB": row["MB"]} for row in rows], bars("bytes")),
            Section("Tokens a second", f"Of one reply, greedily, after {PROMPT} tokens; the models took turns.",
                    [{"model": row["model"], "tokens/s": row["tokens/s"], "run by": row["run by"]}
                     for row in rows], bars("tokens_per_s"))]
