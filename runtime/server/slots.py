"""What is kept of earlier prompts, by model: listed at /slots, saved to a file of --slots-dir, restored, and erased.

Slot n is the n-th of /v1/models. llama.cpp's routes, where a slot is one conversation; here it is all of a model's.
"""

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request

from ..engine import Engine
from ..errors import UserError
from .errors import ApiError
from .fields import Fields, read
from .service import Service

router = APIRouter()
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


class File(Fields):
    filename: str


@router.get("/slots")
async def slots(request: Request) -> list[dict]:
    """Every model, and what its scheduler is doing."""
    return [{"id": number, "model": model.name, "loaded": model.engine is not None}
            | (dataclasses.asdict(model.engine.scheduler.stats()) if model.engine else {})
            for number, model in enumerate(request.app.state.service.models.values())]


@router.post("/slots/{number}")
async def change(number: int, action: Literal["save", "restore", "erase"], request: Request) -> dict:
    """Save, restore or erase what is kept: {"tokens": how many}."""
    service: Service = request.app.state.service
    if not 0 <= number < len(service.models):
        raise ApiError(404, f"there is no slot {number}: slots are 0 to {len(service.models) - 1}", code="unknown_slot")
    name = list(service.models)[number]
    path = None if action == "erase" else _path(service, (await read(request, File)).filename)
    async with service.engine(name) as engine:
        try:
            tokens = await asyncio.to_thread(_act, engine, action, path)
        except UserError as error:                        # less the folder, which is nothing to tell
            raise ApiError(400, str(error).replace(f"{service.options.slots_dir}/", ""), param="filename") from None
    return {"id": number, "model": name, "action": action, "filename": path and path.name, "tokens": tokens}


def _path(service: Service, name: str) -> Path:
    """A file right in --slots-dir: its name has no separators and no leading dot, so that it cannot leave. Raises ApiError."""
    if service.options.slots_dir is None:
        raise ApiError(400, "this server saves no slots: start it with --slots-dir FOLDER", code="no_slots_dir")
    if not _NAME.fullmatch(name):
        raise ApiError(400, "filename: give a name of letters, digits, _ - and . alone, at most 100, no path", param="filename")
    return service.options.slots_dir / name


def _act(engine: Engine, action: str, path: Path | None) -> int | None:
    scheduler, identity = engine.scheduler, engine.bundle.manifest["files"][engine.bundle.manifest["weights"]["file"]]["sha256"]
    if action == "erase":
        return scheduler.forget()
    return scheduler.save(path, identity) if action == "save" else scheduler.load(path, identity)
