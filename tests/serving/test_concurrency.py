"""Requests beside each other: joining, leaving, waiting, and the end of the server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dovetail.cli.main import main
from dovetail.engine.forward import PackedModules
from dovetail.engine.scheduler import Load
from dovetail.model.load import save_model
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.live import CPU, Live, live, tiny_served, until

LONG: dict[str, Any] = {"model": "tiny", "prompt": "abc", "seed": 30, "stream": True, "max_tokens": 500}
"""A request that goes on for hundreds of steps: this seed draws no end token."""


def load(server: Live) -> Load:
    return server.models[0].thread.load


def test_a_request_that_arrives_during_another_ends_before_it() -> None:
    with (
        live() as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as long,
    ):
        lines = long.iter_lines()
        next(lines)
        assert server.chat(max_tokens=3).status_code == 200
        assert load(server).num_running == 1  # the long one still runs
        assert "data: [DONE]" in list(lines)


def test_many_at_once_get_what_each_gets_alone() -> None:
    def ask(server: Live, number: int) -> str:
        answer = server.chat(f"question {number}", seed=number, max_tokens=20)
        return str(answer.json()["choices"][0]["message"]["content"])

    settings = type(CPU)(device="cpu", max_running=4, max_waiting=40, cache_tokens=1024)
    with live([tiny_served(settings=settings)]) as server:
        alone = [ask(server, number) for number in range(12)]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda number: ask(server, number), range(12))) == alone


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_gives_its_pages_back(is_stream: bool) -> None:
    with live() as server:
        with httpx.Client(timeout=60) as client:
            if is_stream:
                with client.stream("POST", f"{server.url}/v1/completions", json=LONG) as response:
                    next(response.iter_lines())
                    assert load(server).num_pages > 0
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/completions", json={**LONG, "stream": False}, timeout=0.05)
        until(lambda: load(server) == Load(0, 0, 0))
        assert generated(server) < 490


def generated(server: Live) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(
        float(line.split()[-1]) for line in lines if line.startswith("dovetail_generated_tokens_total")
    )


def test_a_client_that_leaves_while_it_waits_is_never_answered() -> None:
    settings = type(CPU)(device="cpu", max_running=1, max_waiting=4, cache_tokens=1024)
    with live([tiny_served(settings=settings)]) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as long:
            lines = long.iter_lines()
            next(lines)
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60):
                until(lambda: load(server).num_waiting == 1)
            until(lambda: load(server).num_waiting == 0)
            list(lines)
        until(lambda: load(server) == Load(0, 0, 0))
        assert generated(server) == 500


def test_when_too_many_wait_the_next_is_told_to_come_back() -> None:
    settings = type(CPU)(device="cpu", max_running=1, max_waiting=1, cache_tokens=1024)
    with live([tiny_served(settings=settings)]) as server, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(server.post, "/v1/completions", **LONG) for _ in range(2)]
        until(lambda: load(server).num_running + load(server).num_waiting == 2)
        response = server.chat()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert [one.result().status_code for one in held] == [200, 200]


def test_an_engine_that_fails_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as server:
        whole = PackedModules.next_logits
        failures = [RuntimeError("out of luck")] * 2

        def failing(self: PackedModules, *arguments: Any) -> Any:
            if failures:
                raise failures.pop()
            return whole(self, *arguments)

        monkeypatch.setattr(PackedModules, "next_logits", failing)
        response = server.chat()
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "generation failed: out of luck"
        stream = server.chat(stream=True)
        assert (
            json.loads(stream.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"]
            == "engine_failed"
        )
        assert server.chat().status_code == 200


def failing_with(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
    """The next so many forwards fail."""
    whole, failures = PackedModules.next_logits, [error] * times

    def failing(self: PackedModules, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return whole(self, *arguments)

    monkeypatch.setattr(PackedModules, "next_logits", failing)


def ready(server: Live) -> tuple[int, str]:
    response = httpx.get(f"{server.url}/ready")
    return response.status_code, response.json()["status"]


def test_an_engine_that_fails_again_and_again_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with live([tiny_served("tiny"), tiny_served("other", seed=1)]) as server:
        failing_with(monkeypatch, RuntimeError("out of luck"), 3)
        assert [server.chat().status_code for _ in range(2)] == [503, 503]
        assert ready(server) == (200, "ready")
        assert server.chat().status_code == 503
        assert ready(server) == (503, "the engine of tiny has failed")
        assert server.chat(model="other").status_code == 200
        assert ready(server)[0] == 503
        assert server.chat().status_code == 200
        assert ready(server) == (200, "ready")


def test_an_engine_that_lost_its_device_has_failed_for_good(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with live([tiny_served("tiny"), tiny_served("other", seed=1)]) as server:
        failing_with(monkeypatch, torch.AcceleratorError("CUDA error: device-side assert"), 1)
        for _ in range(2):
            response = server.chat()
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_failed"
        assert "failed for good: CUDA error: device-side assert" in response.json()["error"]["message"]
        assert ready(server) == (503, "the engine of tiny has failed")
        assert server.chat(model="other").status_code == 200
    assert "CUDA error" in capfd.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), byte_tokenizer(), folder)
    return folder


def test_sigterm_finishes_what_runs_and_refuses_what_comes(folder: Path) -> None:
    script = "import sys; from dovetail.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = listening(process)
        assert url.startswith("http://127.0.0.1:")  # this machine alone, unless told otherwise
        with (
            httpx.Client(timeout=60) as other,
            httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as long,
        ):
            lines = long.iter_lines()
            next(lines)
            assert other.get(f"{url}/ready").status_code == 200
            process.send_signal(signal.SIGTERM)
            until(lambda: other.get(f"{url}/ready").status_code == 503)
            refused = other.post(f"{url}/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "stopping"
            assert "retry-after" in refused.headers
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert len(rest) > 400
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def listening(process: subprocess.Popen[str]) -> str:
    """The address that a starting server prints."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening on " in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()  # nobody waits for a reader
            return line.split("listening on ")[1].split()[0]
    raise AssertionError("".join(lines))


def test_a_port_that_is_taken_is_an_error_with_a_hint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with live() as server, pytest.raises(SystemExit) as stopped:
        main(["serve", str(folder), "--port", server.url.rsplit(":", 1)[1], "--device", "cpu"])
    assert stopped.value.code == 2
    assert "hint: choose another --port" in capsys.readouterr().err
