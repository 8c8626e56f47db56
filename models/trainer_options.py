"""Options of the training loop (models/trainer.py), apart from it because that loads PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.cli import Checked, arg


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(Checked):
    """How to learn: the options shared by training and fine-tuning."""
    out: Path = arg(short="-o", help="folder for last/, best/, metrics.jsonl and TensorBoard logs/")
    steps: int | None = arg(None, help="updates of the weights")
    batch: int | None = arg(None, help="rows (blocks or examples) that one update learns from")
    micro_batch: int | None = arg(None, help="rows run at once on one device; the rest of the batch is accumulated")
    learning_rate: float | None = arg(None, help="peak learning rate")
    schedule: str = arg("cosine", help="what follows the warm-up", choices=("cosine", "wsd"))
    warmup: int | None = arg(None, help="steps of linear warm-up (by default a twentieth)")
    floor: float = arg(0.1, help="last learning rate, as a share of the peak")
    decay_share: float = arg(0.2, help="share of the steps in which wsd decays")
    weight_decay: float = arg(0.1, help="AdamW's decay of matrices")
    clip: float = arg(1.0, help="largest norm of the gradient")
    precision: str = arg("auto", help="auto: bf16 on a GPU that has it or a CPU with AMX, else fp32",
                         choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = arg(False, help="torch.compile the network")
    checkpointing: bool = arg(False, help="recompute activations in the backward pass, to save memory")
    eval_every: int = arg(100, help="steps between evaluations; each also saves last/")
    eval_rows: int = arg(256, help="validation rows to evaluate on (0: all)")
    patience: int | None = arg(None, help="stop after this many evaluations without a better loss")
    seed: int = arg(0, help="seed of the initial weights and the order of the data")
    resume: bool = arg(False, help="continue the run in --out exactly where its last/ stands")
