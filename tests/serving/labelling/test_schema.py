"""Requests nobody would write by hand, against the schema that the labelling pages themselves publish."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from dovetail.data.labels.annotators import invite
from dovetail.data.labels.database import open_store
from dovetail.data.labels.logins import begin_login
from dovetail.serving.labelling.access import write_token
from dovetail.serving.labelling.router import labelling_router
from dovetail.serving.labelling.server import labelling_app
from tests.serving.labelling.work import new_project, task

pytestmark = pytest.mark.slow

ROUTES = {
    ("POST", "login"): True,
    ("POST", "logout"): False,
    ("GET", "me"): False,
    ("POST", "next"): False,
    ("POST", "labels"): True,
    ("GET", "labels"): True,
    ("POST", "skip"): True,
    ("POST", "undo"): False,
    ("GET", "admin/labels"): True,
    ("GET", "admin/export"): False,
    ("GET", "admin/overview"): False,
    ("POST", "admin/labels/{label_id}/void"): True,
    ("POST", "admin/annotators"): True,
    ("POST", "admin/annotators/revoke"): True,
}
"""Whether there is something to say, which then may also be wrong."""
CASES = [
    (*route, mode)
    for route, says in ROUTES.items()
    for mode in (GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if says else []))
]
# A 404 or a 409 depends on what is there, which is no part of the schema; logins are tested in test_router.py.
EXCLUDED = [positive_data_acceptance, unsupported_method]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, dict[str, str]]]:
    """The application, and what an admin's requests show."""
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('labels') / 'labels.db'}")
    project = new_project(store, *(task(number) for number in range(50)), overlap=2)
    secret = begin_login(store, invite(store, "boss", is_admin=True))
    assert secret is not None
    cookie, token = f"dovetail_label_80={secret}", write_token(secret)
    headers = {"Cookie": cookie, "X-Dovetail-Token": token, "Host": "localhost"}
    yield labelling_app(labelling_router(store, project)), headers
    store.close()


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_request_breaks_the_server_or_its_schema(
    served: tuple[FastAPI, dict[str, str]], method: str, path: str, mode: GenerationMode
) -> None:
    app, headers = served
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})
    operation = schema[f"/label/api/{path}"][method]

    @settings(
        max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def breaks_nothing(case: schemathesis.Case) -> None:
        response = case.call(headers=headers)
        if response.status_code != 413:  # schemathesis does not count it among the refusals
            case.validate_response(response, excluded_checks=EXCLUDED, headers=headers)

    breaks_nothing()


def test_every_route_of_the_pages_is_tried(served: tuple[FastAPI, dict[str, str]]) -> None:
    paths = served[0].openapi()["paths"]
    found = {
        (method.upper(), path.removeprefix("/label/api/"))
        for path, methods in paths.items()
        for method in methods
        if re.match("/label/api/", path)
    }
    assert found == ROUTES.keys()
