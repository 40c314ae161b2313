"""The labelling pages beside the chat page, with the served models' own answers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dovetail.cli.label_pages import LabelTab, label_section, served_answerers
from dovetail.cli.main import main
from dovetail.data.labels.database import open_store
from dovetail.data.labels.schema import Task
from dovetail.engine import Sampling
from dovetail.engine.scheduler import Load
from dovetail.errors import ConfigError
from dovetail.model.save import save_model
from dovetail.serving.engine_thread import EngineFailed
from dovetail.serving.labelling.supply import answer_seed
from dovetail.serving.served_model import EngineSettings, ServedModel
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.live import Live, live, tiny_served, until
from tests.serving.test_chat_completions import drawn
from tests.stages.runs import write_rows

CPU = EngineSettings(device="cpu", max_running=8, max_waiting=40, cache_tokens=4096)


@contextmanager
def with_tab(
    folder: Path, models: Sequence[ServedModel], capsys: pytest.CaptureFixture[str], *compared: str
) -> Iterator[tuple[Live, httpx.Client]]:
    """A server with the tab, and its admin, logged in."""
    rows = write_rows(folder / "prompts.jsonl", [{"prompt": f"Say {number}"} for number in range(5)])
    tab = LabelTab(f"sqlite:///{folder / 'labels.db'}", "default", str(rows), compared, None, 12)
    with label_section(tab, models, "http://127.0.0.1:1", "cpu") as section:
        link = capsys.readouterr().out.splitlines()[0]
        assert link.startswith("admin: http://127.0.0.1:1/label/#token=")
        with (
            live(models, sections=[section]) as server,
            httpx.Client(base_url=server.url, timeout=60) as admin,
        ):
            admin.post("/label/api/login", json={"token": link.partition("token=")[2]}).raise_for_status()
            admin.headers["X-Dovetail-Token"] = admin.get("/label/api/me").json()["write_token"]
            yield server, admin


def next_task(client: httpx.Client) -> dict[str, Any] | None:
    """The next one, once it is sampled; None: all are labelled."""
    for _ in range(600):
        said = client.post("/label/api/next", json={}).raise_for_status().json()
        assert said["problem"] is None
        if said["task"] is not None or not said["is_waiting"]:
            task: dict[str, Any] | None = said["task"]
            return task
        time.sleep(0.05)
    raise AssertionError("nothing was sampled")


def test_two_served_models_answer_for_labelling_while_they_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_served("sft", settings=CPU), tiny_served("ppo", seed=1, settings=CPU)]
    with with_tab(tmp_path, models, capsys, "ppo", "sft") as (server, admin):
        assert httpx.get(f"{server.url}/web/pages.json").json() == [{"title": "Label", "path": "/label/"}]
        assert "Dovetail: label" in httpx.get(f"{server.url}/label/").text
        chat = server.chat("hello", model="sft", seed=3)
        assert (
            chat.json()["choices"][0]["message"]["content"]
            == drawn([{"role": "user", "content": "hello"}], seed=3, max_new_tokens=8)[0]
        )
        while (task := next_task(admin)) is not None:
            body = {"assignment_id": task["assignment_id"], "verdict": "answer", "chosen": 0, "seconds": 1}
            assert admin.post("/label/api/labels", json=body).status_code == 201
        until(lambda: all(model.thread.load == Load(0, 0, 0) for model in models))
    store = open_store(f"sqlite:///{tmp_path / 'labels.db'}")
    with store.reading() as session:
        found = [
            (one.messages, [(a.model, a.seed, a.text) for a in one.answers]) for one in session.query(Task)
        ]
    assert len(found) >= 3  # random bytes that no database holds are left out
    for messages, answers in found:
        seeds = [answer_seed(0, messages, position) for position in range(2)]
        assert answers == [
            ("ppo", seeds[0], drawn(messages, seed=seeds[0], model_seed=1)[0]),
            ("sft", seeds[1], drawn(messages, seed=seeds[1])[0]),
        ]
    store.close()


def test_the_answers_come_from_the_served_weights_and_no_others() -> None:
    models = [tiny_served("sft"), tiny_served("ppo", seed=1)]
    assert [answerer.complete for answerer in served_answerers(models, [])] == [models[0].thread.complete]  # type: ignore[attr-defined]
    both = served_answerers(models, ["ppo", "sft"])
    assert [answerer.complete for answerer in both] == [models[1].thread.complete, models[0].thread.complete]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--compare rm: no served model has that name") as caught:
        served_answerers(models, ["rm"])
    assert caught.value.hint == "there are: sft, ppo"
    with pytest.raises(ConfigError, match="was given 3 times"):
        served_answerers(models, ["sft", "ppo", "sft"])


def test_labelling_waits_for_places_and_takes_none_from_those_who_wait() -> None:
    settings = EngineSettings(device="cpu", max_running=1, max_waiting=1, cache_tokens=1024)
    with live([tiny_served(settings=settings)]) as server:
        thread = server.models[0].thread
        prompts = [list(f"question {number}".encode()) for number in range(6)]
        found = thread.complete(prompts, Sampling(max_new_tokens=8), range(6), lambda: False)
        assert [(len(one.token_ids), one.finish_reason) for one in found] == [(8, "length")] * 6
        alone = thread.complete(prompts[5:], Sampling(max_new_tokens=8), [5], lambda: False)
        assert alone == found[5:]


def test_labelling_that_is_stopped_leaves_the_batch_at_once() -> None:
    with live() as server:
        thread, stopped = server.models[0].thread, threading.Event()
        ids = list(b"abc")
        threading.Timer(0.2, stopped.set).start()
        found = thread.complete([ids] * 6, Sampling(max_new_tokens=500), range(6), stopped.is_set)
        assert any(one.finish_reason == "cancelled" for one in found)
        until(lambda: thread.load == Load(0, 0, 0))


def test_an_engine_that_fails_ends_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as server:
        thread = server.models[0].thread
        monkeypatch.setattr("dovetail.engine.paged.PagedGeneration._step", lambda *_: 1 / 0)
        with pytest.raises(EngineFailed, match="generation failed: division by zero"):
            thread.complete([[1, 2]], Sampling(max_new_tokens=5), [0], lambda: False)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (["--prompts", "prompts.jsonl"], "--store sqlite:///labels.db"),
        (["--store", "sqlite:///labels.db", "--compare", "sft"], "--prompts prompts.jsonl"),
    ],
)
def test_flags_that_need_another_say_so(
    flags: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "none", *flags])
    assert stopped.value.code == 2
    assert missing in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_chat_and_labelling_on_one_port(tmp_path: Path) -> None:
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "tiny")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}"} for number in range(3)])
    flags = ["--store", f"sqlite:///{tmp_path / 'labels.db'}", "--prompts", str(rows)]
    script = "import sys; from dovetail.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "serve", str(tmp_path / "tiny"), "--port", "0", *flags]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "8", "--device", "cpu"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url, _, token = process.stdout.readline().strip().removeprefix("admin: ").partition("/label/#token=")
        with httpx.Client(base_url=url, timeout=60) as admin:
            admin.post("/label/api/login", json={"token": token}).raise_for_status()
            admin.headers["X-Dovetail-Token"] = admin.get("/label/api/me").json()["write_token"]
            assert next_task(admin) is not None
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            assert admin.post("/v1/chat/completions", json=body).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
