"""What it costs to store each module in each format: an estimate in nats of KL divergence a token, measured once.

    found = measure_sensitivity(checkpoint, ids, formats)
    found.damage["model.layers.0.mlp.down_proj"][TensorFormat(4, 32)]          # nats a token

The second-order estimate of the KL divergence that an error dW of one linear causes is
    1/2 sum_o G[o] (dW H dW^T)[o, o],      G[o] = E[g_o^2],   H = E[x x^T],
g being the gradient at the linear's output (fisher.py), and x its input. GPTQ's error is known before GPTQ
runs: each rounding error e[o, k] is paid with the pivot d[k] of H (the rest is compensated), so the damage of a format is
    1/2 sum_o G[o] sum_k d[k] e[o, k]^2,
e from rounding to the nearest on the clipped grid. Rows that matter most are all rounded, the others sampled.

A tied embedding is used twice. As head, row v's error costs 1/2 E[p_v (1 - p_v)] e H e^T over final hidden states; as
table, 1/2 f_v e M e^T with f_v the token's frequency and M = E[g g^T] over gradients of its output (of Gemma 4's table of
inputs to every layer, M's diagonal).

Two passes over the windows: one through the whole model, forward and backward, for G (fisher.py); one layer by layer for H. Both
compute on the checkpoint's device. A cluster (compress/cluster.py) makes G window by window, and H and the damages by ranges of
layers, each walking the text to its first layer without looking: the same numbers, up to the order in which G's windows are added.
What is finished is kept in a work folder, from which a stopped run goes on.

Correlations between modules and between tokens are left out, so sums over modules predict measured KL to within a factor
and rank formats well. Sources: Hassibi and Stork 1993 (optimal brain surgeon); Frantar and Alistarh 2022 (pivots as the
price of rounding); the factorization over inputs and outputs is Martens and Grosse's K-FAC, 2015.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.cluster import Cluster, held
from compress.drawing import drawn
from compress.layerwise import Walk, second_moment
from compress.quantizing.clipping import clipped_grid
from compress.quantizing.gptq import activation_order, factorize
from compress.quantizing.grid import TABLE
from compress.quantizing.fisher import kept, output_gradients, seed_of
from models.checkpoint import CPU, Checkpoint, open_checkpoint
from models.formats.safetensors_file import save_tensors
from models.network.quantized import TensorFormat
from runtime.errors import UserError
from runtime.files import new_file, parse_json

VERSION = 3                     # 2: formats with levels and 8-bit scales; 3: tokens have weights
TOP_ROWS, SAMPLED_ROWS = 48, 64


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
            damage = {module: {TensorFormat(**{key: value for key, value in row.items() if key != "damage"}): float(row["damage"])
                               for row in rows} for module, rows in header["damage"].items()}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{file} is not a sensitivity file ({error}): remove it to measure again") from None
        if not same:
            raise UserError(f"{file} was measured on another checkpoint or by another version: remove it to measure again")
        return cls(damage, vocabulary, checkpoint)


def measure_sensitivity(checkpoint: Checkpoint, ids: Tensor, formats: list[TensorFormat], seed: int = 0, work: Path | None = None,
                        cluster: Cluster | None = None) -> Sensitivity:
    """Damage of every format that fits, for every module. ids: int64 [windows, tokens].

    work: a folder for what is finished; a run with the same arguments goes on from it. cluster: does the work."""
    gradients, vocabulary = output_gradients(checkpoint, ids, seed, work, cluster)
    layers, device = range(len(checkpoint.config.layers)), checkpoint.device

    def make(names: list[str]) -> Iterator[dict[str, Tensor]]:
        wanted = [int(name.partition("-")[2]) for name in names]
        if cluster is None:
            yield from layer_damages(checkpoint, ids, formats, gradients, seed, wanted)
            return
        there = partial(_damages_there, checkpoint.path.absolute(), ids, formats, seed)
        ranges = [part.tolist() for part in np.array_split(wanted, min(cluster.workers, max(1, len(wanted)))) if len(part)]
        for found in cluster.share(there, [(part, {name: g.cpu() for name, g in gradients.items() if _layer(name) in part})
                                           for part in ranges]):
            yield from found
    costs: dict[str, Tensor] = {}
    for found in kept(work, [f"layer-{number}" for number in layers], make):
        costs |= found
    generator = torch.Generator().manual_seed(seed_of(seed, len(layers)))
    if checkpoint.config.per_layer_size:
        table, projection = "model.per_layer_embed", "model.per_layer_projection"
        used = torch.bincount(ids.flatten(), minlength=checkpoint.config.vocab_size).to(device) / ids.numel()
        costs[table] = _damage(checkpoint.on(CPU).read(f"{table}.weight"), used, gradients[table], formats, generator)
        price = pivots(second_moment([checkpoint.weight("model.embed_tokens")[ids.to(device)]]))
        costs[projection] = _damage(checkpoint.weight(projection), gradients[projection], price, formats, generator)
    fitted = {}
    for module, uses in vocabulary.items():
        # A tied table has two uses, and one set of codes: their Hessians add up, weighted as the average row is.
        fitted[module] = sum(weights.mean() * hessian for weights, hessian in uses)
        rows = sum(weights / weights.mean() for weights, _ in uses) / len(uses)
        costs[module] = _damage(checkpoint.weight(module), rows, pivots(fitted[module]), formats, generator)
    damage = {module: {form: cost for form, cost in zip(formats, row.tolist()) if not math.isnan(cost)} for module, row in costs.items()}
    return Sensitivity(damage, {module: hessian.cpu() for module, hessian in fitted.items()}, checkpoint.sha256())


def layer_damages(checkpoint: Checkpoint, ids: Tensor, formats: list[TensorFormat], gradients: dict[str, Tensor], seed: int,
                  numbers: list[int]) -> Iterator[dict[str, Tensor]]:
    """For each layer of `numbers`, in order: module -> damage by format, float64 [formats], NaN where a format does not fit."""
    if not numbers:
        return
    modules, walk = set(checkpoint.modules()), Walk(checkpoint, ids)
    for number, layer in walk.layers("sensitivity"):
        found, generator = {}, torch.Generator().manual_seed(seed_of(seed, number))

        def visit(names: list[str], inputs: Sequence[Tensor]) -> None:
            wanted = [(name, module) for name in names if (module := f"model.layers.{number}.{name}") in modules]
            prices: dict[str, Tensor] = {}
            for name, module in wanted:
                weights = walk.token_weights(name)
                key = "" if weights is None else name
                if key not in prices:
                    prices[key] = pivots(second_moment(inputs, weights))
                found[module] = _damage(layer.get_submodule(name).weight, gradients[module], prices[key], formats, generator)
        walk.step(layer, visit if number in numbers else None)
        if number in numbers:
            yield {module: cost.cpu() for module, cost in found.items()}
        if number >= max(numbers):
            return


def _damages_there(path: Path, ids: Tensor, formats: list[TensorFormat], seed: int, piece: tuple[list[int], dict[str, Tensor]],
                   device: torch.device) -> list[dict[str, Tensor]]:
    """`layer_damages` by a worker of a cluster."""
    numbers, gradients = piece
    gradients = {name: gradient.to(device) for name, gradient in gradients.items()}
    return list(layer_damages(held(open_checkpoint, path).on(device), ids, formats, gradients, seed, numbers))


def _layer(module: str) -> int | None:
    """The layer's number of a module of one."""
    return int(module.split(".")[2]) if module.startswith("model.layers.") else None


def pivots(hessian: Tensor) -> Tensor:
    """What an error of one unit in each input costs once GPTQ has compensated it in the inputs that follow, [K]."""
    order = activation_order(hessian)
    factor, _ = factorize(hessian, order)
    result = torch.empty_like(hessian[0])
    result[order] = factor.diagonal() ** -2
    return result


def _damage(weight: Tensor, gradient: Tensor, price: Tensor, formats: list[TensorFormat], generator: torch.Generator) -> Tensor:
    """1/2 sum_o gradient[o] sum_k price[k] e[o, k]^2 for each format, float64 [formats]; NaN where a group does not divide the inputs.

    weight: on any device; the others on one. generator: of the CPU."""
    device, parts = price.device, weight.split(max(1, TABLE // weight.shape[1]))
    rest = gradient * torch.cat([part.to(device).float().square() @ price for part in parts])        # proportional to the damage, roughly
    rows = rest.topk(min(TOP_ROWS, len(rest))).indices
    rest[rows] = 0
    factors = torch.ones(len(rows), device=device)
    if len(rest) > TOP_ROWS:
        some = drawn(rest, torch.rand(SAMPLED_ROWS, generator=generator).to(device))
        rows = torch.cat((rows, some))
        factors = torch.cat((factors, (rest.sum() / (rest[some] * SAMPLED_ROWS)).nan_to_num(0.0)))       # of all zeros: none counts
    sample = weight[rows.to(weight.device)].to(device).float()
    result = torch.full((len(formats),), math.nan, dtype=torch.float64, device=device)
    for number, form in enumerate(formats):
        if form.group and weight.shape[1] % form.group:
            continue
        grid = clipped_grid(sample, form, price)
        error = grid.values(grid.codes(sample)).sub_(sample)
        result[number] = 0.5 * (factors * gradient[rows] * (error.square() @ price)).sum()
    return result
