"""What an engine has for guessing: `open_speculation("auto", bundle, open_backend)`.

    "off"     nobody guesses
    "on"      the text itself, and the file of n-grams that the manifest names ("draft"), if any
    "auto"    the same on a backend whose passes over several tokens give the bits of its steps (the native core), so that no reply
              depends on what was guessed, not even where two logits are nearly equal
    a path    as "on", with this file of n-grams (a bundle's draft.ngram) in its place, or besides this bundle as a draft
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..backend import Backend
from ..bundle import MANIFEST, Bundle, open_bundle
from ..errors import UserError, shown
from ..sampling import Sampler
from .draft_model import CAPACITY, DraftModel
from .drafter import Drafter, Repeats
from .ngrams import Ngrams, NgramTable, read_ngrams
from .odds import Odds
from .pace import Pace


class Speculation:
    """table: of n-grams; draft: a smaller model; either may be None. draft_bytes: of its weights. exact: only where replies are the same
    to the bit."""

    def __init__(self, table: NgramTable | None = None, draft: DraftModel | None = None, draft_bytes: int = 0, exact: bool = False):
        self.pace, self.odds, self.draft_bytes, self.exact = Pace(), Odds(), draft_bytes, exact
        self._table, self._draft = table, draft

    def suits(self, backend: Backend) -> bool:
        """Whether it may guess for replies of this backend."""
        return not self.exact or hasattr(backend, "check_rows")

    def drafter(self, prompt: np.ndarray, sampler: Sampler, most: int) -> Drafter:
        """Who guesses for the reply to prompt (int64 [n]) with this sampler, of at most `most` tokens."""
        sources = [Repeats()]
        if self._table:
            sources.append(Ngrams(self._table))
        if self._draft:
            sources.append(self._draft.source(sampler, most))
        return Drafter(sources, self.odds, self.pace, prompt)

    def cache_bytes(self, rows: int) -> int:
        """Of the draft's caches of so many replies."""
        backend = self._draft and self._draft.backend
        return rows * backend.cache_bytes(1, min(CAPACITY, self._draft.context)) if backend else 0

    def close(self) -> None:
        if self._draft and (backend := self._draft.backend):
            self._draft.backend = None
            backend.close()


def open_speculation(speculate: str | Path, bundle: Bundle, open_draft: Callable[[Bundle], Backend]) -> Speculation | None:
    """What guesses for `bundle`. open_draft: opens a backend of a draft. Raises UserError for a draft that is none, or of another
    vocabulary, and what opening it raises."""
    if not isinstance(speculate, (str, Path)) or not str(speculate):
        raise UserError(f'speculate is {shown(speculate)}; it must be "auto", "on", "off", or the path of a draft')
    if speculate == "off":
        return None
    vocab, own = bundle.model["config"]["vocab_size"], bundle.manifest["files"][bundle.manifest["tokenizer"]]["sha256"]
    path = None if speculate in ("auto", "on") else Path(speculate).expanduser()
    if path is not None and not path.exists():
        raise UserError(f'speculate={shown(str(speculate))}: no such file or folder; give "auto", "on", "off", or the path of a draft')
    named = bundle.manifest.get("draft")
    file = path if path is not None and path.is_file() else bundle.path(named) if named else None
    table = read_ngrams(file, vocab, own) if file else None
    if path is None or path.is_file():
        return Speculation(table, exact=speculate == "auto")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: is no bundle, so it cannot be a draft; export it with `python -m export.onnx`, or write n-grams of "
                        "`python -m models.ngram` with `python -m export.draft`")
    draft = open_bundle(path)
    theirs = draft.model["config"]["vocab_size"]
    if theirs != vocab:
        raise UserError(f"{path}: the draft's vocabulary has {theirs} tokens, and that of {bundle.folder} {vocab}; take a draft with "
                        "the same tokenizer")
    if draft.manifest["files"][draft.manifest["tokenizer"]]["sha256"] != own:
        raise UserError(f"{path}: the draft's tokenizer is not that of {bundle.folder}; take a draft with the same one")
    return Speculation(table, DraftModel(open_draft(draft), draft.max_context), draft.weights_bytes)
