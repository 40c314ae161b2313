"""Build the routes of the labelling pages and their API, which any FastAPI app can mount.

Responsible for: routes. Not responsible for: permissions (access.py), bodies (protocol.py), errors and headers
(guard.py), the database (data/labels/), the pages themselves (pages/).

    app.include_router(labelling_router(store, project_id))        # pages under /label/
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from dovetail.data.labels import labels, queue, statistics
from dovetail.data.labels.annotators import Person, invite, revoke
from dovetail.data.labels.comparisons import comparison_rows
from dovetail.data.labels.database import Store
from dovetail.data.labels.logins import begin_login, end_login
from dovetail.data.labels.tasks import project_of
from dovetail.serving.labelling import protocol
from dovetail.serving.labelling.access import Access, log_in, log_out, shown_secret, write_token
from dovetail.serving.labelling.guard import GuardedRoute

_KINDS = {
    "label.html": "text/html",
    "admin.html": "text/html",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    "server.js": "text/javascript",
    "label.js": "text/javascript",
    "admin.js": "text/javascript",
}
_MOST_LINES = 200
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": protocol.Refusal, "description": "an error that the caller can correct"}
}


@dataclass(frozen=True, slots=True)
class SupplyState:
    """The state of the sampling of more tasks."""

    is_sampling: bool = False
    problem: str | None = None
    """The reason why sampling ended before all prompts were used; None without a problem."""


LabelId = Annotated[int, Path(ge=1, le=2**31 - 1)]
Before = Annotated[int | None, Query(ge=1, le=2**31 - 1)]


def labelling_router(
    store: Store, project_id: int, *, supply: Callable[[], SupplyState] = SupplyState
) -> APIRouter:
    """Build all routes, under /label. supply: returns the state of the sampling; by default no tasks are added."""
    router = APIRouter(prefix="/label", route_class=GuardedRoute, responses=_ERRORS)
    access = Access(store)
    _add_pages(router)
    _add_login(router, access, store, project_id)
    _add_work(router, access, store, project_id, supply)
    _add_lists(router, access, store, project_id)
    _add_administration(router, access, store, project_id)
    return router


def _add_pages(router: APIRouter) -> None:
    folder = resources.files("dovetail.serving.labelling") / "pages"
    files = {name: (folder / name).read_bytes() for name in _KINDS}

    def page(name: str) -> Response:
        return Response(files[name], media_type=_KINDS[name])

    @router.get("", include_in_schema=False)
    def to_the_page(request: Request) -> Response:
        return RedirectResponse(request.url.path + "/", status_code=308)

    @router.get("/", include_in_schema=False)
    def label_page() -> Response:
        return page("label.html")

    @router.get("/admin", include_in_schema=False)
    def admin_page() -> Response:
        return page("admin.html")

    @router.get("/files/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return page(name)


def _add_login(router: APIRouter, access: Access, store: Store, project_id: int) -> None:
    @router.post("/api/login")
    def login(body: protocol.Login, request: Request, response: Response) -> protocol.Done:
        secret = begin_login(store, body.token)
        if secret is None:
            raise HTTPException(
                401, "this token was never given out, or is good no more: ask for another invitation"
            )
        log_in(request, response, secret)
        return protocol.Done()

    @router.post("/api/logout")
    def logout(request: Request, response: Response) -> protocol.Done:
        if secret := shown_secret(request):
            end_login(store, secret)
        log_out(request, response)
        return protocol.Done()

    @router.get("/api/me")
    def me(request: Request, person: Annotated[Person, Depends(access.reader)]) -> protocol.Me:
        with store.reading() as session:
            project = project_of(session, project_id)
        return protocol.Me(
            name=person.name,
            is_admin=person.is_admin,
            write_token=write_token(shown_secret(request) or ""),
            project=project.name,
            guidelines=project.guidelines,
            progress=statistics.progress(store, project_id, person.id),
        )


def _add_work(
    router: APIRouter, access: Access, store: Store, project_id: int, supply: Callable[[], SupplyState]
) -> None:
    Writer = Annotated[Person, Depends(access.writer)]

    @router.post("/api/next")
    def next_task(person: Writer) -> protocol.Next:
        state = supply()  # read before the search, so that a task made in between is found on the next call
        found = queue.next_task(store, project_id, person.id)
        return protocol.Next(
            task=None if found is None else _shown(found, store),
            is_waiting=found is None and state.is_sampling,
            problem=state.problem,
            progress=statistics.progress(store, project_id, person.id),
        )

    @router.post("/api/labels", status_code=201)
    def label(body: protocol.NewLabel, person: Writer) -> protocol.Kept:
        said = labels.Submission(**dict(body))
        return protocol.Kept(label_id=labels.submit(store, project_id, person.id, said))

    @router.post("/api/skip")
    def skip(body: protocol.Skip, person: Writer) -> protocol.Done:
        queue.skip(store, project_id, person.id, body.assignment_id)
        return protocol.Done()

    @router.post("/api/undo")
    def undo(person: Writer) -> protocol.Next:
        again = labels.undo(store, project_id, person.id)
        progress = statistics.progress(store, project_id, person.id)
        return protocol.Next(task=_shown(again, store), progress=progress)


def _add_lists(router: APIRouter, access: Access, store: Store, project_id: int) -> None:
    @router.get("/api/labels")
    def own(
        person: Annotated[Person, Depends(access.reader)], before: Before = None
    ) -> list[labels.LabelLine]:
        return _lines(store, project_id, before, annotator_id=person.id)

    @router.get("/api/admin/labels", dependencies=[Depends(access.admin)])
    def everybodys(before: Before = None) -> list[labels.LabelLine]:
        return _lines(store, project_id, before)

    @router.get("/api/admin/export", dependencies=[Depends(access.admin)], response_class=StreamingResponse)
    def export() -> Response:
        with store.reading() as session:
            name = project_of(session, project_id).name
        return StreamingResponse(
            _json_lines(store, name),
            media_type="application/jsonl",
            headers={"Content-Disposition": 'attachment; filename="pairs.jsonl"'},
        )


def _add_administration(router: APIRouter, access: Access, store: Store, project_id: int) -> None:
    Writer = Annotated[Person, Depends(access.writing_admin)]

    @router.get("/api/admin/overview")
    def overview(person: Annotated[Person, Depends(access.admin)]) -> statistics.Statistics:
        return statistics.statistics(store, project_id, person.id)

    @router.post("/api/admin/labels/{label_id}/void")
    def void(label_id: LabelId, body: protocol.Reason, person: Writer) -> protocol.Done:
        labels.void(store, project_id, person.id, label_id, body.reason)
        return protocol.Done()

    @router.post("/api/admin/annotators", status_code=201)
    def new_annotator(body: protocol.Invitation, _person: Writer) -> protocol.Invited:
        return protocol.Invited(name=body.name.strip(), token=invite(store, body.name))

    @router.post("/api/admin/annotators/revoke")
    def end_invitations(body: protocol.Invitation, person: Writer) -> protocol.Revoked:
        if body.name.strip() == person.name:
            raise HTTPException(
                409,
                "these invitations are yours: another admin can revoke them, or `dovetail label revoke` can",
            )
        return protocol.Revoked(links=revoke(store, body.name))


def _shown(found: queue.Assigned, store: Store) -> protocol.ShownTask:
    return protocol.ShownTask(
        assignment_id=found.id,
        messages=tuple(protocol.Turn(role=turn["role"], content=turn["content"]) for turn in found.messages),
        answers=found.answers,
        seconds_left=found.leased_until - store.clock(),
    )


def _lines(
    store: Store, project_id: int, before: int | None, annotator_id: int | None = None
) -> list[labels.LabelLine]:
    return labels.list_labels(store, project_id, annotator_id=annotator_id, limit=_MOST_LINES, before=before)


def _json_lines(store: Store, project: str) -> Iterator[str]:
    for _, row in comparison_rows(store, project):
        yield json.dumps(row, ensure_ascii=False) + "\n"
