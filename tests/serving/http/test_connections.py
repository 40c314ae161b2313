"""Clients that are slow, silent or speak no HTTP, over real sockets."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from dovetail.data.labels.database import open_store
from dovetail.serving.http import connections
from dovetail.serving.http.listening import server_config
from dovetail.serving.labelling.router import labelling_router
from dovetail.serving.labelling.server import labelling_app
from tests.serving.live import Live, live, until
from tests.serving.test_concurrency import LONG

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE_SECONDS", 0.1)


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
        yield connection


def said(connection: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    parts = iter(lambda: connection.recv(1 << 16), b"")
    return b"".join(parts)


def problem(response: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = response.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), error


def test_a_connection_on_which_nobody_speaks_is_closed(impatient: None) -> None:
    with live() as server, connected(server.url) as first, connected(server.url) as second:
        assert (said(first), said(second)) == (b"", b"")


@pytest.mark.parametrize(
    "part",
    [
        b"P",
        b"GET /health HTTP/1.1\r\nHost: local",
        HEAD,
        HEAD + b"Content-Length: 99\r\n\r\n",
        HEAD + b'Content-Length: 99\r\n\r\n{"model": "tiny"',
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
    ],
)
def test_a_request_that_stays_unfinished_is_told_so_and_closed(
    impatient: None, capfd: pytest.CaptureFixture[str], part: bytes
) -> None:
    with live() as server, connected(server.url) as connection:
        connection.sendall(part)
        status, error = problem(said(connection))
        assert (status, error["code"]) == (408, "request_timeout")
        assert server.app.state.drain.num_open == 0
    assert capfd.readouterr().err == ""


def test_a_client_that_begins_its_next_request_has_to_finish_it(impatient: None) -> None:
    with live() as server, connected(server.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /heal")
        assert problem(said(connection))[0] == 408


def test_an_answer_may_take_longer_than_a_request(impatient: None) -> None:
    with live() as server:
        text = server.post("/v1/completions", **LONG).text
        assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "wrong", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", HEAD + b"Content-Length: x\r\n\r\n"]
)
def test_what_is_no_http_is_refused_in_the_form_of_other_errors(
    capfd: pytest.CaptureFixture[str], wrong: bytes
) -> None:
    with live() as server, connected(server.url) as connection:
        connection.sendall(wrong)
        status, error = problem(said(connection))
        assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_http")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("part", [b"", b"GET /hea", HEAD + b'Content-Length: 99\r\n\r\n{"model"'])
def test_an_unfinished_request_does_not_hold_up_the_end(
    capfd: pytest.CaptureFixture[str], part: bytes
) -> None:
    with live() as server, connected(server.url) as connection:
        if part:
            connection.sendall(part)
        assert httpx.get(f"{server.url}/health").status_code == 200  # the server has read the part by now
        server.server.handle_exit(signal.SIGTERM, None)
        response = said(connection)
        if b"Content-Length" in part:
            assert problem(response)[1]["code"] == "stopping"
    assert "Traceback" not in capfd.readouterr().err


def leave_in_a_stream(server: Live) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
        next(response.iter_lines())


def leave_while_waiting(server: Live) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": False}, timeout=0.05)


def leave_in_a_body(server: Live) -> None:
    with connected(server.url) as connection:
        connection.sendall(HEAD + b'Content-Length: 99\r\n\r\n{"model"')


@pytest.mark.parametrize("leave", [leave_in_a_stream, leave_while_waiting, leave_in_a_body])
def test_clients_that_leave_make_no_noise(capfd: pytest.CaptureFixture[str], leave: Any) -> None:
    with live() as server:
        leave(server)
        until(lambda: server.app.state.drain.num_open == 0 and server.models[0].thread.load.is_idle)
        assert server.chat().status_code == 200
    assert capfd.readouterr().err == ""


def test_answers_cut_off_at_the_end_make_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        live() as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response,
    ):
        next(response.iter_lines())
        for _ in range(2):
            server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not server.models[0].thread.can_answer)
    assert "Traceback" not in capfd.readouterr().err


@contextmanager
def running(app: Any) -> Iterator[tuple[uvicorn.Server, str]]:
    """An application of somebody else behind such connections."""
    server = uvicorn.Server(server_config(app, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_a_client_that_does_not_read_is_left(impatient: None) -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})

    with running(endless) as (server, url), connected(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.server_state.connections)
        until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("leaves", [True, False])
def test_the_labelling_pages_are_as_patient_and_as_quiet(
    impatient: None, capfd: pytest.CaptureFixture[str], tmp_path: Path, leaves: bool
) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    with running(labelling_app(labelling_router(store, 1))) as (server, url):
        with connected(url) as connection:
            head = b"POST /label/api/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b'Content-Length: 99\r\n\r\n{"token"')
            if not leaves:
                assert problem(said(connection))[0] == 408
        until(lambda: not server.server_state.connections and not server.server_state.tasks)
    store.close()
    assert capfd.readouterr().err == ""
