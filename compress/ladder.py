"""What a compression has gained and lost so far: size, perplexity, KL and top-1 agreement, decode speed.

    figures = measure_quality(folder, original, texts, windows) | measure_speed(folder, work)
    print(ladder([("original", figures), ...]))

Quality is measured in PyTorch, float32, on a device, on the second half of 512-token windows (models/judging/fidelity.py); the
reference is the model that the compression began with. A size is that of a bundle's weights file
(compress/quantizing/mixed.py). Speed is that of an exported bundle on this machine, by the commands a user would type
(export.onnx, runtime.bench), each in a process of its own; it depends on what else the machine does.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from compress.quantizing.mixed import bundle_extras
from models.checkpoint import CPU, load_decoder, open_checkpoint
from models.data.records import find_sources
from models.formats.chat import chat_encoder
from models.judging.fidelity import Fidelity, cut_windows, measure
from models.judging.language_model import spare_for
from models.judging.texts import read
from models.network.torch_backend import TorchBackend
from runtime.cli import table
from runtime.files import read_json
from runtime.text import Tokenizer

WINDOW = 512
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 32, 64, 3


def measure_quality(folder: Path, original: Path | None, texts: tuple[str, ...], windows: int, device: torch.device = CPU) -> dict:
    """bytes and perplexity of a checkpoint; with an `original` of the same vocabulary kl and top1_agreement too. Under "texts" the same
    of each text, where there are several.

    texts: files, of chats through the checkpoint's template, each judged on its first `windows` windows. Raises UserError for text too short.
    """
    checkpoint, tokenizer = open_checkpoint(folder), Tokenizer(folder / "tokenizer.json")
    size = {"bytes": sum(checkpoint.nbytes(name) for name in checkpoint.names()) + bundle_extras(checkpoint)}
    window, sources, parts = min(WINDOW, checkpoint.config.context_length), find_sources(texts), {}
    for source in sources:
        text = read(source, tokenizer, partial(chat_encoder, folder, tokenizer), window * (windows + 1))
        parts[source] = cut_windows(text, window, window // 2, windows)
    reference = None
    if original is not None and Tokenizer(original / "tokenizer.json").vocabulary() == tokenizer.vocabulary():
        reference = TorchBackend(load_decoder(original, device=device, spare=spare_for(device, folder)))
    model, label = TorchBackend(load_decoder(folder, device=device)), f"judging {folder.parent.name}"
    measured = {source: measure(model, cut, reference, label=label) for source, cut in parts.items()}
    pooled = Fidelity([window for part in measured.values() for window in part.windows])
    return size | _named(pooled) | ({"texts": {source: _named(part) for source, part in measured.items()}} if len(parts) > 1 else {})


def _named(found: Fidelity) -> dict:
    return {name: value for name, value in found.metrics().items() if name in ("perplexity", "kl", "top1_agreement")}


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
    """A table, a row a stage; where several texts are judged another, a row for each and stage: what was gained on one may be lost on
    another. What was not measured is a dash."""
    def shown(figures: dict, name: str, form: str, factor: float = 1.0) -> str:
        return "-" if figures.get(name) is None else format(figures[name] * factor, form)

    def quality(figures: dict) -> dict[str, str]:
        return {"perplexity": shown(figures, "perplexity", ".2f"), "KL": shown(figures, "kl", ".4f"),
                "same top-1": shown(figures, "top1_agreement", ".1%")}
    stages = table([{"stage": name, "MB": shown(figures, "bytes", ".1f", 1e-6), **quality(figures),
                     "decode tokens/s": shown(figures, "decode_tokens_per_s", ".0f")} for name, figures in results])
    texts = [{"text": Path(text).name, "stage": name, **quality(figures["texts"][text])}
             for text in results[-1][1].get("texts", ()) for name, figures in results if text in figures.get("texts", ())]
    return f"{stages}\n\n{table(texts)}" if texts else stages
