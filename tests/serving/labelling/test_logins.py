"""Logins apart from invitations: each ends without the other, and two servers on one host have their own."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import text

from dovetail.cli.label_pages import print_links
from dovetail.data.labels import database
from dovetail.data.labels.annotators import invite, person_of, revoke
from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.logins import LOGIN_SECONDS, begin_login, end_login, person_logged_in
from dovetail.data.labels.statistics import statistics
from dovetail.serving.labelling.router import labelling_router
from dovetail.serving.labelling.server import labelling_app
from tests.serving.labelling.work import Clock, new_project, task


def client(store: Store, *, port: int = 8001) -> TestClient:
    return TestClient(labelling_app(labelling_router(store, 1)), base_url=f"http://127.0.0.1:{port}")


def test_logging_out_ends_the_session_on_the_server_and_not_the_invitation(store: Store) -> None:
    new_project(store, task(1))
    token = invite(store, "ann")
    browser, other = client(store), client(store)
    for one in (browser, other):
        one.post("/label/api/login", json={"token": token}).raise_for_status()
    ((name, copied),) = browser.cookies.items()
    assert token != copied
    browser.post("/label/api/logout", json={}).raise_for_status()
    thief = client(store)
    thief.cookies.set(name, copied)
    assert thief.get("/label/api/me").status_code == 401
    assert other.get("/label/api/me").json()["name"] == "ann"
    assert browser.post("/label/api/login", json={"token": token}).status_code == 200


def test_the_token_of_an_invitation_is_no_cookie(store: Store) -> None:
    new_project(store, task(1))
    browser = client(store)
    browser.cookies.set("dovetail_label_8001", invite(store, "ann"))
    assert browser.get("/label/api/me").status_code == 401


def test_two_servers_on_one_host_do_not_end_each_other_s_sessions(tmp_path: Path) -> None:
    jar: dict[str, str] = {}
    clients = []
    for port, name in ((8001, "ann"), (8002, "ben")):
        store = open_store(f"sqlite:///{tmp_path / f'{port}.db'}")
        new_project(store, task(1))
        one = client(store, port=port)
        one.post("/label/api/login", json={"token": invite(store, name)}).raise_for_status()
        jar |= dict(one.cookies.items())
        clients.append((one, name, store))
    for one, name, store in clients:
        for cookie, value in jar.items():  # browsers send a host's cookies to all its ports
            one.cookies.set(cookie, value)
        assert one.get("/label/api/me").json()["name"] == name
        store.close()


def test_revoking_ends_invitations_and_logins(store: Store) -> None:
    secret = begin_login(store, invite(store, "ann"))
    kept = begin_login(store, invite(store, "ben"))
    assert secret is not None
    assert kept is not None
    assert revoke(store, "ann") == 1
    assert person_logged_in(store, secret) is None
    assert person_logged_in(store, kept) is not None
    end_login(store, kept)
    assert person_logged_in(store, kept) is None


def test_logins_end_after_a_while(url: str) -> None:
    clock = Clock()
    store = open_store(url, clock=clock)
    token = invite(store, "ann")
    secret = begin_login(store, token)
    assert secret is not None
    clock.now += LOGIN_SECONDS - 1
    assert person_logged_in(store, secret) is not None
    clock.now += 1
    assert person_logged_in(store, secret) is None
    assert begin_login(store, token) is not None
    with store.reading() as session:
        assert session.execute(text("SELECT count(*) FROM logins")).scalar() == 1, "the old one is gone"
    store.close()


def test_links_for_the_admin_end_and_do_not_pile_up(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    store = open_store(url, clock=clock)
    new_project(store, task(1))
    tokens = []
    for _ in range(3):
        print_links(store, ["ann"], "http://127.0.0.1:8001")
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[:2])
        tokens.append({name: link.partition("token=")[2] for name, link in lines.items()})
        clock.now += 24 * 3600
    assert [person_of(store, one["admin"]) for one in tokens] == [None] * 3
    assert all(person_of(store, one["ann"]) for one in tokens), "links for annotators stay good"
    boss = person_of(store, invite(store, "admin", is_admin=True))
    assert boss is not None
    links = {speed.name: speed.links for speed in statistics(store, 1, boss.id).speeds}
    assert links == {"admin": 1, "ann": 3}
    store.close()


def test_the_database_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
        new_project(store, task(1))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert modes["labels.db"] == 0o600
    assert set(modes.values()) == {0o600}
    shared = tmp_path / "labels.db"
    shared.chmod(0o640)
    open_store(f"sqlite:///{shared}").close()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o640, "what its owner has shared stays so"


def test_invitations_of_an_older_database_stay_good(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    to_the_first = command.upgrade
    monkeypatch.setattr(database.command, "upgrade", lambda config, _head: to_the_first(config, "0001"))
    old = open_store(url)
    with old.writing() as session:
        session.execute(
            text("INSERT INTO annotators (id, name, is_admin, created_at) VALUES (1, 'ann', true, 1.0)")
        )
        digest = hashlib.sha256(b"secret").hexdigest()
        session.execute(
            text(f"INSERT INTO tokens (digest, annotator_id, created_at) VALUES ('{digest}', 1, 1.0)")
        )
    old.close()
    monkeypatch.undo()
    new = open_store(url)
    person = person_of(new, "secret")
    assert person is not None
    assert (person.name, person.is_admin) == ("ann", True)
    new.close()
