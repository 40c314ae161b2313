"""A small server for labelling alone.

Responsible for: an app with the labelling pages, and running it until it is told to stop.
Not responsible for: routes (router.py), making tasks (supply.py).
"""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse, Response

from dovetail.errors import ConfigError


def labelling_app(router: APIRouter) -> FastAPI:
    """The pages under /label/, and / leads there. The interactive API pages are off: they load scripts from afar."""
    app = FastAPI(title="Dovetail labelling", docs_url=None, redoc_url=None)
    app.include_router(router)

    @app.get("/", include_in_schema=False)
    def to_the_pages() -> Response:
        return RedirectResponse("/label/")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error.strerror}", hint="give another --port, or --host"
        ) from error


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM; those under way are finished first. SIGTERM then ends in SystemExit(0).

    uvicorn hands the signal on when it has finished. By default that ends the process at once, before the
    caller's `finally`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
