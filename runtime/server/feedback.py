"""What people say about replies: POST /v1/feedback stores it, GET tells whether this server does (--feedback FILE)."""

import asyncio

from fastapi import APIRouter, Request

from ..feedback import NotStored, Store, checked
from .errors import ApiError

router = APIRouter()


@router.get("/v1/feedback")
async def offered(request: Request) -> dict:
    return {"object": "feedback", "enabled": request.app.state.service.feedback is not None}


@router.post("/v1/feedback")
async def keep(record: dict, request: Request) -> dict:
    """record: see `checked`. Errors: 400 for a record that is none, 404 for a server that keeps none, 507 where it cannot be stored."""
    store: Store | None = request.app.state.service.feedback
    if store is None:
        raise ApiError(404, "this server keeps no feedback: start it with --feedback FILE.db", code="no_feedback")
    try:
        number = await asyncio.to_thread(lambda: store.add(checked(record)))
    except NotStored as error:
        raise ApiError(507, str(error), code="not_stored") from None
    return {"object": "feedback", "number": number}
