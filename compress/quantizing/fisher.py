"""What a model's answers depend on: the squared gradient at every linear's output, and how both uses of the vocabulary weigh.

    gradients, vocabulary = output_gradients(checkpoint, ids)          # ids int64 [windows, tokens]
    gradients["model.layers.0.mlp.down_proj"]                           # G[o] = E[g_o^2], float32 [outputs]

g is the gradient, at a linear's output, of the log-probability of a token drawn from the model's own prediction, so that G is
the Fisher information and not the error of a text. sensitivity.py says what that is for.

One pass over the windows through the whole model, forward and backward, on the checkpoint's device: a window at a time on a CPU,
elsewhere as many as fit; layers that a device has no room for come for their turn, twice a batch. Sums are taken over PIECE
windows at a time (`window_sums`) and then added up, so that pieces may be made anywhere, and kept. What is drawn for a window
depends on its number alone. An expert that the text does not reach is taken for as sensitive as the others of its layer.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.cluster import Cluster, held
from compress.drawing import drawn
from compress.layerwise import fast_forward, fast_matmul
from models.checkpoint import CPU, SPARE, Checkpoint, load_decoder, open_checkpoint
from models.device import smaller
from models.formats.safetensors_file import save_tensors
from models.network.config import ModelConfig
from models.network.decoder import Decoder, tensor_shapes
from models.progress import progress
from models.training.memory import PROCESS_BYTES
from runtime.files import new_file

EXPERT = re.compile(r"\.experts\.\d+")
HEAD_ROWS = 512                    # tokens whose logits are in memory at once
PIECE = 4                          # windows whose sums are made together
Sums = dict[str, Tensor]


def seed_of(seed: int, number: int) -> int:
    """Of what is drawn for one window or layer, so that it does not matter where the others are done."""
    return seed * 1_000_003 + number


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes a parameter with which the whole model is held: 2 where it is stored in 16 bits, and then in bfloat16."""
    return 4 if checkpoint.dtype("model.embed_tokens.weight") == "F32" else 2


def whole_model(checkpoint: Checkpoint, tokens: int) -> Decoder:
    """The decoder whose gradients are taken, on the checkpoint's device, with room left there for a window of `tokens`."""
    size = stored_bytes(checkpoint)
    needed = gradient_bytes(checkpoint.config, tokens, size)
    spare = max(SPARE, sum(needed[name] for name in ("activations", "logits", "token table")))
    return load_decoder(checkpoint.path, torch.float32 if size == 4 else torch.bfloat16, checkpoint.device, spare).requires_grad_(False)


def output_gradients(checkpoint: Checkpoint, ids: Tensor, seed: int = 0, work: Path | None = None,
                     cluster: Cluster | None = None) -> tuple[dict[str, Tensor], dict[str, list]]:
    """G[o] of every linear, and for the embedding and the head pairs (weight of each row, Hessian of its inputs).

    work: a folder that keeps the sums of each piece; those that are there already are not made again. cluster: makes them."""
    pieces = {f"gradients-{first}": (first, ids[first:first + PIECE]) for first in range(0, len(ids), PIECE)}

    def make(names: list[str]) -> Iterator[Sums]:
        wanted = [pieces[name] for name in names]
        if cluster is not None:
            yield from cluster.share(partial(_sums_there, checkpoint.path.absolute(), seed), wanted)
        elif wanted:
            decoder = whole_model(checkpoint, ids.shape[1])
            yield from (window_sums(decoder, part, first, seed) for first, part in wanted)
    total: Sums = {}
    for sums in progress(kept(work, list(pieces), make), label="gradients", unit="piece", total=len(pieces)):
        for name, value in sums.items():
            value = value.to(checkpoint.device)
            total[name] = total[name] + value if name in total else value
    return in_the_mean(checkpoint, ids, total)


def _sums_there(path: Path, seed: int, piece: tuple[int, Tensor], device: torch.device) -> Sums:
    """`window_sums` by a worker of a cluster, which holds the model from one piece to the next."""
    decoder = held(_model_there, path, piece[1].shape[1], device)
    return {name: value.cpu() for name, value in window_sums(decoder, piece[1], piece[0], seed).items()}


def _model_there(path: Path, tokens: int, device: torch.device) -> Decoder:
    return whole_model(open_checkpoint(path).on(device), tokens)


def kept(work: Path | None, names: list[str], make: Callable[[list[str]], Iterator[Sums]]) -> Iterator[Sums]:
    """The pieces `names` in order: those that the folder `work` has are read, and make(the others) are written there one by one."""
    def file(name: str) -> Path | None:
        return work and work / f"{name}.safetensors"
    there = {name for name in names if work and file(name).is_file()}
    made = iter(make([name for name in names if name not in there]))
    for name in names:
        if name in there:
            yield load_file(file(name))
            continue
        sums = next(made)
        if work:
            work.mkdir(parents=True, exist_ok=True)
            with new_file(file(name)) as partial_file:
                save_tensors(partial_file, sums)
        yield sums


def window_sums(decoder: Decoder, ids: Tensor, first: int, seed: int) -> Sums:
    """Sums over ids [windows, tokens], the windows from number `first` on: by linear g^2 [outputs], and "spread" [vocabulary],
    "inputs" and "outputs" [hidden, hidden] of the vocabulary's two uses."""
    device = decoder.model.embed_tokens.weight.device
    total, start, rows = {}, 0, 1 if device == CPU else len(ids)
    while start < len(ids):
        def sums(count: int) -> Sums:
            return _sums(decoder, ids[start:start + count], first + start, seed)
        found, rows = smaller(min(rows, len(ids) - start), sums)
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
        start += rows
    return total


def _sums(decoder: Decoder, ids: Tensor, first: int, seed: int) -> Sums:
    """`window_sums` of windows that go through the model together."""
    weight = (decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head).weight
    device, (vocabulary, hidden_size), cap = weight.device, weight.shape, decoder.config.logits_softcap
    head, sums, hooks = weight.float(), {}, []

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def watch(module: nn.Module, keep: Callable[[Tensor], None]) -> None:
        def hook(module, arguments, output):
            output.requires_grad_().register_hook(keep)
        hooks.append(module.register_forward_hook(hook))

    for name, module in decoder.model.named_modules():
        if isinstance(module, nn.Linear) or name == "per_layer_embed":
            watch(module, lambda gradient, name=f"model.{name}": add(name, gradient.flatten(0, -2).float().square().sum(0)))
    watch(decoder.model.embed_tokens, lambda gradient: add("outputs", gradient.flatten(0, -2).float().T @ gradient.flatten(0, -2).float()))
    chance = torch.cat([torch.rand(ids.shape[1], 1, generator=torch.Generator().manual_seed(seed_of(seed, first + window)))
                        for window in range(len(ids))]).to(device)
    try:
        with fast_matmul():
            with fast_forward(device):
                hidden = decoder.model(ids.to(device))
            flat = hidden.detach().flatten(0, 1).float()
            gradient, spread = torch.empty_like(flat), torch.zeros(vocabulary, device=device)
            for start in range(0, len(flat), HEAD_ROWS):
                part = slice(start, start + HEAD_ROWS)
                logits, slope = flat[part] @ head.T, 1.0
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                    slope = 1 - (logits / cap).square()                     # of the cap
                probabilities = torch.softmax(logits, -1)
                spread += ((probabilities - probabilities.square()) * slope**2).sum(0)
                tokens = drawn(probabilities, chance[part])
                probabilities.scatter_add_(1, tokens, torch.full_like(tokens, -1.0, dtype=torch.float32))
                gradient[part] = (probabilities * slope) @ head
            hidden.backward(gradient.view_as(hidden).to(hidden.dtype))
            return sums | {"spread": spread, "inputs": flat.T @ flat}
    finally:
        for hook in hooks:
            hook.remove()


def in_the_mean(checkpoint: Checkpoint, ids: Tensor, total: Sums) -> tuple[dict[str, Tensor], dict[str, list]]:
    """`output_gradients` of the sums over all windows."""
    config, tokens = checkpoint.config, ids.numel()
    mean = {name: value / tokens for name, value in total.items()}
    counts = torch.bincount(ids.flatten(), minlength=config.vocab_size).float().to(checkpoint.device)
    as_head, as_table = (mean.pop("spread"), mean.pop("inputs")), (counts / tokens, mean.pop("outputs"))
    uses = {"model.embed_tokens": [as_table, as_head]} if config.tied_embeddings else {
        "model.embed_tokens": [as_table], "lm_head": [as_head]}
    with torch.device("meta"):
        model = Decoder(config).model
    for name in [f"model.{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        if name not in mean:                                    # an expert that no token has reached
            alike = [value for other, value in mean.items() if EXPERT.sub("", other) == EXPERT.sub("", name)]
            mean[name] = sum(alike) / len(alike)
    return mean, uses


def gradient_bytes(config: ModelConfig, length: int, bytes_a_parameter: int) -> dict[str, int]:
    """Predicted peak memory by kind: the whole model, mapped from its file, and the activations of one window."""
    tokens = min(length, config.context_length)
    kept = sum(8 * config.hidden_size + 4 * layer.heads * config.head_size(layer)
               + 4 * config.state_shapes(layer).get("conv", (0,))[0]
               + 4 * (layer.mlp_size * max(layer.experts_per_token, 1) + layer.shared_size) for layer in config.layers)
    return {"weights": bytes_a_parameter * sum(math.prod(shape) for shape in tensor_shapes(config).values()),
            "activations": 4 * tokens * kept, "logits": 16 * tokens * config.vocab_size,
            "token table": 4 * config.vocab_size * config.hidden_size, "process": PROCESS_BYTES}
