"""The training loop that training, fine-tuning and distillation share.

    trainer = Trainer(module, options, train, valid, save, inputs)
    metrics = trainer.fit()

`train` and `valid` have `len()`, the `lengths` of their rows (None: all alike) and `rows(indices) -> (input_ids, labels,
...)` (int64 [r, s], labels IGNORE where there is no loss; then whatever else the loss wants), as
models.data.corpus.Blocks does. `save(module, folder, metrics)` writes the module (a copy with whole weights where its
own are sharded) as a checkpoint. `loss(module, *rows)` is a sum over labels, by default of negative log-likelihoods;
learned from is its mean over the labels of the whole global batch, however it is cut into micro-batches and processes,
in nats per token. `judge(module, *rows)` gives sums by name, "loss" among them; their means over the validation labels
are the metrics valid_NAME, and the lowest valid_loss is best. `rates(name)` is a parameter's share of the learning rate.

Devices, distribution and mixed precision are `accelerate`'s: `accelerate launch -m models.train ...` runs many
processes with DDP or FSDP (version 2), each on its share of every batch; losses equal one process's up to the order of
summation, and the state kept is the same. Without GPUs accelerate falls back from FSDP to DDP. On a CPU a run is
reproducible to the bit.
"""

import copy
import json
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.data.corpus import IGNORE, batch_indices
from models.training.optimizer import adamw, learning_rate
from models.progress import progress
from models.training.options import TrainerOptions
from models.training.state import (Stop, comparable, keep_metrics_until, load_state, load_tensors, noticed,
                                   save_state, told_of_the_disk, training_tensors, whole)
from runtime.errors import CheckFailed, UserError
from runtime.files import lock, new_folder, restored, tidy


class Rows(Protocol):
    lengths: np.ndarray | None           # tokens of each row; None where all are alike

    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]: ...


def _by_length(rows: Rows, indices: np.ndarray) -> np.ndarray:
    """The same rows, short ones first: micro-batches of rows alike hold little padding."""
    return indices if rows.lengths is None else indices[np.argsort(rows.lengths[indices], kind="stable")]


def summed_loss(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the labels, in nats; logits are made only where some row has a label.

    `model(input_ids, logits_positions=)` gives float32 logits.
    """
    columns = int((labels != IGNORE).sum(1).max())
    if columns < labels.shape[1]:
        order = (labels == IGNORE).to(torch.uint8).argsort(dim=1, stable=True)[:, :columns]
        logits, labels = model(input_ids, logits_positions=order), labels.gather(1, order)
    else:
        logits = model(input_ids)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def label_loss(model, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": summed_loss(model, input_ids, labels)}


def process_state() -> PartialState:
    """This process among those launched with it. Without a GPU (or with ACCELERATE_USE_CPU=true) they speak gloo."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class Trainer:
    def __init__(self, module: torch.nn.Module, options: TrainerOptions, train: Rows, valid: Rows,
                 save: Callable[[torch.nn.Module, Path, dict], None], inputs: dict[str, str], loss=summed_loss,
                 judge=label_loss, rates: Callable[[str], float] = lambda name: 1.0):
        self.options, self.train, self.valid, self.save_module, self.inputs = options, train, valid, save, inputs
        self.loss, self.judge = loss, judge
        check_options(options)
        process_state()                              # before Accelerator, which would not look for gloo
        AcceleratorState._reset_state()              # a trainer before this one may have had another precision
        self.accelerator = Accelerator(mixed_precision=mixed_precision(options.precision))
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:
            self._check_sharded()
        self.processes = self.accelerator.num_processes
        if options.batch % self.processes:
            raise UserError(f"--batch {options.batch} does not divide among {self.processes} processes")
        self.module, self.optimizer = module, adamw(module, options.weight_decay, rates)
        self.whole = copy.deepcopy(module) if self.sharded and self.accelerator.is_main_process else module
        if options.checkpointing:
            _checkpoint_layers(module)
        model = torch.compile(module) if options.compile else module
        self.model, self.prepared = self.accelerator.prepare(model, self.optimizer)
        self.step, self.best, self.bad_evaluations = 0, math.inf, 0
        self.evaluated = 0                           # the step of the last evaluation
        self.stop = Stop()
        self.saved: int | None = None                # the step that last/ holds
        self.first_loss: float | None = None         # validation loss before the first step; None where resumed
        self.board: SummaryWriter | None = None
        with self.accelerator.main_process_first():
            begun, kept = (options.out / "logs").exists(), restored(options.out / "last").exists()
        if options.resume and (kept or not begun):   # stopped before it saved anything: it starts again
            self._resume()
        elif options.resume:
            print(f"{options.out} holds a run that was stopped before it saved anything: it starts again")
        elif kept:
            raise UserError(f"{options.out} already holds a run; continue it with --resume or choose another -o")
        self.accelerator.wait_for_everyone()         # no process writes there before all have looked

    def fit(self) -> dict:
        """Train to the last step or until patience ends; returns the last evaluation's metrics.

        Ctrl-C or SIGTERM ends it after the step that runs: last/ is written, and KeyboardInterrupt or SystemExit raised.
        Raises CheckFailed at the first loss or gradient that is not finite, naming the step and the batch's rows, and
        UserError where another run writes the same folder.
        """
        with lock(self.options.out) if self.accelerator.is_main_process else nullcontext(), noticed() as self.stop, \
                told_of_the_disk(self.options.out):
            try:
                return self._fit()
            except (KeyboardInterrupt, SystemExit):
                if self.stop.signal is not None and not self.stop.hurried:
                    self._save_stopped()
                raise

    def _fit(self) -> dict:
        options = self.options
        if self.accelerator.is_main_process:
            options.out.mkdir(parents=True, exist_ok=True)
            for name in ("best", "last"):
                tidy(options.out / name)
            keep_metrics_until(options.out / "metrics.jsonl", self.step if self.saved is not None else -1)
            self.board = SummaryWriter(options.out / "logs", purge_step=self.step)
        if self.step:
            metrics = {"valid_loss": self.best}
        else:
            metrics = self._evaluate()
            self.first_loss = metrics["valid_loss"]
        bar = progress(total=options.steps, initial=self.step, label="train", unit="step",
                       quiet=not self.accelerator.is_main_process)
        with bar:
            while True:
                due = self.step and (self.step % options.eval_every == 0 or self.step == options.steps)
                if due and self.evaluated != self.step:
                    metrics = self._evaluate()
                    self._save(metrics)
                if self.step >= options.steps or options.patience is not None and self.bad_evaluations >= options.patience:
                    break
                if self._asked_to_stop():
                    self.stop.leave()
                start = time.perf_counter()
                loss, norm, tokens = self.train_step()
                speed = tokens / (time.perf_counter() - start)
                self._log("train", loss=loss, learning_rate=self._rate(self.step - 1), gradient_norm=norm, tokens_per_s=speed)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{self.best:.3f}", tokens_per_s=f"{speed:.0f}", refresh=False)
        if self.board:
            self.board.close()
        return metrics

    def _asked_to_stop(self) -> bool:
        """The same answer in all processes, which are at the same step."""
        if self.processes > 1:
            asked = torch.tensor(float(self.stop.signal or 0), device=self.accelerator.device)
            if self.stop.signal is None and float(self._sum(asked)):
                self.stop.signal = signal.SIGTERM
        return self.stop.signal is not None

    def _save_stopped(self) -> None:
        if self.step > (self.saved or 0):
            self._save({})
        if self.accelerator.is_main_process:
            kept = f"{self.options.out / 'last'} keeps step {self.saved}: --resume continues" if self.saved else \
                "nothing was learned yet: the same command starts again"
            tqdm.write(f"stopped; {kept}", file=sys.stderr)

    def train_step(self) -> tuple[float, float, int]:
        """One update. Returns (mean loss, gradient norm before clipping, tokens of the global batch)."""
        options, accelerator = self.options, self.accelerator
        indices = batch_indices(len(self.train), options.batch, options.seed, self.step)
        share = len(indices) // self.processes
        mine = _by_length(self.train, indices[accelerator.process_index * share:][:share])
        pieces = [mine[i:i + options.micro_batch] for i in range(0, share, options.micro_batch)]
        batches = [self.tensors(self.train.rows(piece)) for piece in pieces]
        count = self._sum(sum((labels != IGNORE).sum() for _, labels, *_ in batches))
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model), accelerator.autocast():
                loss = self.loss(self.model, *batch)
                accelerator.backward(loss * (self.processes / count))        # DDP averages over the processes
            total += loss.detach()
        loss = float(self._sum(total) / count)
        norm = float(accelerator.clip_grad_norm_(self.module.parameters(), options.clip))
        scaled = accelerator.scaler is not None                              # fp16: an overflow only skips a step
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
            raise self._diverged(f"loss {loss} and gradient norm {norm} at step {self.step + 1}, in the batch of rows "
                                 f"{', '.join(map(str, indices))}")
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step) * group["rate"]
        self.prepared.step()
        self.prepared.zero_grad()
        self.step += 1
        return loss, norm, sum(batch[0].numel() for batch in batches) * self.processes

    def _rate(self, step: int) -> float:
        options = self.options
        return learning_rate(step, steps=options.steps, warmup=options.warmup, peak=options.learning_rate,
                             schedule=options.schedule, floor=options.floor, decay_share=options.decay_share)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means, by name, of what `judge` sums over the labels of the first `eval_rows` validation rows."""
        count = len(self.valid) if self.options.eval_rows == 0 else min(len(self.valid), self.options.eval_rows)
        if self.sharded:                             # layers are gathered together: all run as many batches
            count -= count % self.processes
        mine = _by_length(self.valid, np.arange(self.accelerator.process_index, count, self.processes))
        if count < self.processes:
            raise UserError(f"{count} validation rows are too few for {self.processes} processes: give more, or raise --eval-rows")
        zero = partial(torch.zeros, (), device=self.accelerator.device, dtype=torch.float64)
        totals: dict[str, torch.Tensor] = defaultdict(zero)
        self.module.eval()
        for start in range(0, len(mine), self.options.micro_batch):
            batch = self.tensors(self.valid.rows(mine[start:start + self.options.micro_batch]))
            with self.accelerator.autocast():
                for name, total in self.judge(self.module, *batch).items():
                    totals[name] += total
            totals["labels"] += (batch[1] != IGNORE).sum()
        self.module.train()
        labels = self._sum(totals.pop("labels"))
        return {name: float(self._sum(total) / labels) for name, total in totals.items()}

    def tensors(self, rows: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        """(input_ids, labels, ...) on this process's device."""
        return [torch.from_numpy(part).to(self.accelerator.device) for part in rows]

    def _sum(self, value):
        return self.accelerator.reduce(value, "sum") if self.processes > 1 else value

    def _evaluate(self) -> dict:
        self.stop.at_once = self.processes == 1
        if self.stop.at_once and self.stop.signal is not None:
            self.stop.leave()
        means = self.validate()
        self.stop.at_once, self.evaluated = False, self.step
        loss = means["loss"]
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss} after step {self.step}")
        self.bad_evaluations = 0 if loss < self.best else self.bad_evaluations + 1
        metrics = {f"valid_{name}": mean for name, mean in means.items()}
        metrics["valid_perplexity"] = math.exp(means.get("nll", loss))
        self._log("valid", **metrics)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"step {self.step}: {shown}", file=sys.stderr)
        return metrics

    def _diverged(self, what: str) -> CheckFailed:
        kept = "nothing was saved yet" if self.saved is None else f"{self.options.out / 'last'} keeps step {self.saved}"
        return CheckFailed(f"{what}; {kept}. Lower --learning-rate, or look at those rows")

    def _log(self, kind: str, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.options.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, self.step)

    def _save(self, metrics: dict) -> None:
        """Write last/ with the state to continue from, and best/ where the loss is the lowest yet."""
        better = metrics.get("valid_loss", math.inf) < self.best
        if better:
            self.best = metrics["valid_loss"]
        if self.sharded:                             # state_dict() also shards again what validation left whole
            weights = {name: whole(tensor) for name, tensor in self.module.state_dict().items()}
            if self.accelerator.is_main_process:
                self.whole.load_state_dict(weights)
        tensors, updates = training_tensors(self.module, self.optimizer)
        scaler = self.accelerator.scaler
        state = {"step": self.step, "updates": updates, "best": self.best, "bad_evaluations": self.bad_evaluations,
                 "evaluated": self.evaluated, "loss_scale": scaler.state_dict() if scaler else None,
                 "options": comparable(self.options), "inputs": self.inputs}
        if self.accelerator.is_main_process:
            try:
                if better:
                    with new_folder(self.options.out / "best") as folder:
                        self.save_module(self.whole, folder, metrics)
                with new_folder(self.options.out / "last") as folder:
                    self.save_module(self.whole, folder, metrics)
                    save_state(folder, tensors, state)
            except UserError as error:
                raise UserError(f"{error}. Free some space and continue with --resume") from None
        self.accelerator.wait_for_everyone()
        self.saved = self.step

    def _check_sharded(self) -> None:
        if not self.accelerator.is_fsdp2:
            raise UserError("FSDP's first version is not supported: launch with --fsdp_version 2")
        if self.options.compile or self.judge is not label_loss:
            raise UserError("FSDP does not go with --compile, nor with distillation: leave it out, or launch with DDP")

    def _resume(self) -> None:
        with self.accelerator.main_process_first():
            state = load_state(self.options.out, self.options, self.inputs)
        if state is None:
            raise UserError(f"{self.options.out}: no run to resume there; leave --resume out to start one")
        load_tensors(self.options.out, self.module, self.optimizer, state["updates"])
        if state["loss_scale"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        self.step = self.saved = state["step"]
        self.best, self.bad_evaluations = state["best"], state["bad_evaluations"]
        self.evaluated = state.get("evaluated", self.step)


def check_options(options: TrainerOptions) -> None:
    """Raises UserError for a warm-up longer than the run, whose length may have been derived."""
    if not 0 <= options.warmup <= options.steps:
        raise UserError(f"--warmup {options.warmup}: give a number from 0 to --steps {options.steps}")


def has_bf16() -> bool:
    """Whether the GPU, or where there is none the CPU, multiplies in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def mixed_precision(asked: str) -> str:
    """accelerate's name for the precision, refused where the device does not compute in it.

    A CPU's AMX tiles make bf16 worth choosing unasked; AVX-512's bf16 instructions alone may be slower than fp32.
    """
    cuda, bf16 = torch.cuda.is_available(), has_bf16()
    if asked == "fp16" and not cuda:
        raise UserError("--precision fp16 needs a GPU; this machine has none: use fp32")
    if asked == "bf16" and not bf16:
        raise UserError("--precision bf16: this device does not compute in bf16: use fp32")
    fast = bf16 and (cuda or torch.cpu.get_capabilities().get("amx_bf16"))
    return {"auto": "bf16" if fast else "no", "fp32": "no"}.get(asked, asked)


def _checkpoint_layers(module: torch.nn.Module) -> None:
    """Make every layer forget its activations and compute them again in the backward pass (Chen et al. 2016)."""
    layers = next((m for name, m in module.named_modules() if name.split(".")[-1] == "layers"), ())
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
