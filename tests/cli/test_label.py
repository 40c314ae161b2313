import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.data.labels.annotators import person_of
from dovetail.data.labels.database import open_store
from dovetail.data.labels.schema import Task
from tests.serving.labelling.served import a_label, served
from tests.serving.labelling.work import new_project, task
from tests.stages.runs import save_tiny_model, write_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `dovetail label ...` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["label", *arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run_command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("a", "b", "c", "--prompts", "p.jsonl"), "3 models were given"),
        (("a",), "--prompts is missing"),
        (("--prompts", "p.jsonl"), "--prompts needs a model"),
        (("--uncertain-first", "a"), "--uncertain-first scores answers when they are sampled"),
        (("--guidelines", "none.txt"), "--guidelines none.txt"),
        (("--store", "labels.db"), "is not the URL of a database"),
        (("a", "--prompts", "none.jsonl"), "there is no such file"),
        (("export",), "there is no file labels.db"),
        (("invite", " "), "the name has 0 characters"),
        (("revoke", "ann"), "there is no file labels.db"),
        (("--tls-key", "key.pem"), "--tls-key key.pem has no certificate"),
    ],
)
def test_mistakes_are_explained(run: Run, arguments: tuple[str, ...], problem: str) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert problem in errors
    assert "hint: " in errors


def test_a_port_that_is_taken_is_explained(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, errors = run("--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "cannot listen on 127.0.0.1" in errors


def test_invitations_work_and_an_export_is_written(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("invite", "ann")
    assert code == 0
    store = open_store("sqlite:///labels.db")
    person = person_of(store, out.strip())
    assert person is not None
    assert (person.name, person.is_admin) == ("ann", False)
    new_project(store, task(1))
    store.close()
    code, out, _ = run("export", "-o", "rows.jsonl")
    assert (code, out) == (0, "written: rows.jsonl, 0 comparisons\n")
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_a_revoked_invitation_lets_nobody_in_and_another_one_does(run: Run) -> None:
    first, second = run("invite", "ann")[1].strip(), run("invite", "ann")[1].strip()
    assert run("revoke", "ann")[1] == "ann: 2 invitations revoked\n"
    code, _, errors = run("revoke", "ben")
    assert code == 2
    assert "there is no annotator 'ben'" in errors
    assert "there are: ann" in errors
    third = run("invite", "ann")[1].strip()
    store = open_store("sqlite:///labels.db")
    assert [person_of(store, token) is None for token in (first, second, third)] == [True, True, False]
    store.close()


@pytest.mark.slow
def test_a_model_s_answers_are_labelled_while_more_are_sampled(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    model = str(save_tiny_model(tmp_path / "model"))
    other = str(save_tiny_model(tmp_path / "other", seed=1))
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}"} for number in range(5)])
    more = [
        "--prompts",
        str(rows),
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--seed",
        "3",
    ]
    with served(url, ["ann"], model, other, *more, "--overlap", "2") as server, server.client("ann") as ann:
        seen = []
        while len(seen) < 5:
            found = ann.post("next", json={}).json()
            assert found["problem"] is None
            if found["task"] is None:
                assert found["is_waiting"]
                time.sleep(0.1)
                continue
            seen.append(found["task"]["messages"][0]["content"])
            ann.post("labels", json=a_label(found["task"], "fine")).raise_for_status()
        assert sorted(seen) == [f"Say {number}" for number in range(5)]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    store = open_store(url)
    with store.reading() as session:
        answers = [(answer.model, answer.position) for one in session.query(Task) for answer in one.answers]
    assert answers == [(model, 0), (other, 1)] * 5
    store.close()
    file = tmp_path / "pairs.jsonl"
    with pytest.raises(SystemExit):
        main(["label", "export", "--store", url, "--output", str(file)])
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["note"] for row in written} == {"fine"}
    assert {row["chosen_model"] for row in written} | {row["rejected_model"] for row in written} == {
        model,
        other,
    }
