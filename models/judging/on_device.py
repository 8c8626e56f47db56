"""What `fidelity.measure`, scores of continuations and a draft's acceptance need of models that compute on a device: a few numbers a token come back from
there, not its logits.

Windows of one length go through together, as many as the device's memory allows. Of what they give, logits are made for some tokens
at a time, by the model and its reference, and compared where they are: by the definitions of runtime/compare.py, in float64 like
there, which a test holds equal. Near ties are not told apart here.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models.device import smaller
from models.formats.teacher_cache import TeacherCache
from models.network.cache import KVCache, sent
from models.network.torch_backend import TorchBackend
from runtime.backend import Backend
from runtime.compare import Top

TOGETHER = 1 << 14                # tokens of windows that go through together, where there is room
LOGITS = 1 << 22                  # that are made of a model at a time: 32 MB in float64, of which a handful are held
Figures = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


def computes_there(*backends: Backend | TeacherCache | None) -> bool:
    """Whether these are PyTorch's on one device that is not the CPU; None and teachers' caches are wherever they are needed."""
    places = {backend.device if isinstance(backend, TorchBackend) else None
              for backend in backends if not (backend is None or isinstance(backend, TeacherCache))}
    return len(places) == 1 and places.isdisjoint({None, torch.device("cpu")})


def figures(backend: TorchBackend, windows: Sequence, reference: TorchBackend | TeacherCache | None = None,
            shared: int | None = None) -> Iterator[Figures]:
    """Of each window's scored tokens: nll, float64 [n], whether it is the likeliest, bool [n], and where there is a reference kl, float64
    [n], and whether the likeliest token is another one there, bool [n]. Arguments as of `fidelity.measure`. Where memory is short, fewer
    windows go through together; raises what PyTorch raises where one is too many."""
    start, most = 0, None
    while start < len(windows):
        first = windows[start]
        alike = next((n for n, window in enumerate(windows[start:]) if (len(window.ids), window.first) != (len(first.ids), first.first)),
                     len(windows) - start)
        rows = min(alike, most or max(1, TOGETHER // len(first.ids)))
        found, done = smaller(rows, lambda rows: _batch(backend, windows[start:start + rows], start, reference, shared))
        most = done if done < rows else most
        yield from found
        start += done


@torch.no_grad()
def _batch(backend: TorchBackend, windows: Sequence, number: int, reference, shared: int | None) -> list[Figures]:
    """`figures` of windows of one length; the first one has `number`, by which a cache knows it."""
    first, device = windows[0].first, backend.device
    ids = sent(torch.from_numpy(np.stack([window.ids for window in windows])), device)
    scored, targets = slice(first - 1, ids.shape[1] - 1), ids[:, first:].flatten()
    ours, other, theirs = _hidden(backend, ids, scored), None, None
    if isinstance(reference, TorchBackend):
        theirs = _hidden(reference, ids, scored)
    elif reference is not None:
        tops = [reference.top(number + n, scored) for n in range(len(windows))]
        other = [sent(torch.from_numpy(np.concatenate([getattr(top, name) for top in tops])), device) for name in ("ids", "log_p", "log_rest")]
    found = []
    for some, logits in _told(backend, ours):
        row = [-torch.log_softmax(logits.double(), -1).gather(-1, targets[some, None])[:, 0], logits.argmax(-1) == targets[some]]
        if theirs is not None:
            row += compare(reference.decoder.head(theirs[some])[:, :shared], logits[:, :shared])
        elif other is not None:
            row += compare(Top(*(part[some] for part in other)), reference.within(logits))
        found.append(torch.stack([part.double() for part in row]))
    numbers = torch.cat(found, 1).cpu().numpy().reshape(len(row), len(windows), -1)          # all that is read
    return [(nll, right > 0, *((None, None) if reference is None else (rest[0], rest[1] > 0)))
            for nll, right, *rest in numbers.swapaxes(0, 1)]


@torch.no_grad()
def continuation(backend: TorchBackend, tail: np.ndarray, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Append tail[:-1] (int64 [n]) to the one row of `cache`: ln p of each token of tail[1:], float64 [n - 1], and whether it is the
    likeliest there, bool [n - 1]."""
    ids = sent(torch.from_numpy(tail), backend.device)
    hidden, targets, found = backend.decoder.model(ids[None, :-1], cache=cache)[0], ids[1:], []
    cache.lengths += len(tail) - 1
    for some, logits in _told(backend, hidden):
        log_p = torch.log_softmax(logits.double(), -1).gather(-1, targets[some, None])[:, 0]
        found.append(torch.stack((log_p, (logits.argmax(-1) == targets[some]).double())))
    log_p, likeliest = torch.cat(found, 1).cpu().numpy()
    return log_p, likeliest > 0


@torch.no_grad()
def said(backend: TorchBackend, tokens: np.ndarray, first: int) -> Tensor:
    """Logits [n - first, vocab], on the device, in the place of each of tokens[first:] (int64 [n])."""
    ids = sent(torch.from_numpy(tokens), backend.device)
    return backend.decoder.head(_hidden(backend, ids[None], slice(first - 1, len(tokens) - 1)))


def overlap(p: Tensor, q: Tensor) -> np.ndarray:
    """`acceptance.overlap` of two models' logits [n, vocab]."""
    def logs(part: Tensor) -> Tensor:
        return torch.log_softmax(part.double(), -1)
    return torch.cat([torch.minimum(*map(logs, parts)).exp().sum(-1) for parts in zip(p.split(64), q.split(64))]).cpu().numpy()


def _told(backend: TorchBackend, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of hidden states [t, hidden], and of which of them, a part at a time."""
    step = max(1, LOGITS // backend.decoder.config.vocab_size)
    for start in range(0, len(hidden), step):
        yield slice(start, start + step), backend.decoder.head(hidden[start:start + step])


def _hidden(backend: TorchBackend, ids: Tensor, scored: slice) -> Tensor:
    """Hidden states [rows * n, hidden] from which the scored tokens are told. The cache is only for what an int8 one rounds."""
    cache = None if backend.decoder.cache_scales is None else backend.new_cache(len(ids), ids.shape[1] - 1)
    return backend.decoder.model(ids[:, :-1], cache=cache)[:, scored].flatten(0, 1)


def compare(reference: Tensor | Top, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`kl` and `differs` of `runtime.compare.compare`, for logits [t, vocab] and tensors (in a `Top` too) of one device."""
    log_q = torch.log_softmax(logits.double(), -1)
    if not isinstance(reference, Top):
        log_p = torch.log_softmax(reference.double(), -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), logits.argmax(-1) != reference.argmax(-1)
    log_q = log_q.gather(-1, reference.ids)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-12).log()
    kl = (reference.log_p.exp() * (reference.log_p - log_q)).sum(-1) + reference.log_rest.exp() * (reference.log_rest - rest_q)
    return kl, logits.argmax(-1) != reference.ids[:, 0]
