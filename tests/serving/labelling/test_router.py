import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dovetail.data.labels.annotators import invite
from dovetail.data.labels.database import Store, open_store
from dovetail.data.labels.labels import list_labels
from dovetail.serving.labelling.router import SupplyState, labelling_router
from dovetail.serving.labelling.server import labelling_app
from tests.serving.labelling.work import new_project, task

LogIn = Callable[..., TestClient]
SCRIPT = "<script>alert(1)</script>"
SQL = "'); DROP TABLE labels; --"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    yield opened
    opened.close()


@pytest.fixture
def log_in(store: Store) -> LogIn:
    """A client that is logged in under a name; the first call makes a project of three tasks."""
    project = new_project(store, task(1, "good 1", SCRIPT), task(2), task(3), overlap=2)

    def client_of(
        name: str | None, *, is_admin: bool = False, state: SupplyState | None = None
    ) -> TestClient:
        router = labelling_router(store, project, supply=lambda: state or SupplyState())
        client = TestClient(labelling_app(router), base_url="http://127.0.0.1")
        if name is not None:
            token = invite(store, name, is_admin=is_admin)
            assert client.post("/label/api/login", json={"token": token}).status_code == 200
            client.headers["X-Dovetail-Token"] = client.get("/label/api/me").json()["write_token"]
        return client

    return client_of


def served(client: TestClient) -> dict[str, Any]:
    task: dict[str, Any] = client.post("/label/api/next", json={}).json()["task"]
    return task


def tie(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"assignment_id": task["assignment_id"], "verdict": "tie", "seconds": 2.5, **changes}


def test_a_session_from_login_to_the_last_task(log_in: LogIn) -> None:
    ann = log_in("ann")
    for number in (1, 2, 3):
        task = served(ann)
        assert task["messages"] == [{"role": "user", "content": f"Question {number}?"}]
        assert 1700 < task["seconds_left"] <= 1800
        kept = ann.post("/label/api/labels", json=tie(task, note="hm", ratings=[4, None]))
        assert kept.status_code == 201
        assert kept.json() == {"label_id": number}
    last = ann.post("/label/api/next", json={}).json()
    assert last["task"] is None
    assert last["is_waiting"] is False
    assert last["progress"] == {"own_labels": 3, "labels": 3, "wanted": 6}


def test_models_and_scores_never_leave_the_server(log_in: LogIn) -> None:
    ann = log_in("ann")
    responses = [ann.post("/label/api/next", json={}), ann.get("/label/api/me")]
    ann.post("/label/api/labels", json=tie(responses[0].json()["task"]))
    responses += [ann.get("/label/api/labels"), ann.post("/label/api/undo", json={})]
    assert all(r.status_code == 200 for r in responses)
    assert not any("model" in r.text or "seed" in r.text for r in responses)


def test_an_annotator_sees_only_their_own_work(log_in: LogIn) -> None:
    ann, ben = log_in("ann"), log_in("ben")
    of_ann = served(ann)
    ann.post("/label/api/labels", json=tie(of_ann, note="mine"))
    assert [line["note"] for line in ann.get("/label/api/labels").json()] == ["mine"]
    assert ben.get("/label/api/labels").json() == []
    assert ben.post("/label/api/labels", json=tie(of_ann)).status_code == 404
    assert ben.post("/label/api/skip", json={"assignment_id": of_ann["assignment_id"]}).status_code == 404
    assert ben.post("/label/api/undo", json={}).status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "admin/overview", None),
        ("GET", "admin/labels", None),
        ("GET", "admin/export", None),
        ("POST", "admin/labels/1/void", {"reason": "no"}),
        ("POST", "admin/annotators", {"name": "eve"}),
        ("POST", "admin/annotators/revoke", {"name": "ann"}),
    ],
)
def test_admin_routes_are_for_admins(log_in: LogIn, method: str, path: str, body: Any) -> None:
    assert log_in(None).request(method, f"/label/api/{path}", json=body).status_code == 401
    refused = log_in("ann").request(method, f"/label/api/{path}", json=body)
    assert refused.status_code == 403
    assert "admin" in refused.json()["error"]["message"]


def test_an_admin_sees_voids_invites_and_exports(log_in: LogIn, store: Store) -> None:
    ann, boss = log_in("ann"), log_in("boss", is_admin=True)
    for verdict in ("bad", "good"):
        task = served(ann)
        shown = [answer.startswith("good") for answer in task["answers"]].index(verdict == "good")
        ann.post("/label/api/labels", json=tie(task, verdict="answer", chosen=shown))
    assert len(boss.get("/label/api/admin/labels").json()) == 2
    voided = boss.post("/label/api/admin/labels/1/void", json={"reason": "it hit the wrong key"})
    assert voided.status_code == 200
    assert boss.post("/label/api/admin/labels/1/void", json={"reason": "again"}).status_code == 409
    lines = boss.get("/label/api/admin/labels").json()
    assert [(line["id"], line["void"]) for line in lines] == [(2, None), (1, "it hit the wrong key")]
    (line,) = boss.get("/label/api/admin/labels", params={"before": 2}).json()
    assert line["chosen"] == SCRIPT
    rows = [json.loads(row) for row in boss.get("/label/api/admin/export").text.splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("good 2", "bad 2")]
    invited = boss.post("/label/api/admin/annotators", json={"name": "eve"})
    assert invited.status_code == 201
    eve = log_in(None)
    assert eve.post("/label/api/login", json={"token": invited.json()["token"]}).status_code == 200
    assert eve.get("/label/api/me").json()["is_admin"] is False
    speeds = {one["name"]: one for one in boss.get("/label/api/admin/overview").json()["speeds"]}
    assert speeds["ann"] == {"name": "ann", "is_admin": False, "labels": 1, "median_seconds": 2.5, "links": 1}
    assert speeds["eve"]["labels"] == 0


def test_an_admin_revokes_links_and_not_their_own(log_in: LogIn, store: Store) -> None:
    ann, boss = log_in("ann"), log_in("boss", is_admin=True)
    invite(store, "ann")
    ann.post("/label/api/labels", json=tie(served(ann)))
    revoke = "/label/api/admin/annotators/revoke"
    assert boss.post(revoke, json={"name": "ann"}).json() == {"links": 2}
    assert ann.get("/label/api/me").status_code == 401
    assert ann.post("/label/api/next", json={}).status_code == 401
    assert len(list_labels(store, 1)) == 1
    (speed,) = (s for s in boss.get("/label/api/admin/overview").json()["speeds"] if s["name"] == "ann")
    assert (speed["labels"], speed["links"]) == (1, 0)
    assert boss.post(revoke, json={"name": "nobody"}).status_code == 404
    assert boss.post(revoke, json={"name": " boss"}).status_code == 409
    assert boss.get("/label/api/me").status_code == 200
    assert log_in("ann").get("/label/api/me").status_code == 200


def test_waiting_and_failing_supplies_are_told(log_in: LogIn) -> None:
    ann = log_in("ann", state=SupplyState(is_sampling=True))
    while (task := served(ann)) is not None:
        ann.post("/label/api/skip", json={"assignment_id": task["assignment_id"]})
    assert ann.post("/label/api/next", json={}).json()["is_waiting"] is True
    problem = SupplyState(problem="out of memory")
    assert log_in("ann", state=problem).post("/label/api/next", json={}).json()["problem"] == "out of memory"


def test_tokens_are_asked_for_and_not_kept(log_in: LogIn, store: Store, tmp_path: Path) -> None:
    stranger = log_in(None)
    for path in ("me", "labels"):
        assert stranger.get(f"/label/api/{path}").status_code == 401
    for path in ("next", "labels", "skip", "undo"):
        assert stranger.post(f"/label/api/{path}", json={}).status_code == 401
    for wrong in ("x", "é" * 43, "a" * 43):
        refused = stranger.post("/label/api/login", json={"token": wrong})
        assert refused.status_code == 401
        assert "invitation" in refused.json()["error"]["message"]
        assert stranger.cookies == {}
    token = invite(store, "ann")
    store.close()
    assert not any(token.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_a_request_without_the_page_s_token_changes_nothing(log_in: LogIn, store: Store) -> None:
    ann = log_in("ann")
    task = served(ann)
    for header in ("", "wrong", log_in("ben").headers["X-Dovetail-Token"]):
        refused = ann.post("/label/api/labels", json=tie(task), headers={"X-Dovetail-Token": header})
        assert refused.status_code == 403
    assert list_labels(store, 1) == []
    cookie = log_in(None).post("/label/api/login", json={"token": invite(store, "eve")}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/label;" in cookie


def test_logging_out_forgets_the_cookie(log_in: LogIn) -> None:
    ann = log_in("ann")
    ann.post("/label/api/logout", json={})
    assert ann.get("/label/api/me").status_code == 401


BAD_BODIES = {
    "malformed": b"{",
    "not UTF-8": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1, "note": "\xff"}',
    "a list": b"[]",
    "nothing": b"",
    "negative seconds": b'{"assignment_id": 2, "verdict": "tie", "seconds": -1}',
    "endless seconds": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1e999}',
    "no number of seconds": b'{"assignment_id": 2, "verdict": "tie", "seconds": NaN}',
    "negative id": b'{"assignment_id": -1, "verdict": "tie", "seconds": 1}',
    "huge id": b'{"assignment_id": 99999999999999999999999999, "verdict": "tie", "seconds": 1}',
    "negative answer": b'{"assignment_id": 2, "verdict": "answer", "chosen": -1, "seconds": 1}',
    "no such answer": b'{"assignment_id": 2, "verdict": "answer", "chosen": 2, "seconds": 1}',
    "unknown verdict": b'{"assignment_id": 2, "verdict": "maybe", "seconds": 1}',
    "unknown field": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1, "model": "x"}',
    "rating of 9": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1, "ratings": [9, 1]}',
    "half a character": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1, "note": "\\ud800"}',
    "half a verdict": b'{"assignment_id": 2, "verdict": "\\ud800", "seconds": 1}',
    "nul": b'{"assignment_id": 2, "verdict": "tie", "seconds": 1, "note": "\\u0000"}',
    "long note": json.dumps(
        {"assignment_id": 2, "verdict": "tie", "seconds": 1, "note": "x" * 100_001}
    ).encode(),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_bodies_are_refused_and_nothing_is_lost(log_in: LogIn, store: Store, body: bytes) -> None:
    ann = log_in("ann")
    task = served(ann)
    ann.post("/label/api/labels", json=tie(task))
    assert served(ann)["assignment_id"] == 2
    refused = ann.post("/label/api/labels", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["message"]
    assert [line.id for line in list_labels(store, 1)] == [1]
    assert served(ann)["assignment_id"] == 2


@pytest.mark.parametrize("has_length", [True, False])
def test_oversized_bodies_are_refused(log_in: LogIn, has_length: bool) -> None:
    ann = log_in("ann")
    body = json.dumps(tie(served(ann), note="x" * 2**20)).encode()
    content = body if has_length else iter([body[:1000], body[1000:]])
    refused = ann.post("/label/api/labels", content=content, headers={"Content-Type": "application/json"})
    assert refused.status_code == 413
    assert "524288 bytes" in refused.json()["error"]["message"]


def test_sql_and_scripts_are_text(log_in: LogIn, store: Store) -> None:
    ann = log_in("ann")
    task = served(ann)
    assert SCRIPT in task["answers"]
    kept = ann.post("/label/api/labels", json=tie(task, note=SQL, edited=SCRIPT + "!"))
    assert kept.status_code == 201
    (line,) = ann.get("/label/api/labels").json()
    assert (line["note"], line["edited"]) == (SQL, SCRIPT + "!")
    assert list_labels(store, 1)[0].note == SQL
    boss = log_in("boss", is_admin=True)
    assert boss.post("/label/api/admin/annotators", json={"name": SQL}).status_code == 201
    assert list_labels(store, 1)[0].note == SQL


@pytest.mark.parametrize(
    "path",
    ["files/../router.py", "files/..%2frouter.py", "files/%2e%2e/router.py", "files//etc/passwd", "files/x.js",
     "files/%00", "api/admin/labels/-1/void", "api/none"],
)  # fmt: skip
def test_paths_lead_nowhere_else(log_in: LogIn, path: str) -> None:
    found = log_in("boss", is_admin=True).get(f"/label/{path}")
    assert found.status_code in (404, 405)
    assert "import" not in found.text


@pytest.mark.parametrize(
    "path", ["admin/labels?before=-1", "admin/labels?before=0", "labels?before=x", "labels?before=9e99"]
)
def test_bad_pages_of_lists_are_refused(log_in: LogIn, path: str) -> None:
    assert log_in("boss", is_admin=True).get(f"/label/api/{path}").status_code == 422


@pytest.mark.parametrize(
    "path", ["", "admin", "files/style.css", "files/label.js", "files/icon.svg", "api/me", "files/x"]
)
def test_every_response_keeps_the_browser_here(log_in: LogIn, path: str) -> None:
    policy = log_in(None).get(f"/label/{path}").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_pages_load_nothing_from_elsewhere(log_in: LogIn) -> None:
    client = log_in(None)
    assert client.get("/").url.path == client.get("/label").url.path == "/label/"
    for page in ("", "admin", "files/label.js", "files/admin.js", "files/server.js", "files/style.css"):
        text = client.get(f"/label/{page}").text
        assert "//" not in text.replace("\n// ", "").replace("; // ", "")[2:]
        assert "innerHTML" not in text
        assert "onclick" not in text
