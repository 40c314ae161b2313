"""What is said of a name that is neither here nor on the hub: at once, after one question."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
from huggingface_hub import constants

from dovetail.errors import DataError, ModelError
from dovetail.text.hub_names import expect_available


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, one gated model and nothing else."""

    asked: list[str]

    def do_HEAD(self) -> None:
        type(self).asked.append(self.path)
        status, code = 404, "RepoNotFound"
        if "/owner/there/" in self.path:
            status, code = 200, ""
        elif "/owner/gated/" in self.path:
            status, code = 403, "GatedRepo"
        elif "/owner/bare/" in self.path:
            code = "EntryNotFound"
        self.send_response(status)
        headers = {"X-Error-Code": code, "ETag": '"1"', "X-Repo-Commit": "1" * 40, "Content-Length": "0"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second attempt would wait before it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("asked again"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> Iterator[list[str]]:
    """The paths that a hub on this machine was asked for."""
    Hub.asked = []
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(given: str, kind: Literal["model", "dataset"] = "model") -> tuple[str, str]:
    with pytest.raises((ModelError, DataError)) as caught:
        expect_available(given, kind=kind, error=ModelError if kind == "model" else DataError)
    return caught.value.message, str(caught.value.hint)


@pytest.mark.parametrize("name", ["owner/there", "owner/bare"])
def test_a_repository_of_the_hub_is_available_whatever_files_it_has(hub: list[str], name: str) -> None:
    expect_available(name, kind="model", error=ModelError)
    assert hub == [f"/{name}/resolve/main/config.json"]


def test_a_name_that_the_hub_lacks_is_told_after_one_question(hub: list[str]) -> None:
    message, hint = refusal("owner/mistyped")
    assert (
        f"owner/mistyped cannot be loaded: there is no such file or folder, and {constants.ENDPOINT} has"
        in message
    )
    assert "check the name" in hint
    assert hub == ["/owner/mistyped/resolve/main/config.json"]
    message, _ = refusal("owner/mistyped", "dataset")
    assert hub[1:] == ["/datasets/owner/mistyped/resolve/main/README.md"]


def test_a_gated_name_leads_to_the_login(hub: list[str]) -> None:
    message, hint = refusal("owner/gated")
    assert "is gated" in message
    assert "hf auth login" in hint


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_without_network_mirrors_and_folders_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, no_waiting: None, kind: Literal["model", "dataset"]
) -> None:
    point_at("http://127.0.0.1:1", monkeypatch)
    message, hint = refusal("owner/there", kind)
    assert "http://127.0.0.1:1 cannot be reached" in message
    assert "HF_ENDPOINT to a mirror" in hint
    assert "--local-dir FOLDER" in hint
    assert ("--repo-type dataset" in hint) == (kind == "dataset")


@pytest.mark.parametrize("wrong", ["runs/mymodle", "mymodle"])
def test_a_mistyped_path_names_the_folder_that_is_there(
    monkeypatch: pytest.MonkeyPatch, hub: list[str], tmp_path: Path, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    right = tmp_path / Path(wrong).with_name("mymodel")
    right.mkdir(parents=True)
    assert refusal(wrong)[1].startswith(f"did you mean {right.relative_to(tmp_path)}?")
    expect_available(str(right), kind="model", error=ModelError)


@pytest.mark.parametrize("wrong", ["./mymodle", "~/nowhere/mymodle", "/nowhere/mymodle", "runs/a/mymodle"])
def test_what_can_only_be_a_path_is_never_asked_for(hub: list[str], wrong: str) -> None:
    assert "does not exist" in refusal(wrong)[0]
    assert hub == []
