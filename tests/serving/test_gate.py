"""Keys, rates, origins, health and figures."""

from __future__ import annotations

import hashlib
import socket
import stat
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import APIRouter
from prometheus_client.parser import text_string_to_metric_families

from dovetail.cli.main import main
from dovetail.errors import ConfigError
from dovetail.serving.app import Section
from dovetail.serving.gate import Rate, RequestLimits
from dovetail.serving.keys import ApiKeys, add_key, hash_of, read_keys
from tests.serving.live import live, until


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.txt"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    text = file.read_text()
    assert alice not in text
    assert text.splitlines()[1] == f"bob sha256:{hashlib.sha256(bob.encode()).hexdigest()}"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = read_keys(file)
    assert [keys.owner(key) for key in (alice, bob, alice[:-1], "", "\xff")] == [
        "alice",
        "bob",
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("dt-secret\n", "line 1: not of the form"),
        ("a sha256:12\n", "line 1: not of the form"),
        (f"a sha256:{hash_of('x')}\na sha256:{hash_of('y')}\n", "line 2: the name a occurs twice"),
    ],
)
def test_a_key_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert says in caught.value.message
    assert "secret" not in str(caught.value)
    assert "api-key" in str(caught.value.hint) or "own name" in str(caught.value.hint)


@pytest.mark.parametrize("behind", ["", "  # her laptop"])
def test_a_key_gets_a_line_of_its_own(tmp_path: Path, behind: str) -> None:
    file = tmp_path / "keys"
    alice = add_key(file, "alice")
    file.write_text(file.read_text().strip() + behind)
    bob = add_key(file, "bob")
    keys = read_keys(file)
    assert (keys.owner(alice), keys.owner(bob)) == ("alice", "bob")


def test_the_command_prints_a_new_key_once_and_refuses_a_name_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "keys")
    for name, code in (("alice", 0), ("alice", 2), ("not a name", 2)):
        with pytest.raises(SystemExit) as stopped:
            main(["api-key", file, name])
        assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert read_keys(Path(file)).owner(out.strip()) == "alice"
    assert "has a key named alice already" in err


def test_only_a_known_key_opens_the_api() -> None:
    with live(keys=ApiKeys({"alice": hash_of("right")})) as server:
        for headers, code in (
            ({}, "missing_api_key"),
            ({"Authorization": "Bearer wrong"}, "invalid_api_key"),
            ({"Authorization": "Basic right"}, "missing_api_key"),
            ({"Authorization": "Bearer \xff"}, "invalid_api_key"),
        ):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            for path in ("/v1/models", "/metrics"):
                response = httpx.get(server.url + path, headers=encoded)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == code
                assert response.json()["error"]["type"] == "authentication_error"
        assert [httpx.get(server.url + path).status_code for path in ("/health", "/ready", "/")] == [200] * 3
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_a_caller_above_the_rate_waits_and_others_do_not() -> None:
    now = 0.0
    rate = Rate(3, clock=lambda: now)
    assert [rate.wait("a") for _ in range(3)] == [0, 0, 0]
    assert rate.wait("a") == 20.0
    assert rate.wait("b") == 0
    now = 20.0
    assert [rate.wait("a"), rate.wait("a")] == [0, 20]
    now = 1000.0
    assert [rate.wait("a") for _ in range(4)] == [0, 0, 0, 20]


def test_callers_long_gone_are_forgotten() -> None:
    now = 0.0
    rate = Rate(60, clock=lambda: now)
    for number in range(10_000):
        rate.wait(f"caller {number}")
    now = 100.0
    rate.wait("another")
    assert len(rate._buckets) == 1


def test_too_many_requests_get_429_and_when_to_come_back() -> None:
    with live(limits=RequestLimits(requests_per_minute=2)) as server:
        assert [server.chat().status_code for _ in range(2)] == [200, 200]
        response = server.chat()
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 31
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_wrong_keys_count_and_right_ones_go_on() -> None:
    limits, keys = RequestLimits(requests_per_minute=2), ApiKeys({"alice": hash_of("right")})
    with live(limits=limits, keys=keys) as server:

        def status(key: str, path: str = "/v1/models") -> int:
            return httpx.get(server.url + path, headers={"Authorization": f"Bearer {key}"}).status_code

        assert [status("a"), status("b", "/metrics"), status("c"), status("d", "/metrics")] == [
            401,
            401,
            429,
            429,
        ]
        assert status("right") == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_logins_of_other_pages_count() -> None:
    router = APIRouter()

    @router.post("/mine/login")
    async def log_in() -> str:
        return "in"

    @router.post("/mine/work")
    async def work() -> str:
        return "done"

    section = Section("Mine", "/mine", router, logins=("/mine/login",))
    with live(limits=RequestLimits(requests_per_minute=2), sections=[section]) as server:
        assert [httpx.post(f"{server.url}/mine/login").status_code for _ in range(4)] == [200, 200, 429, 429]
        assert [httpx.post(f"{server.url}/mine/work").status_code for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/web/chat.js", "/v1/models"])
def test_head_is_answered_where_get_is_without_the_body(path: str) -> None:
    with live() as server:
        head, get = httpx.head(server.url + path), httpx.get(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert httpx.head(f"{server.url}/none").status_code == 404


@pytest.mark.parametrize("origins", [(), ("http://page.example",)])
def test_pages_of_other_origins_are_let_in_by_name_only(origins: tuple[str, ...]) -> None:
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    with live(cors_origins=origins) as server:
        response = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
        allowed = response.headers.get("access-control-allow-origin")
        other = httpx.get(f"{server.url}/health", headers={"Origin": "http://other.example"})
    assert allowed == (origins[0] if origins else None)
    assert "access-control-allow-origin" not in other.headers


def test_a_client_that_leaves_in_the_middle_of_its_body_is_not_read_as_a_shorter_one() -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with live() as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head + b'{"model": "tiny"}')
        until(lambda: 'status="499"' in httpx.get(f"{server.url}/metrics").text)
        assert 'status="400"' not in httpx.get(f"{server.url}/metrics").text


def test_the_figures_count_requests_tokens_and_load() -> None:
    with live() as server:
        assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
        used = [server.chat(seed=seed).json()["usage"] for seed in range(3)]
        server.chat(n=0)
        text = httpx.get(f"{server.url}/metrics").text
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    route = "/v1/chat/completions"
    assert values["dovetail_requests_total", route, "200"] == 3
    assert values["dovetail_requests_total", route, "400"] == 1
    assert values["dovetail_prompt_tokens_total", "tiny"] == sum(one["prompt_tokens"] for one in used)
    assert values["dovetail_generated_tokens_total", "tiny"] == sum(one["completion_tokens"] for one in used)
    assert values["dovetail_first_token_seconds_count", "tiny"] == 3
    assert values["dovetail_running_answers", "tiny"] == 0
