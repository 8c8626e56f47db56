"""The bundles that a server has, by the names of their folders: loaded when asked for, unloaded when memory is short.

Of the event loop alone, but for loading and closing engines, which run in threads. With `max_memory_mb`, every engine has a
share for its caches beside its weights (`_share`), and before one is loaded, those nobody uses are closed, the least
recently used first, until the shares of all that are loaded fit. Encoders, which are small, are loaded at the start and stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import MANIFEST, open_bundle
from ..engine import Engine
from ..errors import CheckFailed, UserError
from ..feedback import Store
from .encoder import ServedEncoder, is_encoder
from .errors import ApiError
from .logs import say
from .metrics import Metrics

if TYPE_CHECKING:
    from ..serve import ServeOptions

_MB = 1 << 20
_WAIT_S = 30                      # for memory that others use


@dataclass(eq=False)
class Model:
    """A bundle by name. users: requests that hold its engine; used: when the last one came."""

    name: str
    folder: Path
    weights_mb: float
    created: int
    engine: Engine | None = None
    users: int = 0
    used: float = 0.0

    @property
    def there(self) -> bool:
        """Whether it can be asked for: in memory, or still on the disk."""
        return self.engine is not None or (self.folder / MANIFEST).is_file()


class Service:
    """Raises UserError for bundles that cannot be served (none there, two of one name, weights beyond max_memory_mb), and for no
    folder of slots."""

    def __init__(self, options: ServeOptions):
        self.options, self.models, self.encoders = options, {}, {}
        if options.slots_dir is not None and not options.slots_dir.is_dir():
            raise UserError(f"{options.slots_dir}: no such folder to keep slots in; make it, or give another --slots-dir")
        for folder in options.bundles:
            name = folder.resolve().name
            if name in self.models or name in self.encoders:
                raise UserError(f"two bundles are called {name!r}, and clients choose by the folder's name: rename a folder")
            if is_encoder(folder):
                self.encoders[name] = ServedEncoder(folder, options.threads)
            else:
                bundle = open_bundle(folder)
                self.models[name] = Model(name, folder, bundle.weights_bytes / _MB, int((folder / MANIFEST).stat().st_mtime))
        self._most_mb = None if options.max_memory_mb is None else (
            options.max_memory_mb - sum(encoder.size_bytes for encoder in self.encoders.values()) / _MB)
        for model in self.models.values():
            if self._most_mb is not None and model.weights_mb >= self._most_mb:
                raise UserError(f"{model.folder}: the weights alone take {model.weights_mb:.0f} MB, and --max-memory-mb is "
                                f"{options.max_memory_mb:g}" + (", of which encoders take a part" if self.encoders else ""))
        self.feedback = Store(options.feedback) if options.feedback else None
        self.ready = False                        # the first one is loaded
        self.draining = False                     # nothing new is taken
        self.metrics = Metrics(self)
        self._loading, self._freed = asyncio.Lock(), asyncio.Event()

    async def load_first(self) -> None:
        """Load the first bundle; requests are answered from then on. Raises UserError, CheckFailed."""
        if self.models:
            await self._load(next(iter(self.models.values())))
        self.ready = True

    @contextlib.asynccontextmanager
    async def engine(self, name: str | None = None) -> AsyncIterator[Engine]:
        """The engine of a model (None: of the first), which stays loaded meanwhile. Raises ApiError."""
        model, deadline = self.find(name), time.monotonic() + _WAIT_S
        model.users += 1
        try:
            if model.engine is None:
                async with self._loading:
                    if model.engine is None:
                        await self._load_for_client(model, deadline)
            model.used = time.monotonic()
            yield model.engine
        finally:
            model.users -= 1
            self._freed.set()

    def find(self, name: str | None = None) -> Model:
        """The model of this name (None: the first). Raises ApiError 404, and 503 while the first one is being loaded."""
        model = self.models.get(name) if name else next(iter(self.models.values()), None)
        if model is None and (name in self.encoders or not name):
            raise ApiError(400, f"the model {name or next(iter(self.encoders))!r} is an encoder, which answers at /v1/embeddings alone",
                           param="model")
        if model is None or not model.there:
            raise self._unknown(name)
        if not self.ready:
            raise ApiError(503, "the model is being loaded; try again in a moment", code="loading", retry_s=1)
        return model

    def encoder(self, name: str | None = None) -> ServedEncoder:
        """The encoder of this name (None: the first). Raises ApiError."""
        encoder = self.encoders.get(name) if name else next(iter(self.encoders.values()), None)
        if encoder is None and name and name not in self.models:
            raise self._unknown(name)
        if encoder is None:
            raise ApiError(400, f"{f'the bundle {name!r} carries' if name else 'the bundles here carry'} no embeddings; ask an encoder, "
                           "which the server's owner exports with --task sentence-similarity and serves beside it", param="model")
        return encoder

    def _unknown(self, name: str | None) -> ApiError:
        known = ", ".join(model.name for model in [*self.models.values(), *self.encoders.values()] if model.there)
        return ApiError(404, f"there is no model {str(name)[:100]!r} here; there is: {known}", code="model_not_found", param="model")

    async def close(self) -> None:
        """Close every engine, and the file of feedback; whoever still waits for a reply is told."""
        if self.feedback:
            self.feedback.close()
        for model in self.models.values():
            if model.engine:
                await asyncio.to_thread(model.engine.scheduler.close, ApiError(503, "the server was stopped", code="stopping"))
            await self._unload(model)

    async def _load_for_client(self, model: Model, deadline: float) -> None:
        try:
            await self._make_room(model, deadline)
            await self._load(model)
        except (UserError, CheckFailed, OSError) as error:           # its message names this machine's folders
            say("a bundle cannot be loaded", level=40, model=model.name, reason=str(error))
            raise ApiError(404, f"the model {model.name!r} cannot be loaded: its bundle has gone or changed; the server's log says more",
                           code="model_not_found", param="model") from None

    async def _load(self, model: Model) -> None:
        start = time.monotonic()
        model.engine = await asyncio.to_thread(self._open, model)
        say("loaded", model=model.name, ms=round((time.monotonic() - start) * 1e3), backend="; ".join(model.engine.explain().splitlines()))

    def _open(self, model: Model) -> Engine:
        options = self.options
        engine = options.open_bundle(model.folder, max_memory_mb=None if self._most_mb is None else self._share(model))
        engine.serve_with(rows=options.rows, queue=options.queue, cache_mb=options.cache_mb, prefix_mb=options.prefix_mb)
        return engine

    def _share(self, model: Model) -> float:
        """MB that an engine may take: its weights, and for caches an equal part of what all weights leave; or, where not all
        bundles fit at once, up to a quarter of everything."""
        weights, most = [one.weights_mb for one in self.models.values()], self._most_mb
        return model.weights_mb + max((most - sum(weights)) / len(weights), min(most - max(weights), most / 4))

    async def _make_room(self, model: Model, deadline: float) -> None:
        """Unload until there is memory for `model`. Raises ApiError where those who use it have not ended by the deadline."""
        if self._most_mb is None:
            return
        while sum(self._share(one) for one in self.models.values() if one.engine) + self._share(model) > self._most_mb + 1e-6:
            idle = min((one for one in self.models.values() if one.engine and not one.users), key=lambda one: one.used, default=None)
            if idle:
                await self._unload(idle)
                continue
            self._freed.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._freed.wait()
            except TimeoutError:
                raise ApiError(429, "other models are in use and there is no memory for this one; try again later", code="no_memory",
                               retry_s=5) from None

    async def _unload(self, model: Model) -> None:
        engine, model.engine = model.engine, None
        if engine:
            await asyncio.to_thread(engine.close)
            say("unloaded", model=model.name)
