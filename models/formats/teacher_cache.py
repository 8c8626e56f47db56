"""What a teacher said about a text, read from disk: the top-k log-probabilities of every token.

    cache = open_cache(folder)                         # a folder that compress.teacher made
    kl = cache.divergence(window, logits)              # KL(teacher || student) per token, nats

For each token the cache holds the k most likely next tokens, their log-probabilities (fp16) and the log of the mass of
all others (fp16): (2 or 4 + 2) k + 2 bytes a token. The divergence counts the others as one event, which makes it a lower
bound of the full KL divergence. Arrays are memory-mapped files beside a `state.json` that gives their shapes, how many
windows are finished, and which teacher and tokenizer they belong to.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.compare import Top
from runtime.errors import UserError
from runtime.files import read_json, write
from runtime.text import Tokenizer

STATE = "state.json"


@dataclass(frozen=True)
class TeacherCache:
    """Arrays over windows w, tokens t: ids [w, t]; indices [w, t, k]; log_probabilities [w, t, k]; others [w, t]."""

    folder: Path
    state: dict
    ids: np.ndarray
    indices: np.ndarray
    log_probabilities: np.ndarray
    others: np.ndarray

    def divergence(self, window: int, logits: Tensor) -> Tensor:
        """KL(teacher || student) in nats of each token, [t], for a student's logits [t, vocab] of a window.

        Over the tokens that the cache was made over (see `within`). This one has gradients; `runtime.compare` measures.
        """
        logits = self.within(logits)
        index = torch.from_numpy(self.indices[window].astype(np.int64))
        teacher = torch.from_numpy(self.log_probabilities[window].astype(np.float32))
        rest = torch.from_numpy(self.others[window].astype(np.float32))
        student = torch.log_softmax(logits.float(), -1).gather(-1, index)
        student_rest = torch.log1p(-student.exp().sum(-1).clamp(max=1 - 1e-6))
        return (teacher.exp() * (teacher - student)).sum(-1) + rest.exp() * (rest - student_rest)

    def within(self, logits):
        """Logits [..., vocab] of the tokens that the cache was made over: those beyond, of a padded table, do not count.
        Raises UserError where there are fewer."""
        vocabulary = self.state["vocabulary"]
        if vocabulary > logits.shape[-1]:
            raise UserError(f"{self.folder}: was made over a vocabulary of {vocabulary} tokens, and the model has {logits.shape[-1]}: "
                            f"make it again with python -m compress.teacher, over the tokenizer's own")
        return logits[..., :vocabulary]

    def top(self, window: int, tokens: slice) -> Top:
        """What the teacher said at window[tokens]."""
        log_p, log_rest = (part[window, tokens].astype(np.float64) for part in (self.log_probabilities, self.others))
        return Top(self.indices[window, tokens].astype(np.int64), log_p, log_rest)


def array_types(windows: int, tokens: int, k: int, vocabulary: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the arrays of a cache, each in NAME.bin."""
    return {"ids": (np.int32, (windows, tokens)), "others": (np.float16, (windows, tokens)),
            "indices": (np.uint16 if vocabulary <= 1 << 16 else np.int32, (windows, tokens, k)),
            "log_probabilities": (np.float16, (windows, tokens, k))}


def write_state(folder: Path, state: dict) -> None:
    """Replace the folder's state.json in one go."""
    write(folder / STATE, json.dumps(state))


def open_cache(folder: Path) -> TeacherCache:
    """The finished cache in `folder`. Raises UserError where there is none, or an unfinished one."""
    try:
        state = read_json(folder / STATE)
        types = array_types(*(state[name] for name in ("windows", "tokens", "k", "vocabulary")))
        arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=shape) for name, (dtype, shape) in types.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: holds no teacher cache that can be read ({error}); make one with "
                        "python -m compress.teacher and give the folder it names") from None
    if state["done"] < state["windows"]:
        raise UserError(f"{folder}: only {state['done']} of {state['windows']} windows are finished; run the same "
                        "python -m compress.teacher again to go on")
    return TeacherCache(folder, state, **arrays)


def is_cache(folder: Path) -> bool:
    return (folder / STATE).is_file()


def tokenizer_size(folder: Path) -> int:
    """Ids that the folder's tokenizer.json gives: one more than the largest."""
    return len(Tokenizer(folder / "tokenizer.json"))


def shared_vocabulary(folder: Path, *tables: int) -> int | None:
    """Tokens over which models of one tokenizer (in `folder`) can be compared whose tables have other sizes, because
    one is padded: those of the tokenizer. None where the tables are alike, and compared whole.
    """
    return min(tokenizer_size(folder), *tables) if len(set(tables)) > 1 else None


def tokenizer_digest(folder: Path) -> str:
    """A hash of which token has which id in the folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: no tokenizer.json there")
    vocabulary = sorted(Tokenizer(file).vocabulary().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
