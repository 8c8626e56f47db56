"""The page at `/`: files of the package, named below and no others, under a policy that lets them talk to this server alone.

They need no key: they hold nothing, and whoever has one writes it into the page's settings.
"""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
FILES = ("index.html", "page.css", "api.js", "chat.js", "dom.js", "markdown.js", "message.js", "store.js", "icon.svg")
PATHS = {name: "/" if name == "index.html" else f"/page/{name}" for name in FILES}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cache-Control": "no-cache"}                        # asked for again each time, and answered with 304
router = APIRouter(include_in_schema=False)


def _route(path: str, name: str) -> None:
    content = (Path(__file__).parent / "page" / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = HEADERS | {"ETag": tag}

    @router.api_route(path, methods=["GET", "HEAD"])
    async def file(request: Request) -> Response:
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[name.rpartition(".")[2]], headers=headers)


for _name, _path in PATHS.items():
    _route(_path, _name)
