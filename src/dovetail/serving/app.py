"""Build the application from routes, gate and pages.

Responsible for: joining these parts. Not responsible for: sockets and signals (server.py).

    app = create_app(load_models(["runs/demo"], EngineSettings()), sections=[Section("Mine", "/mine", router)])
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

from dovetail import __version__
from dovetail.serving import problems
from dovetail.serving.gate import Drain, Gate, RequestLimits
from dovetail.serving.http.head_requests import HeadRequests
from dovetail.serving.http.host_names import HostNames
from dovetail.serving.keys import ApiKeys
from dovetail.serving.meters import Meters
from dovetail.serving.pages import chat_pages
from dovetail.serving.routes import Service, api_routes
from dovetail.serving.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class Section:
    """Further pages on the same port. They receive bodies within the size limit and have their own logins."""

    title: str
    """The name of the link on the chat page."""
    path: str
    """The path under which the pages lie."""
    router: APIRouter
    while_serving: AbstractContextManager[object] = field(default_factory=nullcontext)
    """A context that is entered after the engines have started, and left before they end."""
    logins: Sequence[str] = ()
    """Paths of login requests, which count towards the rate limit of their address."""


def create_app(
    models: Sequence[ServedModel],
    *,
    limits: RequestLimits | None = None,
    keys: ApiKeys | None = None,
    cors_origins: Sequence[str] = (),
    host_names: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> FastAPI:
    """Build the application: the API, the chat page, health checks and metrics, and the pages of `sections`.

    keys: the keys that are accepted; None: requests need no key. cors_origins: other origins whose web pages may call
    the API; none by default. host_names: names of this server besides those that it finds itself; see `HostNames`.
    The engines start and end with the application. `app.state.drain` is the `Drain` that lets the server stop without
    breaking off answers.
    """
    limits = limits or RequestLimits()
    meters, drain = Meters(models), Drain()
    service = Service({model.name: model for model in models}, limits, meters, started=int(time.time()))

    @asynccontextmanager
    async def engines(_app: FastAPI) -> AsyncIterator[None]:
        post, of_sections = asyncio.get_running_loop().call_soon_threadsafe, ExitStack()
        try:
            for model in models:
                await asyncio.to_thread(model.thread.start, post)
            for section in sections:
                await asyncio.to_thread(of_sections.enter_context, section.while_serving)
            yield
        finally:
            await asyncio.to_thread(of_sections.close)
            for model in models:
                await asyncio.to_thread(model.thread.close)

    app = FastAPI(
        title="Dovetail",
        version=__version__,
        lifespan=engines,
        docs_url=None,  # these pages load their scripts from other servers
        redoc_url=None,
    )
    app.state.drain = drain
    problems.install(app)
    for router in (
        api_routes(service),
        _operations(models, meters, drain),
        chat_pages({section.title: section.path for section in sections}),
        *(section.router for section in sections),
    ):
        app.include_router(router)
    logins = frozenset(path for section in sections for path in section.logins)
    app.add_middleware(Gate, limits=limits, keys=keys, meters=meters, drain=drain, logins=logins)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(HostNames, names=host_names)
    app.add_middleware(HeadRequests)
    return app


def _operations(models: Sequence[ServedModel], meters: Meters, drain: Drain) -> APIRouter:
    """Build the routes for the operators of the server: health, readiness and metrics."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Report that the process answers."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: {"description": "starting, stopping or failed"}})
    async def ready() -> JSONResponse:
        """Report whether the server can take requests: status 200, or 503 with the reason."""
        failing = [model.name for model in models if not model.thread.can_answer]
        status = f"the engine of {', '.join(failing)} has failed" if failing else "ready"
        if drain.has_begun:
            status = "stopping"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
