"""What went wrong, in OpenAI's error shape: {"error": {"message", "type", "param", "code"}} and an HTTP status.

A client's mistake is 4xx, so that no client repeats what cannot succeed; 429 and 503 carry Retry-After, because they can.
`describe` knows every exception that a route may raise, and is also for errors inside a stream, whose status is already sent.
"""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import Unavailable, UserError
from ..pending import Busy, Expired

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "unavailable_error"}


class ApiError(Exception):
    """An answer that is an error. type: None: as the status has it. retry_s: seconds after which to try again."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, type: str | None = None,
                 retry_s: int | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = (headers or {}) | ({} if retry_s is None else {"retry-after": str(retry_s)})

    @property
    def body(self) -> dict:
        """What is sent: {"error": {...}}."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def describe(error: BaseException) -> ApiError:
    """The answer to any exception; a bug's says nothing of what it was."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(429, str(error), code="queue_full", retry_s=1)
        case Expired():
            return ApiError(408, str(error), code="deadline_passed")
        case Unavailable():
            return ApiError(503, "what runs the model has failed; try again later", code="device_failed", retry_s=10)
        case UserError():
            code = "context_length_exceeded" if "the model's context is" in str(error) else None
            return ApiError(400, str(error), code=code)
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return ApiError(500, "the server has failed at this request; its log says where", code="internal_error")


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first of its errors, with the field it is about: `messages[0].role`."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}", code="invalid_json")
    place = first["loc"][1:] if first["loc"][0] in ("body", "query", "path", "header") else first["loc"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}", param=param, code=first["type"])


def install(app: FastAPI) -> None:
    """Have every exception of the routes answered so, 404 and 405 of the router too."""
    async def answer(request: Request, error: Exception) -> JSONResponse:
        described = describe(error)
        for model in request.app.state.service.models.values():          # the engine's sentences say where its bundle is
            described.args = (str(described).replace(str(model.folder), model.name),)
        return described.response()

    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        method, path = request.method, request.url.path[:200]
        if error.detail == "Not Found":
            error = ApiError(404, f"there is no {method} {path} here", code="unknown_url")
        elif error.detail == "Method Not Allowed":
            error = ApiError(405, f"{path} does not take {method}", code="method_not_allowed", headers=error.headers)
        return describe(error).response()

    app.add_exception_handler(HTTPException, not_found)
    for kind in (ApiError, UserError, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
