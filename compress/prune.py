"""Prune a checkpoint: fewer layers, narrower layers, fewer tokens, or zeros among the weights.

    python -m compress.prune CKPT -o OUT --data FILES --what depth --keep 0.8

Reads a full-precision checkpoint and writes an ordinary one. Depth, mlp, heads, hidden and vocabulary make a smaller
model that exports and runs faster (depth.py, width.py, hidden.py, vocabulary.py); sparse keeps every shape (sparse.py).
Prune one way, then another: stages compose. What was lost comes back in part by training afterwards (models.finetune,
compress.distill). Of an encoder (BERT and its kin) whole layers can go, and neurons of its MLPs (compress/encoders/prune.py).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.formats import lineage
from models.network.config import ModelConfig
from models.data.corpus import DataOptions
from models.device import DeviceOptions
from runtime.cli import arg, parse_size, run, table
from runtime.errors import UserError
from runtime.files import LARGEST_TOKENIZER, read_json

CHANNELS = 32             # groups of later quantization divide what --keep leaves of the stream
EXAMPLES = """examples:
  python -m compress.prune CKPT -o OUT --data corpus.txt --what depth --layers 24 --order greedy
  python -m compress.prune CKPT -o OUT --data corpus.txt --what mlp --keep 0.85      (of all parameters)
  python -m compress.prune CKPT -o OUT --data corpus.txt --what heads --groups 2
  python -m compress.prune CKPT -o OUT --data corpus.txt --what hidden --hidden 512
  python -m compress.prune CKPT -o OUT --data english/ --what vocabulary --tokens 24000
  python -m compress.prune CKPT -o OUT --data corpus.txt --what sparse --sparsity 2:4 --score sparsegpt
"""


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, DeviceOptions):
    """Prune a checkpoint's layers, MLP neurons, attention heads, vocabulary or single weights."""
    checkpoint: Path = arg(positional=True, help="checkpoint folder to read")
    out: Path = arg(help="checkpoint folder to write", short="-o")
    what: str = arg(help="what to leave out", choices=("depth", "mlp", "heads", "hidden", "vocabulary", "sparse"))
    keep: float | None = arg(None, help="depth, mlp, hidden: share of all parameters to keep",
                             above=0, below=1, group="how much to keep")
    target_size: str | None = arg(None, help="the same as bytes of the checkpoint's tensors, such as 400MB",
                                  size=True, group="how much to keep")
    layers: int | None = arg(None, help="depth: layers to keep", least=1, group="how much to keep")
    order: str = arg("kl", help="depth: which layers go first", choices=("influence", "kl", "greedy", "beam"),
                     group="how to choose")
    neurons: int | None = arg(None, help="mlp: neurons a layer to keep, on average over the layers",
                              least=1, group="how much to keep")
    step: int = arg(64, help="mlp: widths are multiples of this", least=1, group="how to choose")
    groups: int | None = arg(None, help="heads: key/value groups to keep in each layer", least=1, group="how much to keep")
    hidden: int | None = arg(None, help=f"hidden: channels of the residual stream to keep (with --keep: a multiple of {CHANNELS})",
                             least=1, group="how much to keep")
    tokens: int | None = arg(None, help="vocabulary: tokens to keep at most (default: all that the data uses)",
                             least=1, group="how much to keep")
    sparsity: str = arg("0.5", help="sparse: fraction of zeros, or 2:4", group="how much to keep")
    score: str = arg("sparsegpt", help="sparse: which weights go", choices=("magnitude", "wanda", "sparsegpt"),
                     group="how to choose")
    ratios: str = arg("even", help="sparse: as many zeros in every linear, or fewer where they cost more",
                      choices=("even", "sensitivity"), group="how to choose")
    windows: int = arg(64, help="calibration windows, spread evenly over the data", least=1, group="how to choose")
    length: int = arg(512, help="tokens in a window", least=1, group="how to choose")

    def __post_init__(self):
        super().__post_init__()
        if self.keep is not None and self.target_size is not None:
            raise UserError("--keep and --target-size say the same thing twice: give one of them")


def main(argv=None) -> int:
    return run(Options, "prune", argv, epilog=EXAMPLES)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
from torch import Tensor

from compress.encoders.prune import prune_encoder
from compress.pruning import depth, sparse, vocabulary, width
from compress.pruning.hidden import principal_directions, sliced
from compress.options import check_compresses
from compress.text import corpus_windows, read_corpus
from models.checkpoint import CPU, Checkpoint, check_output, load_decoder, open_checkpoint, write_checkpoint
from models.device import computing_on
from models.encoders.network import is_encoder
from models.network.decoder import tensor_shapes


def prune(options: Options) -> None:
    if is_encoder(options.checkpoint):
        return prune_encoder(options)
    with computing_on(options.device) as device:
        _prune(open_checkpoint(options.checkpoint).on(device), options)


def _prune(checkpoint: Checkpoint, options: Options) -> None:
    check_compresses(checkpoint)
    check_output(options.out, options.checkpoint)
    if checkpoint.quantization is not None:
        raise UserError(f"{options.checkpoint} is quantized: prune the checkpoint it was made from, then quantize")
    companions = None
    if options.what == "vocabulary":
        config, tensors, metrics, companions = _vocabulary(checkpoint, options)
    else:
        way = {"depth": _depth, "mlp": _mlp, "heads": _heads, "hidden": _hidden, "sparse": _sparse}[options.what]
        ids = corpus_windows(checkpoint, options, options.windows, min(options.length, checkpoint.config.context_length))
        config, tensors, metrics = way(checkpoint, ids, options)
    try:
        hf_config = config.to_hf()
    except ValueError as error:
        raise UserError(f"{options.checkpoint}: --what {options.what} leaves a model that config.json cannot say: {error}") from None
    stage = lineage.stage("compress.prune", options, {options.checkpoint.name: checkpoint.sha256()}, metrics)
    write_checkpoint(options.out, hf_config, tensors, options.checkpoint, stage, companions)
    before, after = _parameters(checkpoint.config), _parameters(config)
    print(table([{"": "parameters", "before": before, "after": after, "kept": f"{after / before:.1%}"},
                 {"": "layers", "before": len(checkpoint.config.layers), "after": len(config.layers), "kept": ""},
                 {"": "vocabulary", "before": checkpoint.config.vocab_size, "after": config.vocab_size, "kept": ""}]))


def _parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def _target(options: Options, config: ModelConfig) -> int:
    """Parameters to keep, from --keep or --target-size."""
    if options.target_size is not None:
        checkpoint = open_checkpoint(options.checkpoint)
        stored = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        if parse_size(options.target_size) >= stored:
            raise UserError(f"--target-size {options.target_size} is not below the {stored / 1e6:.2f} MB that "
                            f"{options.checkpoint} has")
        return parse_size(options.target_size) * _parameters(config) // stored
    if options.keep is None:
        raise UserError("say how much to keep: --keep SHARE, --target-size SIZE or a count (--layers, --neurons, --hidden)")
    return int(options.keep * _parameters(config))


def _depth(checkpoint: Checkpoint, ids: Tensor, options: Options):
    config, total = checkpoint.config, len(checkpoint.config.layers)
    layers = options.layers
    if layers is None:
        target = _target(options, config)
        sizes = [_parameters(replace(config, layers=config.layers[:n])) for n in range(1, total + 1)]
        layers = max((n for n, size in enumerate(sizes, 1) if size <= target), default=0)
        if layers == 0:
            raise UserError(f"--keep {target / sizes[-1]:.3g} is below {sizes[0] / sizes[-1]:.3f}, which one layer and the "
                            f"embedding take")
    stay = frozenset(layer.cache_source for layer in config.layers if layer.cache_source is not None)
    if not max(1, len(stay)) <= layers < total:
        raise UserError(f"--layers is {layers}, which should be from {max(1, len(stay))} to {total - 1}")
    decoder = load_decoder(options.checkpoint, device=checkpoint.device)
    gone = depth.choose_layers(decoder, ids.to(checkpoint.device), total - layers, options.order, stay)
    left = [n for n in range(total) if n not in gone]
    print(f"layers left out, first to go first: {' '.join(map(str, gone))}")
    tensors = ((name, checkpoint.on(CPU).read(name)) for name in checkpoint.names())
    return depth.kept_config(config, left), depth.kept_tensors(config, left, tensors), {"dropped_layers": gone}


def _mlp(checkpoint: Checkpoint, ids: Tensor, options: Options):
    config = checkpoint.config
    for number in (number for number, layer in enumerate(config.layers) if layer.experts):
        raise UserError(f"--what mlp: layer {number} has a mixture of experts, whose neurons are not pruned: prune depth or hidden instead")
    present = sum(layer.mlp_size for layer in config.layers)
    if options.neurons is not None:
        total = options.neurons * len(config.layers)
    else:
        one = (3 if config.gated_mlp else 2) * config.hidden_size
        total = present - math.ceil((_parameters(config) - _target(options, config)) / one)
    if any(layer.mlp_size < options.step for layer in config.layers):
        raise UserError(f"--step is {options.step}, which should be from 1 to the narrowest layer's width")
    if not options.step * len(config.layers) <= total < present:
        raise UserError(f"{max(total, 0)} of {present} neurons would stay, which should be at least "
                        f"{options.step * len(config.layers)} (one step in each layer) and fewer than all")
    importance = width.measure_importance(checkpoint, ids)
    widths = width.choose_neurons(importance, total, options.step)
    groups = [layer.kv_heads for layer in config.layers]
    return *width.narrowed(checkpoint, ids, importance, widths, groups), {"mlp_sizes": widths}


def _heads(checkpoint: Checkpoint, ids: Tensor, options: Options):
    config, layers = checkpoint.config, checkpoint.config.layers
    for why in (why for why, has in (("keys and values that several layers read", any(layer.cache_source is not None for layer in layers)),
                                     ("norms over all heads of q and k", config.qk_norm and config.qk_norm_over == "all")) if has):
        raise UserError(f"--what heads: family {config.family} has {why}, which fewer heads would change: prune depth or mlp instead")
    present = [layer.kv_heads for layer in layers if layer.mixer == "attention"]
    if not present:
        raise UserError(f"--what heads: {checkpoint.path} has no layer of attention")
    fewest = min(present)
    if options.groups is None or not 1 <= options.groups <= fewest or options.groups == max(present):
        raise UserError(f"--groups is {options.groups}, which should be from 1 to one less than the model's {fewest} key/value heads")
    widths = [layer.mlp_size for layer in layers]
    groups = [options.groups if layer.mixer == "attention" else layer.kv_heads for layer in layers]
    importance = width.measure_importance(checkpoint, ids)
    return *width.narrowed(checkpoint, ids, importance, widths, groups), {"kv_heads": options.groups}


def _hidden(checkpoint: Checkpoint, ids: Tensor, options: Options):
    config, kept = checkpoint.config, options.hidden
    if kept is None:
        target = _target(options, config)
        sizes = {n: _parameters(replace(config, hidden_size=n)) for n in range(CHANNELS, config.hidden_size, CHANNELS)}
        kept = max((n for n, size in sizes.items() if size <= target), default=None)
        if kept is None:
            raise UserError(f"{target} of {_parameters(config)} parameters is below what {CHANNELS} channels take: keep more")
    if not 1 <= kept < config.hidden_size:
        raise UserError(f"--hidden is {kept}, which should be from 1 to {config.hidden_size - 1}")
    turn = principal_directions(checkpoint, ids)[:, :kept].contiguous()
    return replace(config, hidden_size=kept), sliced(checkpoint, turn), {"hidden_size": kept}


def _sparse(checkpoint: Checkpoint, ids: Tensor, options: Options):
    pattern, ratios = sparse.parse_pattern(options.sparsity), None
    if options.ratios == "sensitivity":
        if pattern == "2:4":
            raise UserError("--ratios sensitivity and --sparsity 2:4 do not go together: give a fraction, such as --sparsity 0.5")
        ratios = sparse.sparsity_ratios(checkpoint, ids, options.score, pattern)
    return (checkpoint.config, sparse.sparsified(checkpoint, ids, options.score, pattern, ratios),
            {"sparsity": options.sparsity, "ratios": ratios})


def _vocabulary(checkpoint: Checkpoint, options: Options):
    """As the others, and what rewrites the tokenizer's files."""
    checkpoint = checkpoint.on(CPU)                                  # rows are chosen, nothing is computed
    config, counts = checkpoint.config, vocabulary.count_tokens(np.asarray(read_corpus(checkpoint, options, options.data).tokens))
    tokenizer = read_json(checkpoint.path / "tokenizer.json", largest=LARGEST_TOKENIZER)
    kept = vocabulary.plan(tokenizer, counts, options.tokens)
    if len(kept) >= config.vocab_size:
        raise UserError(f"the data uses all {config.vocab_size} tokens: give --tokens, or other data")
    kept = [i for i in kept if i < config.vocab_size]
    new, rows = {old: i for i, old in enumerate(kept)}, torch.tensor(kept)
    config = replace(config, vocab_size=len(kept), bos_token_id=vocabulary.renumbered(config.bos_token_id, new),
                     pad_token_id=vocabulary.renumbered(config.pad_token_id, new),
                     eos_token_ids=tuple(vocabulary.renumbered(list(config.eos_token_ids), new)))
    tables = ("model.embed_tokens.weight", "lm_head.weight", "model.per_layer_embed.weight")
    tensors = ((name, checkpoint.read(name)[rows] if name in tables else checkpoint.read(name)) for name in checkpoint.names())
    return config, tensors, {"vocab_size": len(kept)}, lambda folder: vocabulary.rewrite_files(folder, kept)
