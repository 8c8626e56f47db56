"""Options of the training loop (trainer.py), apart from it because that loads PyTorch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from models.device import DeviceOptions
from runtime.cli import arg
from runtime.errors import UserError

BETAS, WEIGHT_DECAY, MOMENTUM = (0.9, 0.95), 0.1, 0.9


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(DeviceOptions):
    """How to learn: the options shared by training and fine-tuning."""
    out: Path = arg(short="-o", help="folder for last/, best/, metrics.jsonl and TensorBoard logs/")
    steps: int | None = arg(None, help="updates of the weights", least=1, group="training")
    batch: int | None = arg(None, help="rows (blocks or examples) that one update learns from", least=1, group="training")
    micro_batch: int | None = arg(None, help="rows run at once on one device, the rest of the batch being accumulated (by default what "
                                             "a CPU's cache or a GPU's memory holds)", least=1, group="training")
    learning_rate: float | None = arg(None, help="peak learning rate", above=0, group="training")
    schedule: str = arg("cosine", help="what follows the warm-up", choices=("cosine", "wsd"), group="training")
    warmup: int | None = arg(None, help="steps of linear warm-up (by default a twentieth)", least=0, group="training")
    floor: float = arg(0.1, help="last learning rate, as a share of the peak", least=0, most=1, group="training")
    decay_share: float = arg(0.2, help="share of the steps in which wsd decays", least=0, most=1, group="training")
    optimizer: str = arg("adamw", help="how gradients become updates", choices=("adamw", "sgd"), group="training")
    betas: tuple[float, ...] | None = arg(None, help=f"AdamW: the decays of its two moments (by default {BETAS[0]} {BETAS[1]})", group="training")
    momentum: float | None = arg(None, help=f"SGD: share of the last update that goes on (by default {MOMENTUM})", least=0, below=1,
                                 group="training")
    weight_decay: float | None = arg(None, help=f"decay of matrices (by default AdamW's is {WEIGHT_DECAY}, SGD's 0)", least=0, group="training")
    clip: float = arg(1.0, help="largest norm of the gradient", above=0, group="training")
    precision: str = arg("auto", help="auto: bf16 on a GPU that has it or a CPU with AMX, else fp32",
                         choices=("auto", "fp32", "bf16", "fp16"), group="training")
    compile: bool = arg(False, help="torch.compile the network", group="training")
    checkpointing: bool = arg(False, help="recompute activations in the backward pass, to save memory", group="training")
    eval_every: int = arg(100, help="steps between evaluations; each also saves last/", least=1, group="training")
    eval_rows: int = arg(256, help="validation rows to evaluate on (0: all)", least=0, group="training")
    patience: int | None = arg(None, help="stop after this many evaluations without a better loss", least=1, group="training")
    seed: int = arg(0, help="seed of the initial weights and the order of the data", least=0, most=2**63 - 1, group="training")
    resume: bool = arg(False, help="continue the run in --out exactly where its last/ stands", group="training")

    def __post_init__(self):
        super().__post_init__()
        if self.optimizer == "adamw" and self.momentum is not None:
            raise UserError(f"--momentum {self.momentum}: is for --optimizer sgd; AdamW's are --betas")
        if self.optimizer == "sgd" and self.betas is not None:
            raise UserError(f"--betas {' '.join(map(str, self.betas))}: are AdamW's; --optimizer sgd has --momentum")
        if self.optimizer == "sgd" and self.learning_rate is None:
            raise UserError("--optimizer sgd has no usual --learning-rate: give one (0.1 to 1 for a model from scratch)")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(f"--betas {' '.join(map(str, self.betas))}: should be two numbers from 0 to below 1")

    def filled(self, **defaults):
        """The options, with a default for each that was not given."""
        return dataclasses.replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
