"""A page of another site that gives itself this machine's address is refused by its name."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dovetail.data.labels.database import open_store
from dovetail.serving.http.host_names import HostNames
from dovetail.serving.labelling.router import labelling_router
from dovetail.serving.labelling.server import labelling_app
from tests.serving.labelling.work import new_project
from tests.serving.live import live


def answered(host: str, *names: str) -> int:
    """The status of a request under this name."""
    app = FastAPI()
    app.get("/")(lambda: {})
    app.add_middleware(HostNames, names=names)
    return TestClient(app).get("/", headers={"Host": host}).status_code


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1:8000", "192.168.7.5", "[::1]:8000", "[fe80::1]",
     f"{socket.gethostname()}:80", f"{socket.gethostname()}.local"],
)  # fmt: skip
def test_numbers_and_the_machine_s_own_names_are_answered(host: str) -> None:
    assert answered(host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "::1"],
)
def test_other_names_are_refused(host: str) -> None:
    assert answered(host) == 421


def test_a_name_can_be_allowed() -> None:
    assert answered("Labels.Example:443", "labels.example") == 200
    assert answered("labels.example.evil", "labels.example") == 421


def test_both_servers_refuse_a_foreign_name_in_the_form_their_pages_read(tmp_path: Path) -> None:
    foreign = {"Host": "evil.example"}
    with live(host_names=["chat.example"]) as server:
        assert httpx.get(server.url, headers={"Host": "chat.example"}).status_code == 200
        refused = httpx.get(f"{server.url}/v1/models", headers=foreign)
    assert refused.status_code == 421
    assert sorted(refused.json()["error"]) == ["code", "hint", "message", "param", "type"]
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    app = labelling_app(labelling_router(store, new_project(store)), host_names=["label.example"])
    client = TestClient(app)
    assert client.get("/label/", headers={"Host": "label.example"}).status_code == 200
    refused = client.get("/label/", headers=foreign)
    assert refused.status_code == 421
    assert refused.json()["error"]["message"] == "this server is not called 'evil.example'"
    assert "--allow-host evil.example" in refused.json()["error"]["hint"]
    store.close()
