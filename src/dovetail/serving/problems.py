"""Answer errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

Responsible for: every error response of the server. Not responsible for: finding the errors (gate.py, routes.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dovetail.errors import DovetailError
from dovetail.serving.engine_thread import EngineFailed, QueueFull


class ErrorDetail(BaseModel):
    """The error: its message, its kind and the parameter that caused it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class Problem(Exception):
    """An error response that any part of a route can raise."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        detail = ErrorDetail(
            message=_encodable(message), type=_kind(status), param=param and _encodable(param), code=code
        )
        self.body = ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=dict(self.headers or {}))


def problem_of(error: Exception) -> Problem:
    """Return the error response for an exception; a hint becomes part of the message."""
    if isinstance(error, Problem):
        return error
    hint = getattr(error, "hint", None)
    message = f"{error.message}; {hint}" if isinstance(error, DovetailError) and hint else str(error)
    if isinstance(error, QueueFull):
        return Problem(429, message, code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, EngineFailed):
        return Problem(503, message, code="engine_failed", headers={"Retry-After": "1"})
    if isinstance(error, DovetailError):
        return Problem(400, message)
    return Problem(500, "the server failed; its log says why")


def install(app: FastAPI) -> None:
    """Answer every error of this application in OpenAI's form."""

    @app.exception_handler(Problem)
    @app.exception_handler(DovetailError)
    async def ours(_request: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        # A value that fits none of several types has an error for each; the one of its own type says most.
        first: Mapping[str, Any] = min(error.errors(), key=lambda found: found["type"].endswith("_type"))
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            return Problem(400, f"the body is not valid JSON: {reason}").response()
        where = ".".join(str(part) for part in first["loc"][1:] if _is_place(part)) or None
        what = "this server has no such parameter" if first["type"] == "extra_forbidden" else first["msg"]
        return Problem(400, f"{where or 'the body'}: {what}", param=where).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not for this path",
        }
        text = message.get(error.status_code, str(error.detail))
        return Problem(error.status_code, text, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()


def _is_place(part: object) -> bool:
    """Return whether this part is a field or an index, not the name of a type that was tried."""
    return isinstance(part, int) or (
        part not in ("str", "int") and re.fullmatch(r"\w+", str(part)) is not None
    )


def _encodable(text: str) -> str:
    """Escape characters that UTF-8 cannot encode, which a message may quote from a request."""
    return text.encode("utf-8", "backslashreplace").decode()


def _kind(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
