"""What a compression has gained and lost so far: size, perplexity, KL and top-1 agreement, decode speed.

    figures = measure_quality(folder, original, texts, windows) | measure_speed(folder, work)
    print(ladder([("original", figures), ...]))

Quality is measured in PyTorch, float32, on the second half of 512-token windows (models/judging/fidelity.py); the
reference is the model that the compression began with. A size is that of a bundle's weights file
(compress/quantizing/mixed.py). Speed is that of an exported bundle on this machine, by the commands a user would type
(export.onnx, runtime.bench), each in a process of its own; it depends on what else the machine does.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.quantizing.mixed import bundle_extras
from models.data.records import as_text, find_sources, read_records
from models.checkpoint import load_decoder, open_checkpoint
from models.judging.fidelity import cut_windows, measure
from models.network.torch_backend import TorchBackend
from runtime.cli import table
from runtime.files import read_json
from runtime.text import Tokenizer

WINDOW = 512
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 32, 64, 3


def measure_quality(folder: Path, original: Path | None, texts: tuple[str, ...], windows: int) -> dict:
    """bytes and perplexity of a checkpoint; with an `original` of the same vocabulary kl and top1_agreement too.

    texts: files, each judged on its first `windows` windows. Raises UserError for text too short.
    """
    checkpoint, tokenizer = open_checkpoint(folder), Tokenizer(folder / "tokenizer.json")
    size = {"bytes": sum(checkpoint.nbytes(name) for name in checkpoint.names()) + bundle_extras(checkpoint)}
    window, cut = min(WINDOW, checkpoint.config.context_length), []
    for source in find_sources(texts):
        cut += cut_windows(tokenizer, "\n".join(map(as_text, read_records([source]))), window, window // 2, windows)
    reference = None
    if original is not None and Tokenizer(original / "tokenizer.json").vocabulary() == tokenizer.vocabulary():
        reference = TorchBackend(load_decoder(original))
    found = measure(TorchBackend(load_decoder(folder)), cut, reference, label=f"judging {folder.parent.name}").metrics()
    return size | {name: found[name] for name in ("perplexity", "kl", "top1_agreement") if name in found}


def measure_speed(folder: Path, work: Path) -> dict:
    """decode_tokens_per_s of the checkpoint as a bundle, made in `work` and removed; None where no backend runs it."""
    context = min(open_checkpoint(folder).config.context_length, PROMPT_TOKENS + NEW_TOKENS)
    with TemporaryDirectory(dir=work) as place:
        bundle, figures = Path(place, "bundle"), Path(place, "bench.json")
        for command in (["export.onnx", folder, "-o", bundle, "--max-context", context],
                        ["runtime.bench", bundle, "--prompt-tokens", context - NEW_TOKENS, "--new-tokens", NEW_TOKENS,
                         "--repeat", REPEATS, "--json", figures]):
            done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True)
            if done.returncode:
                print(f"no speed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return {"decode_tokens_per_s": None}
        return {"decode_tokens_per_s": read_json(figures)["decode_tokens_per_s"]}


def ladder(results: list[tuple[str, dict]]) -> str:
    """A table, a row a stage; what was not measured is a dash."""
    def shown(figures: dict, name: str, form: str, factor: float = 1.0) -> str:
        return "-" if figures.get(name) is None else format(figures[name] * factor, form)

    return table([{"stage": name, "MB": shown(figures, "bytes", ".1f", 1e-6), "perplexity": shown(figures, "perplexity", ".2f"),
                   "KL": shown(figures, "kl", ".4f"), "same top-1": shown(figures, "top1_agreement", ".1%"),
                   "decode tokens/s": shown(figures, "decode_tokens_per_s", ".0f")} for name, figures in results])
