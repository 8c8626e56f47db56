"""A reply as a stream: pieces of text while they are made. `Engine.stream` gives one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .reply import Draft, Reply

if TYPE_CHECKING:
    from .engine import Engine


class Stream:
    """Pieces of a reply's text, as they are made; whole characters, never an empty piece. They join to `reply.text`.

    `reply` is the reply so far, complete when the iteration has ended. Leaving the loop early costs nothing more; the cache's
    memory is free once the stream is closed, by `close`, at the end of a `with`, or with the last reference to it.
    """

    def __init__(self, engine: Engine, drafts: list[Draft]):
        (self._draft,), self._closed = drafts, False
        self._pieces = (piece for _, piece in engine._run(drafts, 1) if piece)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._closed:
            self.close()
            raise StopIteration
        return next(self._pieces)

    def close(self) -> None:
        """Give up what is still to come: the iteration ends, the cache is freed, `reply` keeps what there is. Where another
        thread is just making a piece, it ends after that one."""
        self._closed = True
        with contextlib.suppress(ValueError):               # "generator already executing"
            self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def reply(self) -> Reply:
        return self._draft.reply
