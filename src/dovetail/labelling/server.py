"""A small server for labelling alone.

Responsible for: an app with the labelling pages, and running it until it is told to stop.
Not responsible for: routes (router.py), making tasks (supply.py), the socket (web/listening.py).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse, Response

from dovetail.web.head_requests import HeadRequests
from dovetail.web.host_names import HostNames
from dovetail.web.listening import Listening


def labelling_app(router: APIRouter, *, host_names: Sequence[str] = ()) -> FastAPI:
    """The pages under /label/, and / leads there. The interactive API pages are off: they load scripts from afar.

    host_names: names of this server beside those that it finds itself; see `HostNames`.
    """
    app = FastAPI(title="Dovetail labelling", docs_url=None, redoc_url=None)
    app.add_middleware(HostNames, names=host_names)
    app.add_middleware(HeadRequests)
    app.include_router(router)

    @app.get("/", include_in_schema=False)
    def to_the_pages() -> Response:
        return RedirectResponse("/label/")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def serve(app: FastAPI, listening: Listening) -> None:
    """Answer requests until SIGINT or SIGTERM; those under way are finished first. SIGTERM then ends in SystemExit(0).

    uvicorn hands the signal on when it has finished. By default that ends the process at once, before the
    caller's `finally`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.Server(listening.config(app)).run(sockets=[listening.socket])
