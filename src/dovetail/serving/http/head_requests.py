"""Answer HEAD, which monitors send, wherever GET is answered.

Responsible for: showing the application a GET. Not responsible for: leaving out the body, which uvicorn does.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadRequests:
    """A layer around an application that answers GET but not HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
