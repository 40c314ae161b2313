"""Which of several deaths is told: the one that the others follow from."""

import json
import signal
from pathlib import Path

import pytest

from dovetail.errors import DataError
from dovetail.launch.failures import first_failure
from dovetail.launch.logs import RankLogs
from dovetail.launch.rank import ERROR_FILE, record


@pytest.fixture
def logs(tmp_path: Path) -> RankLogs:
    started = RankLogs(tmp_path, before_restart=lambda ranks, number: None)
    started.reify({local: {"RANK": str(local + 4)} for local in range(3)})
    return started


def died_of(error: Exception, logs: RankLogs, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_FILE, str(logs.error_file(rank)))
    record(error)


def test_an_error_comes_before_the_peers_that_lost_a_connection(
    logs: RankLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    died_of(RuntimeError("Connection closed by peer [127.0.0.1]:4"), logs, 4, monkeypatch)
    died_of(DataError("row 7 is bad", hint="mend it"), logs, 5, monkeypatch)
    told = first_failure({4: 1, 5: 2, 6: -signal.SIGTERM}, logs)
    assert (told.message, told.hint, told.exit_code) == ("rank 5: row 7 is bad", "mend it", 2)


def test_a_killed_process_comes_before_all_that_follows(
    logs: RankLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    died_of(RuntimeError("something else broke"), logs, 4, monkeypatch)
    told = first_failure({4: 1, 5: -signal.SIGTERM, 6: -signal.SIGKILL}, logs)
    assert told.message.startswith("rank 6 was killed by SIGKILL")
    assert told.exit_code == 3


def test_a_lost_connection_alone_points_to_the_others(
    logs: RankLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    died_of(RuntimeError("Connection reset by peer"), logs, 5, monkeypatch)
    told = first_failure({5: 1}, logs)
    assert "another process was lost" in str(told.hint)
    assert told.exit_code == 3


def test_the_earlier_of_two_errors_is_told(logs: RankLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, when in ((4, 200), (5, 100)):
        died_of(ValueError(f"at {when}"), logs, rank, monkeypatch)
        report = json.loads(logs.error_file(rank).read_text())
        report["message"]["extraInfo"]["timestamp"] = str(when)
        logs.error_file(rank).write_text(json.dumps(report))
    assert first_failure({4: 1, 5: 1}, logs).message == "rank 5: ValueError: at 100"


def test_the_first_error_of_a_process_stays_and_its_traceback_is_in_its_log(
    logs: RankLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    died_of(ZeroDivisionError("first"), logs, 6, monkeypatch)
    died_of(ValueError("second"), logs, 6, monkeypatch)
    told = first_failure({6: 1}, logs)
    assert told.message == "rank 6: ZeroDivisionError: first"
    assert str(logs.log(6)) in str(told.hint)
    assert logs.log(6).read_text().endswith("ZeroDivisionError: first\n")


def test_a_process_that_left_no_word_is_told_by_its_last_line(logs: RankLogs) -> None:
    logs.log(5).write_text("loading\nsegment 7 is gone\n")
    told = first_failure({5: 9}, logs)
    assert told.message == "rank 5 ended with exit code 9: segment 7 is gone"
    assert told.exit_code == 9


def test_logs_of_earlier_starts_are_kept(tmp_path: Path) -> None:
    restarts: list[tuple[dict[int, int], int]] = []
    logs = RankLogs(tmp_path, before_restart=lambda ranks, number: restarts.append((dict(ranks), number)))
    for restart in range(3):
        destination = logs.reify({0: {"RANK": "0"}})
        Path(destination.stdouts[0]).write_text(f"start {restart}")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "rank-0.1.log": "start 0",
        "rank-0.2.log": "start 1",
        "rank-0.log": "start 2",
    }
    assert restarts == [({0: 0}, 1), ({0: 0}, 2)]
