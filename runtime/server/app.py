"""The application: the routes of every module in ROUTES, behind the guard.

Add a module that has `router = fastapi.APIRouter()` by its name. Its routes find the service at `request.app.state.service`.
"""

from importlib import import_module

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .. import __version__
from . import errors, page
from .guard import Guard
from .service import Service

ROUTES = ("status", "tokens", "slots", "chat", "completions", "embeddings", "responses", "messages", "feedback", "page")
OPEN = frozenset({"/health", "/v1/health", *page.PATHS.values()})       # to whoever has no key


def create_app(service: Service) -> tuple[ASGIApp, Guard]:
    """The ASGI application over a service, and the guard in it. Raises UserError for a file of keys that is none."""
    app = FastAPI(title="Edgewright", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    errors.install(app)
    for name in ROUTES:
        app.include_router(import_module(f".{name}", __package__).router)
    guard = Guard(app, service, OPEN)
    return CORSMiddleware(guard, allow_origins=service.options.cors, allow_methods=["*"], allow_headers=["*"],
                          expose_headers=["x-request-id", "retry-after"]), guard
