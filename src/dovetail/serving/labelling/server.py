"""Run a small server for labelling alone.

Responsible for: an app with the labelling pages, and running it until a signal stops it.
Not responsible for: routes (router.py), making tasks (supply.py), the socket (serving/http/listening.py).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse, Response

from dovetail.serving.http.head_requests import HeadRequests
from dovetail.serving.http.host_names import HostNames
from dovetail.serving.http.listening import Listening


def labelling_app(router: APIRouter, *, host_names: Sequence[str] = ()) -> FastAPI:
    """Build an app with the pages under /label/, to which / redirects.

    The interactive API pages are off, because they load scripts from other servers.
    host_names: names of this server besides those that it finds itself; see `HostNames`.
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
    """Answer requests until SIGINT or SIGTERM, and finish open ones first. SIGTERM then raises SystemExit(0).

    uvicorn raises the signal again when it has finished. By default that would end the process at once, before the
    caller's `finally` runs.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.Server(listening.config(app)).run(sockets=[listening.socket])
