"""Every layer by itself, the first one first: its quantized weights are trained until it gives what the original layer gives.

    trained = train_layers(checkpoint, teacher, ids, left, held, options, state, work)

Two streams of the same text walk through two models (compress/layerwise.py): through the original in full precision, and through
the quantized one as far as it is trained. A layer reads the second and is to give the first after the layer, so it also mends
what the layers before it have left; its error is the squared distance in units of the token's own size, because the norm that
reads the stream next sees no other. The trainer is that of all (models/training/trainer.py), the layer's loss its module.

A layer that windows set aside say is no nearer keeps what it had. What a finished layer has learned is kept in `work`, so
that a run that was stopped goes on with the next layer and comes to the same bytes. Memory: one layer in training and the
activations of all windows.

Sources: Li et al. 2021, "BRECQ"; Chen et al. 2024, "EfficientQAT" (its first phase).
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.activations import Parts
from compress.distilling.taught import MICRO_TOKENS
from compress.layerwise import Walk
from compress.recovering.coded import CodedLinear, coded, rates
from models.checkpoint import Checkpoint
from models.formats.safetensors_file import save_tensors
from models.network.decoder import Layer
from models.training.feed import Rows
from models.training.trainer import Trainer
from runtime.errors import CheckFailed
from runtime.files import new_file, restored

SMALLEST = 1e-12              # |target|^2: a token of zeros


class _Near(nn.Module):
    """How far a layer in training is from what it should give, for windows of the walk."""

    def __init__(self, layer: Layer, walk: Walk, targets: Tensor):
        super().__init__()
        self.layer, self.device, self._walk = layer, walk.device, (walk, targets)

    def forward(self, windows: Tensor) -> Tensor:
        """Sum over tokens of |made - target|^2 / |target|^2."""
        walk, targets = self._walk
        x, target = (Parts(home, len(windows), walk.device, windows)[0] for home in (walk.x.home, targets))
        made = self.layer(x, walk.told(self.layer, windows))
        return ((made - target).square().sum(-1) / target.square().sum(-1).clamp_min(SMALLEST)).sum()

    @torch.no_grad()
    def judge(self, windows: Tensor) -> dict[str, Tensor]:
        return {"loss": self(windows)}


class _Chosen:
    """Some windows of the walk as a trainer reads them: (ids, labels, their numbers); every token counts."""

    lengths = None

    def __init__(self, ids: Tensor, chosen: np.ndarray):
        self.ids, self.chosen = ids.numpy(), chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        windows = self.chosen[indices]
        return self.ids[windows], np.zeros_like(self.ids[windows]), windows


def train_layers(checkpoint: Checkpoint, teacher: Checkpoint, windows: Rows, left: np.ndarray, held: np.ndarray, options,
                 state: PartialState, work: Path) -> dict[str, Tensor]:
    """What the layers of a quantized checkpoint have learned: parameters by the names of the whole network.

    Of the text's windows, `left` are learned from and `held` judged on. options: of the run, whose block_steps and
    block_rate are the layers'. Raises CheckFailed at a loss that is not finite, naming the layer.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"layer-{number:03}.safetensors" for number in range(len(checkpoint.config.layers))]
    if all(file.exists() for file in files):
        return {f"model.layers.{number}.{name}": tensor for number, file in enumerate(files) for name, tensor in load_file(file).items()}
    checkpoint, teacher = checkpoint.on(state.device), teacher.on(state.device)
    ids = torch.from_numpy(windows.rows(np.concatenate((left, held)))[0])
    sides = np.split(np.arange(len(ids)), [len(left)])
    walk, aim, learned = Walk(checkpoint, ids), Walk(teacher, ids), {}
    for number, layer in walk.layers("layers"):
        aim.step(aim.load(number))
        file, training, prefix = files[number], walk.load(number), f"model.layers.{number}."
        coded(training, checkpoint, prefix, teacher)
        training.to(state.device)
        if not file.exists():
            try:
                _train(_Near(training, walk, aim.x.home), *(_Chosen(ids, side) for side in sides), options, work / file.stem)
            except CheckFailed as error:
                raise CheckFailed(f"layer {number} by itself: {str(error).partition(';')[0]}; layers before it are kept. Lower --block-rate "
                                  f"and give the same command again") from None
            if state.is_main_process:
                with new_file(file) as partial:
                    save_tensors(partial, {name: p.detach().cpu() for name, p in training.named_parameters() if p.requires_grad})
                shutil.rmtree(work / file.stem)
            state.wait_for_everyone()
        kept = load_file(file)
        training.load_state_dict(kept, strict=False)
        learned |= {prefix + name: tensor for name, tensor in kept.items()}
        walk.step(_frozen(layer, training))
    return learned


def _train(near: _Near, train: _Chosen, valid: _Chosen, options, out: Path) -> None:
    """Train one layer, or leave it as it was where the windows set aside say that it is no better."""
    micro = min(options.batch, max(1, MICRO_TOKENS // valid.ids.shape[1])) if near.device.type == "cpu" else options.batch
    options = replace(options, out=out, micro_batch=options.micro_batch or micro, steps=options.block_steps, warmup=options.block_steps // 20, eval_every=options.block_steps,
                      resume=restored(out / "last").exists())
    before = {name: p.detach().clone() for name, p in near.named_parameters() if p.requires_grad}
    trainer = Trainer(near, options, train, valid, lambda module, folder, metrics: None, {}, loss=lambda module, *rows: module(*rows),
                      judge=lambda module, *rows: module.judge(*rows), pack=lambda rows: rows[2:],
                      rates=rates(options.learning_rate, options.block_rate))
    trainer.fit()
    if trainer.best >= trainer.first_loss:
        near.load_state_dict(before, strict=False)


def _frozen(layer: Layer, training: Layer) -> Layer:
    """The layer as a checkpoint will have it, in plain weights."""
    for name, module in training.named_modules():
        if isinstance(module, CodedLinear):
            layer.get_submodule(name).weight.data = module.frozen().to(module.scales.device).dequantize()
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            layer.get_submodule(name).load_state_dict(module.state_dict())
    return layer
