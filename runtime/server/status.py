"""How the server does: /health, /v1/models, /metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from .encoder import ServedEncoder
from .errors import ApiError
from .service import Model

router = APIRouter()


@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> dict:
    """503 while the first model is being loaded, and while the server is stopping."""
    if not request.app.state.service.ready:
        raise ApiError(503, "the model is being loaded; try again in a moment", code="loading", retry_s=1)
    return {"status": "ok"}


@router.get("/v1/models")
async def models(request: Request) -> dict:
    """The bundles that can be asked for, the one that answers where none is named first."""
    service = request.app.state.service
    return {"object": "list", "data": [_entry(model) for model in [*service.models.values(), *service.encoders.values()] if model.there]}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict:
    service = request.app.state.service
    return _entry(service.encoders.get(name) or service.find(name))


def _entry(model: Model | ServedEncoder) -> dict:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "edgewright"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.page(), media_type=CONTENT_TYPE_LATEST)
