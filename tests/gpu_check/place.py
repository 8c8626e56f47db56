"""What every check of `make gpu-check` is given: where to compute, what on, how much, and how it says what it found.

A check is a function of a `Place` that yields a `Row` as soon as it knows one: what it had said is kept, should it hang or die later.
It raises `Unavailable` where this machine lacks something it needs, and anything else where it failed. A `Row` is a figure with its unit and
the target beside it, or a fact (a text). Targets were set for an H100; a figure that misses one is no failure, a proof that does not hold is:
`ok` is False then.
"""

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """`value` of `what`; unit "s" or "MB": less is better. ok: None where nothing is proven by it."""
    what: str
    value: float | str
    unit: str = ""
    target: float | None = None
    ok: bool | None = None

    def share(self) -> float | None:
        """Of the target that is reached: 1 or more where it is met."""
        if self.target is None or not self.value:
            return None
        return self.target / self.value if self.unit in ("s", "MB") else self.value / self.target


@dataclass(frozen=True)
class Sizes:
    """How much each check does; the defaults are for a GPU, and what the targets are set for."""
    prompt: int = 128                  # tokens of a prefill
    new: int = 128                     # tokens decoded
    windows: int = 128                 # of calibration
    length: int = 512                  # tokens of a window, and of a row in training
    batch: int = 64                    # rows of an update
    chats: int = 16                    # chats of an update
    steps: int = 24
    student: int = 10                  # layers of the distilled one
    judged: int = 8                    # windows a quantized model is judged on


SMALL = Sizes(prompt=24, new=8, windows=2, length=32, batch=2, chats=2, steps=2, student=1, judged=1)


@dataclass(frozen=True)
class Place:
    """work: a folder of the run; see prepare.py for what is in it. model: what was asked for, or "" for whatever there is."""
    work: Path
    device: str                        # "cuda" or "cpu"
    model: str = ""

    @property
    def sizes(self) -> Sizes:
        return SMALL if self.device == "cpu" else Sizes()

    def to_json(self) -> dict:
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict) -> "Place":
        return cls(**(values | {"work": Path(values["work"])}))
