"""An encoder's bundles beside PyTorch, in one run: `python -m models.encoder_bench INT8_BUNDLE CHECKPOINT`.

A folder of a checkpoint runs in PyTorch, one of a bundle on ONNX Runtime, all with as many threads; they take turns within every round,
and the ratios are those of pairs of one round. What is measured, and on which texts, says runtime/benching/encoders.py. Bundles alone
are measured by runtime.bench, without PyTorch.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime.cli import Checked, arg, run
from runtime.errors import UserError

EXAMPLES = """examples:
  python -m models.encoder_bench build/sst2-int8-bundle build/sst2/last --prompt-tokens 32
"""


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Texts a second of encoders' bundles and checkpoints, in turns."""
    folder: tuple[Path, ...] = arg(positional=True, help="bundles, and checkpoints for PyTorch; the first is compared with the others")
    prompt_tokens: int = arg(128, help="tokens of the longest text", least=1)
    repeat: int = arg(5, help="rounds that count", least=1)
    threads: int | None = arg(None, help="CPU threads of each (default: the CPUs this process may use)", least=1)
    json: Path | None = arg(None, help="write the figures to this file")


def main(argv=None) -> int:
    return run(Options, "bench", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from models.encoders.evaluate import is_any_encoder, opened
from runtime.bench import unique
from runtime.benching.conditions import Conditions
from runtime.benching.encoders import encoders
from runtime.benching.report import as_json, terminal
from runtime.files import write
from runtime.machine import cpu_threads


def bench(options: Options) -> None:
    """Measure, print the table, write the file. Raises UserError."""
    for folder in options.folder:
        if not is_any_encoder(folder):
            raise UserError(f"{folder} is no encoder's bundle or checkpoint; runtime.bench measures decoders' bundles")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"{options.json}: no such folder to write it in")
    threads, before, watch = cpu_threads(options.threads), torch.get_num_threads(), Conditions()
    torch.set_num_threads(threads)
    try:
        names = unique([folder.name for folder in options.folder], options.folder)
        samples, header = encoders({name: partial(opened, folder, threads) for name, folder in zip(names, options.folder)},
                                   options.prompt_tokens, options.repeat)
    finally:
        torch.set_num_threads(before)
    header |= {"threads": str(threads), **watch.told()}
    print(terminal(samples, header))
    if options.json:
        write(options.json, json.dumps(as_json(samples, header), indent=2) + "\n")
