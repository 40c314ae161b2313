"""Serve the web chat, which consists of a few files of this package and loads nothing from other servers.

Responsible for: the routes of these files. Not responsible for: their content (web/), answers (routes.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files

from fastapi import APIRouter, Response

_KINDS = {
    "chat.html": "text/html; charset=utf-8",
    "chat.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # Text of a model or a user can never become a script, a frame or a request to another server.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def chat_pages(links: Mapping[str, str]) -> APIRouter:
    """Build the routes of `/` and its style, script and icon. links: title -> path of the pages that `/` links to."""
    router = APIRouter(include_in_schema=False)
    for file, kind in _KINDS.items():
        content = files("dovetail.serving").joinpath("web", file).read_bytes()
        path = "/" if file == "chat.html" else f"/web/{file}"
        router.add_api_route(path, _page(content, kind), methods=["GET"], name=file)

    @router.get("/web/pages.json")
    async def pages() -> list[dict[str, str]]:
        return [{"title": title, "path": path} for title, path in links.items()]

    return router


def _page(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return page
