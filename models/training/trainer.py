"""The training loop that training, fine-tuning and distillation share.

    trainer = Trainer(module, options, train, valid, save, inputs)
    metrics = trainer.fit()

`train` and `valid` have `len()`, the `lengths` of their rows (None: all alike) and `rows(indices) -> (input_ids, labels,
...)` (int64 [r, s], labels IGNORE where there is no loss; then whatever else the loss wants), as
models.data.corpus.Blocks does. `save(module, folder, metrics)` writes the module (a copy with whole weights where its
own are sharded) as a checkpoint. `loss(module, *rows)` is a sum over labels, by default of negative log-likelihoods;
learned from is its mean over the labels of the whole global batch, however it is cut into micro-batches and processes,
in nats per token. `judge(module, *rows)` gives sums by name, "loss" among them; their means over the validation labels
are the metrics valid_NAME, and the lowest valid_loss is best. `pack(rows)` makes, on the host, of a micro-batch's rows what
both are given (losses.py). `rates(name)` is a parameter's share of the learning rate.

A step waits for nothing on a GPU: labels are counted on the host, the next batch is prepared meanwhile (feed.py), and what came of
a step is read when the next one is queued. One that is not finite changes no weight, because the optimizer is told so on the device; the
run ends when the host reads it. Until the first update is made, memory that does not suffice halves the micro-batch.

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
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.device import smaller, told_of_the_device
from models.progress import progress
from models.training.feed import Batch, Feed, Rows, cut, labels_of, later, send
from models.training.losses import label_columns, label_loss, summed_loss
from models.training.optimizer import begin, learning_rate, optimizer
from models.training.options import TrainerOptions
from models.training.placement import mixed_precision, process_state
from models.training.state import (Stop, comparable, keep_metrics_until, load_state, load_tensors, noticed,
                                   save_state, told_of_the_disk, training_tensors, whole)
from runtime.errors import CheckFailed, UserError
from runtime.files import lock, new_folder, restored, tidy


# Tokens x parameters that a device computes while the host tells it of one micro-batch, by calculation: some 6,000 kernels of 5
# microseconds; 6 operations a token and parameter, of 200 teraflops. For 135M parameters 7,000 tokens, for 7B 140.
BEGUN = 10**12


@dataclass(frozen=True)
class Update:
    """An update that the device was told to make: of which rows, and how to read what came of it."""

    step: int                            # its number, from 1 on
    indices: np.ndarray                  # rows of the whole batch
    tokens: int                          # of the whole batch, padding among them
    read: Callable[[], list[float]]      # mean loss, gradient norm before clipping, and of several processes how many were asked to stop


class Trainer:
    def __init__(self, module: torch.nn.Module, options: TrainerOptions, train: Rows, valid: Rows,
                 save: Callable[[torch.nn.Module, Path, dict], None], inputs: dict[str, str], loss=summed_loss,
                 judge=label_loss, pack=label_columns, rates: Callable[[str], float] = lambda name: 1.0):
        self.options, self.train, self.valid, self.save_module, self.inputs = options, train, valid, save, inputs
        self.loss, self.judge, self.pack = loss, judge, pack
        self.of_text = judge is label_loss           # the validation loss is the text's cross-entropy
        check_options(options)
        device = process_state(options.device).device    # before Accelerator, which would not look for gloo
        AcceleratorState._reset_state()              # a trainer before this one may have had another precision
        self.accelerator = Accelerator(mixed_precision=mixed_precision(options.precision, device))
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:
            self._check_sharded()
        self.processes = self.accelerator.num_processes
        if options.batch % self.processes:
            raise UserError(f"--batch {options.batch} does not divide among {self.processes} processes")
        with told_of_the_device(device):
            self.module = module if self.sharded else module.to(device)
        self.optimizer = optimizer(module, options, rates)
        self.whole = copy.deepcopy(module) if self.sharded and self.accelerator.is_main_process else module
        if options.checkpointing:
            _checkpoint_layers(module)
        model = torch.compile(module) if options.compile else module
        self.model, self.prepared = self.accelerator.prepare(model, self.optimizer)
        begin(self.optimizer)
        self.late = int(device.type != "cpu")        # steps that are told of late, for the device not to wait
        begun = 0 if self.sharded or not self.late else BEGUN // sum(parameter.numel() for parameter in module.parameters())
        self.feed = Feed(train, pack, options, self.processes, self.accelerator.process_index, self.late > 0, begun)
        self.micro, self.fits = self._alike(options.micro_batch), False      # fits: an update was made with so many rows at once
        self.untold: deque[Update] = deque()
        self.step, self.best, self.bad_evaluations = 0, math.inf, 0
        self.evaluated = 0                           # the step of the last evaluation
        self.stop, self.agreed = Stop(), False       # agreed: of several processes, that one was asked to stop
        self.told = 0.0                              # when the last update was told of
        self.saved: int | None = None                # the step that last/ holds
        self.first_loss: float | None = None         # validation loss before the first step
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
                told_of_the_disk(self.options.out), told_of_the_device(self.accelerator.device):
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
            self.told = time.perf_counter()
            while True:
                due = self.step and (self.step % options.eval_every == 0 or self.step == options.steps)
                if due and self.evaluated != self.step:
                    self._tell(bar)
                    metrics = self._evaluate()
                    self._save(metrics)
                    self.told = time.perf_counter()
                if self.step >= options.steps or options.patience is not None and self.bad_evaluations >= options.patience:
                    break
                if self.agreed if self.processes > 1 else self.stop.signal is not None:
                    self._tell(bar)
                    self.stop.leave()
                self.untold.append(self.train_step())
                self._tell(bar, self.late)
        if self.board:
            self.board.close()
        return metrics

    def _tell(self, bar, late: int = 0) -> None:
        """Log the updates made so far but for the last `late`. Raises CheckFailed for one that was not finite, and so not made."""
        while len(self.untold) > late:
            update = self.untold.popleft()
            loss, norm, *asked = update.read()
            scaled = self.accelerator.scaler is not None                     # fp16: an overflow only skips a step
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
                raise self._diverged(f"loss {loss} and gradient norm {norm} at step {update.step}, in the batch of rows "
                                     f"{', '.join(map(str, update.indices))}")
            if any(asked):
                self.agreed, self.stop.signal = True, self.stop.signal or signal.SIGTERM
            now = time.perf_counter()
            speed, self.told = update.tokens / (now - self.told), now
            self._log("train", update.step, loss=loss, learning_rate=self._rate(update.step - 1), gradient_norm=norm, tokens_per_s=speed)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", best=f"{self.best:.3f}", tokens_per_s=f"{speed:.0f}", refresh=False)

    def _save_stopped(self) -> None:
        if self.step > (self.saved or 0):
            self._save({})
        if self.accelerator.is_main_process:
            kept = f"{self.options.out / 'last'} keeps step {self.saved}: --resume continues" if self.saved else \
                "nothing was learned yet: the same command starts again"
            tqdm.write(f"stopped; {kept}", file=sys.stderr)

    def train_step(self) -> Update:
        """Have the device make one update. Nothing of it is waited for; one whose loss or gradient is not finite changes nothing."""
        if self.fits or self.processes > 1:
            batch, loss = self._gradients(self.micro)
        else:                                        # as long as nothing was learned, smaller pieces may be tried
            (batch, loss), self.micro = smaller(self.micro, self._gradients)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.options.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.accelerator.scaler is None:          # which looks for itself; nothing is changed where this is not 0
            self.optimizer.found_inf = 1 - (loss[0].isfinite() & norm.isfinite()).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step) * group["rate"]
        self.prepared.step()
        self.prepared.zero_grad()
        self.step, self.fits = self.step + 1, True
        return Update(self.step, batch.indices, batch.tokens * self.processes, later(torch.cat((loss[:1], norm[None], loss[1:]))))

    def _gradients(self, micro: int) -> tuple[Batch, torch.Tensor]:
        """The step's batch, run `micro` rows at once, and its mean loss [1]; of several processes also the number of the signals
        they were sent."""
        if not self.fits:                            # what a larger piece, for which memory did not suffice, left behind
            self.prepared.zero_grad()
        accelerator, device = self.accelerator, self.accelerator.device
        batch = self.feed.batch(self.step, micro)
        count = self._sum(torch.full((), batch.labels, device=device))
        share, total = self.processes / count, torch.zeros((), device=device)         # DDP averages over the processes
        for number, piece in enumerate(batch.pieces):
            last = number == len(batch.pieces) - 1
            with nullcontext() if last else accelerator.no_sync(self.model), accelerator.autocast():
                loss = self.loss(self.model, *self.tensors(piece))
                accelerator.backward(loss * share)
            total += loss.detach()
        if self.processes == 1:
            return batch, (total / count)[None]
        sums = self._sum(torch.stack((total, torch.full((), float(self.stop.signal or 0), device=device))))
        return batch, torch.stack((sums[0] / count, sums[1]))

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
        mine = np.arange(self.accelerator.process_index, count, self.processes)
        if count < self.processes:
            raise UserError(f"{count} validation rows are too few for {self.processes} processes: give more, or raise --eval-rows")
        self.module.eval()
        if self.fits or self.processes > 1:
            totals = self._judged(mine, self.micro)
        else:
            totals, self.micro = smaller(self.micro, partial(self._judged, mine))
        self.module.train()
        labels = self._sum(totals.pop("labels"))
        return {name: float(self._sum(total) / labels) for name, total in totals.items()}

    def _judged(self, indices: np.ndarray, micro: int) -> dict[str, torch.Tensor]:
        zero = partial(torch.zeros, (), device=self.accelerator.device, dtype=torch.float64)
        totals: dict[str, torch.Tensor] = defaultdict(zero)
        for part in cut(self.valid, indices, micro):
            rows = self.valid.rows(part)
            with self.accelerator.autocast():
                for name, total in self.judge(self.module, *self.tensors(self.pack(rows))).items():
                    totals[name] += total
            totals["labels"] += labels_of(rows)
        return totals

    def tensors(self, rows: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        """(input_ids, labels, ...) on this process's device."""
        return [send(part, self.accelerator.device) for part in rows]

    def _alike(self, micro: int) -> int:
        """The least of all processes': layers that are gathered together are run as often by each."""
        if self.processes > 1:
            least = torch.tensor(micro, device=self.accelerator.device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            micro = int(least)
        return micro

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
        if "nll" in means or self.of_text:
            metrics["valid_perplexity"] = math.exp(means.get("nll", loss))
        self._log("valid", self.step, **metrics)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"step {self.step}: {shown}", file=sys.stderr)
        return metrics

    def _diverged(self, what: str) -> CheckFailed:
        kept = "nothing was saved yet" if self.saved is None else f"{self.options.out / 'last'} keeps step {self.saved}"
        return CheckFailed(f"{what}; {kept}. Lower --learning-rate, or look at those rows")

    def _log(self, kind: str, step: int, **values: float) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.options.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

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
                 "evaluated": self.evaluated, "first_loss": self.first_loss, "loss_scale": scaler.state_dict() if scaler else None,
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
        self.evaluated, self.first_loss = state.get("evaluated", self.step), state.get("first_loss")


def check_options(options: TrainerOptions) -> None:
    """Raises UserError for a warm-up longer than the run, whose length may have been derived."""
    if not 0 <= options.warmup <= options.steps:
        raise UserError(f"--warmup {options.warmup}: give a number from 0 to --steps {options.steps}")


def _checkpoint_layers(module: torch.nn.Module) -> None:
    """Make every layer forget its activations and compute them again in the backward pass (Chen et al. 2016)."""
    layers = next((m for name, m in module.named_modules() if name.split(".")[-1] == "layers"), ())
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
