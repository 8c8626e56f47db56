"""What it costs to store each module in each format: an estimate in nats of KL divergence a token, measured once.

    found = measure_sensitivity(checkpoint, ids, formats)
    found.damage["model.layers.0.mlp.down_proj"][TensorFormat(4, 32)]          # nats a token

The second-order estimate of the KL divergence that an error dW of one linear causes is
    1/2 sum_o G[o] (dW H dW^T)[o, o],      G[o] = E[g_o^2],   H = E[x x^T],
g being the gradient, at the linear's output, of the log-probability of a token drawn from the model's own prediction
(so that G is the Fisher information and not the error of a text), and x its input. GPTQ's error is known before GPTQ
runs: each rounding error e[o, k] is paid with the pivot d[k] of H (the rest is compensated), so the damage of a format is
    1/2 sum_o G[o] sum_k d[k] e[o, k]^2,
e from rounding to the nearest on the clipped grid. Rows that matter most are all rounded, the others sampled.

A tied embedding is used twice. As head, row v's error costs 1/2 E[p_v (1 - p_v)] e H e^T over final hidden states; as
table, 1/2 f_v e M e^T with f_v the token's frequency and M = E[g g^T] over gradients of its output (of Gemma 4's table of
inputs to every layer, M's diagonal). An expert that the text does not reach is taken for as sensitive as the others of its layer.

Two passes over the windows: one through the whole model, forward and backward, for G; one layer by layer for H.
Correlations between modules and between tokens are left out, so sums over modules predict measured KL to within a factor
and rank formats well. Sources: Hassibi and Stork 1993 (optimal brain surgeon); Frantar and Alistarh 2022 (pivots as the
price of rounding); the factorization over inputs and outputs is Martens and Grosse's K-FAC, 2015.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.quantizing.clipping import clipped_grid
from compress.quantizing.gptq import activation_order, factorize
from compress.quantizing.grid import TABLE
from compress.layerwise import Walk, fast_forward, fast_matmul, second_moment
from models.checkpoint import Checkpoint, load_decoder
from models.formats.safetensors_file import save_tensors
from models.network.config import ModelConfig
from models.network.decoder import tensor_shapes
from models.network.quantized import TensorFormat
from models.progress import progress
from models.training.memory import PROCESS_BYTES
from runtime.errors import UserError
from runtime.files import new_file, parse_json

VERSION = 1
EXPERT = re.compile(r"\.experts\.\d+")
TOP_ROWS, SAMPLED_ROWS = 48, 64
HEAD_ROWS = 512                    # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Sensitivity:
    """damage: module -> format -> nats a token. vocabulary: Hessian [hidden, hidden] of the embedding and of the head."""

    damage: dict[str, dict[TensorFormat, float]]
    vocabulary: dict[str, Tensor]
    checkpoint: str                # sha256 of what was measured

    def save(self, file: Path) -> None:
        table = {module: [asdict(form) | {"damage": value} for form, value in row.items()] for module, row in self.damage.items()}
        header = {"version": VERSION, "checkpoint": self.checkpoint, "damage": table}
        with new_file(file) as partial:
            save_tensors(partial, self.vocabulary, {"sensitivity": json.dumps(header)})

    @classmethod
    def load(cls, file: Path, checkpoint: str) -> Sensitivity:
        """Raises UserError where the file is none, or was measured on another checkpoint."""
        if not Path(file).is_file():                     # a FIFO would be waited for
            raise UserError(f"{file} is not a sensitivity file: remove it to measure again")
        try:
            with safe_open(file, "pt") as opened:
                header = parse_json((opened.metadata() or {})["sensitivity"])
                vocabulary = {module: opened.get_tensor(module) for module in opened.keys()}
            same = header["version"] == VERSION and header["checkpoint"] == checkpoint
            damage = {module: {TensorFormat(row["bits"], row["group"], row["symmetric"]): float(row["damage"]) for row in rows}
                      for module, rows in header["damage"].items()}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{file} is not a sensitivity file ({error}): remove it to measure again") from None
        if not same:
            raise UserError(f"{file} was measured on another checkpoint or by another version: remove it to measure again")
        return cls(damage, vocabulary, checkpoint)


def measure_sensitivity(checkpoint: Checkpoint, ids: Tensor, formats: list[TensorFormat], seed: int = 0) -> Sensitivity:
    """Damage of every format that fits, for every module. ids: int64 [windows, tokens]."""
    gradients, vocabulary = output_gradients(checkpoint, ids, seed)
    damage: dict[str, dict[TensorFormat, float]] = {}
    generator = torch.Generator().manual_seed(seed)
    walk, modules = Walk(checkpoint, ids), checkpoint.modules()
    for number, layer in walk.layers("sensitivity"):
        def visit(names: list[str], inputs: list[Tensor]) -> None:
            wanted = [(name, module) for name in names if (module := f"model.layers.{number}.{name}") in modules]
            price = pivots(second_moment(inputs)) if wanted else None
            for name, module in wanted:
                damage[module] = _damage(layer.get_submodule(name).weight, gradients[module], price, formats, generator)
        walk.step(layer, visit)
    if checkpoint.config.per_layer_size:
        table, projection = "model.per_layer_embed", "model.per_layer_projection"
        used = torch.bincount(ids.flatten(), minlength=checkpoint.config.vocab_size) / ids.numel()
        damage[table] = _damage(checkpoint.read(f"{table}.weight"), used, gradients[table], formats, generator)
        price = pivots(second_moment([checkpoint.weight("model.embed_tokens")[ids]]))
        damage[projection] = _damage(checkpoint.weight(projection), gradients[projection], price, formats, generator)
    fitted = {}
    for module, uses in vocabulary.items():
        # A tied table has two uses, and one set of codes: their Hessians add up, weighted as the average row is.
        fitted[module] = sum(weights.mean() * hessian for weights, hessian in uses)
        rows = sum(weights / weights.mean() for weights, _ in uses) / len(uses)
        damage[module] = _damage(checkpoint.weight(module), rows, pivots(fitted[module]), formats, generator)
    return Sensitivity(damage, fitted, checkpoint.sha256())


def pivots(hessian: Tensor) -> Tensor:
    """What an error of one unit in each input costs once GPTQ has compensated it in the inputs that follow, [K]."""
    order = activation_order(hessian)
    factor, _ = factorize(hessian, order)
    result = torch.empty(len(order))
    result[order] = factor.diagonal() ** -2
    return result


def _damage(weight: Tensor, gradient: Tensor, price: Tensor, formats: list[TensorFormat], generator) -> dict[TensorFormat, float]:
    """1/2 sum_o gradient[o] sum_k price[k] e[o, k]^2 for each format whose group divides the inputs."""
    parts = weight.split(max(1, TABLE // weight.shape[1]))
    rest = gradient * torch.cat([part.float().square() @ price for part in parts])        # proportional to the damage, roughly
    rows = rest.topk(min(TOP_ROWS, len(rest))).indices
    rest[rows] = 0
    factors = torch.ones(len(rows))
    if rest.sum() > 0:
        drawn = torch.multinomial(rest, SAMPLED_ROWS, replacement=True, generator=generator)
        rows = torch.cat((rows, drawn))
        factors = torch.cat((factors, rest.sum() / (rest[drawn] * SAMPLED_ROWS)))
    sample = weight[rows].float()
    result = {}
    for form in formats:
        if form.group and weight.shape[1] % form.group:
            continue
        grid = clipped_grid(sample, form, price)
        error = grid.values(grid.codes(sample)).sub_(sample)
        result[form] = 0.5 * float((factors * gradient[rows] * (error.square() @ price)).sum())
    return result


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes a parameter with which the whole model is held: 2 where it is stored in 16 bits, and then in bfloat16."""
    return 4 if checkpoint.dtype("model.embed_tokens.weight") == "F32" else 2


def output_gradients(checkpoint: Checkpoint, ids: Tensor, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, list]]:
    """G[o] of every linear, and for the embedding and the head pairs (weight of each row, Hessian of its inputs)."""
    dtype = torch.float32 if stored_bytes(checkpoint) == 4 else torch.bfloat16
    decoder = load_decoder(checkpoint.path, dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    head = (decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head).weight.float()
    (vocabulary, hidden_size), cap = head.shape, decoder.config.logits_softcap
    squares, spread = defaultdict(float), torch.zeros(vocabulary)
    inputs, outputs = torch.zeros(hidden_size, hidden_size), torch.zeros(hidden_size, hidden_size)

    def on_linear(name):
        def keep(gradient):
            squares[name] = squares[name] + gradient.flatten(0, -2).float().square().sum(0)

        def hook(module, arguments, output):
            output.requires_grad_().register_hook(keep)
        return hook

    def on_table(module, arguments, output):
        def keep(gradient):
            outputs.addmm_(gradient[0].float().T, gradient[0].float())
        output.requires_grad_().register_hook(keep)

    linears = {f"model.{name}" for name, module in decoder.model.named_modules()
               if isinstance(module, nn.Linear) or name == "per_layer_embed"}
    for name in linears:
        decoder.get_submodule(name).register_forward_hook(on_linear(name))
    decoder.model.embed_tokens.register_forward_hook(on_table)
    with fast_matmul():
        for row in progress(ids, label="gradients", unit="window"):
            with fast_forward():
                hidden = decoder.model(row[None])[0].float()
            gradient = torch.empty_like(hidden)
            with torch.no_grad():
                inputs += hidden.T @ hidden
                for start in range(0, len(hidden), HEAD_ROWS):
                    part = slice(start, start + HEAD_ROWS)
                    logits, slope = hidden[part] @ head.T, 1.0
                    if cap is not None:
                        logits = cap * torch.tanh(logits / cap)
                        slope = 1 - (logits / cap).square()                     # of the cap
                    probabilities = torch.softmax(logits, -1)
                    spread += ((probabilities - probabilities.square()) * slope**2).sum(0)
                    drawn = torch.multinomial(probabilities, 1, generator=generator)
                    probabilities.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=torch.float32))
                    gradient[part] = (probabilities * slope) @ head
            hidden.backward(gradient)
    tokens = ids.numel()
    counts = torch.bincount(ids.flatten(), minlength=vocabulary).float()
    as_head = (spread / tokens, inputs / tokens)
    as_table = (counts / tokens, outputs / tokens)
    uses = {"model.embed_tokens": [as_table, as_head]} if decoder.lm_head is None else {
        "model.embed_tokens": [as_table], "lm_head": [as_head]}
    for name in linears - squares.keys():                       # an expert that no token has reached
        alike = [total for other, total in squares.items() if EXPERT.sub("", other) == EXPERT.sub("", name)]
        squares[name] = sum(alike) / len(alike)
    return {name: total / tokens for name, total in squares.items()}, uses


def gradient_bytes(config: ModelConfig, length: int, bytes_a_parameter: int) -> dict[str, int]:
    """Predicted peak memory by kind: the whole model, mapped from its file, and the activations of one window."""
    tokens = min(length, config.context_length)
    kept = sum(8 * config.hidden_size + 4 * layer.heads * config.head_size(layer)
               + 4 * config.state_shapes(layer).get("conv", (0,))[0]
               + 4 * (layer.mlp_size * max(layer.experts_per_token, 1) + layer.shared_size) for layer in config.layers)
    return {"weights": bytes_a_parameter * sum(math.prod(shape) for shape in tensor_shapes(config).values()),
            "activations": 4 * tokens * kept, "logits": 16 * tokens * config.vocab_size,
            "token table": 4 * config.vocab_size * config.hidden_size, "process": PROCESS_BYTES}
