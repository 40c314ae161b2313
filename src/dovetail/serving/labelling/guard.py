"""Guard every route of the labelling pages in the same way, whichever server mounts them.

Responsible for: errors as JSON with a hint, the largest body, headers that restrict the browser to this server.
Not responsible for: permissions (access.py).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dovetail.data.labels.database import ConflictError, NotFoundError
from dovetail.errors import DovetailError

LARGEST_BODY = 512 * 1024
"""The largest body of a request, in bytes."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class GuardedRoute(APIRoute):
    """A route whose errors are `{"error": {"message", "hint"}}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, wrapped so that it limits bodies, answers errors and adds headers."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                response = await handle(_LimitedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                response = _invalid(error)
            except ClientDisconnect:
                response = problem(499, "the client left", None)
            except HTTPException as error:
                response = problem(error.status_code, str(error.detail), None)
            except DovetailError as error:
                response = problem(_status(error), error.message, error.hint)
            response.headers.update(HEADERS)
            return response

        return guarded


class _LimitedRequest(Request):
    """A request whose body is read up to the limit."""

    async def body(self) -> bytes:
        """Read the whole body. Raises HTTPException 413 if it is too large."""
        if not hasattr(self, "_body"):
            read = bytearray()
            async for part in self.stream():
                read += part
                if len(read) > LARGEST_BODY:
                    raise HTTPException(413, f"the body is larger than {LARGEST_BODY} bytes")
            self._body = bytes(read)
        return self._body


def problem(status: int, message: str, hint: str | None) -> JSONResponse:
    """Return an error response in the form that the pages read."""
    # A message may quote half a surrogate pair that the request held, and UTF-8 has no bytes for that.
    texts = {"message": message, "hint": hint}
    content = {name: text and text.encode(errors="replace").decode() for name, text in texts.items()}
    return JSONResponse({"error": content}, status_code=status)


def _status(error: DovetailError) -> int:
    if isinstance(error, NotFoundError):
        return 404
    return 409 if isinstance(error, ConflictError) else 422


def _invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return problem(422, f"{where}: {first['msg']}", "correct the request and send it again")
