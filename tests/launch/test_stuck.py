"""Who is waited for is named, in a stuck run of two real processes and by hand."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from dovetail.launch import stuck as module
from dovetail.launch.rank import ERROR_FILE
from dovetail.launch.stuck import Position, diagnosis
from dovetail.runs.checkpoint import Checkpoints
from dovetail.runs.disk import open_file
from dovetail.telemetry.stack import frames_of
from tests.parallel.group import new_store

WORKER = Path(__file__).parent / "stuck_worker.py"
HOST = socket.gethostname()


def at(place: str, collective: str | None = None) -> Position:
    return Position("worker", place, collective, still_s=600.0, looks=9)


def test_the_rank_outside_of_the_collective_comes_first() -> None:
    positions = {0: at("a.py:1", "all_reduce"), 1: at("b.py:2"), 2: at("a.py:1", "all_reduce")}
    assert diagnosis(positions, set()) == "rank 1 stands at b.py:2; ranks 0, 2 wait in all_reduce at a.py:1"


def test_of_two_collectives_that_do_not_fit_the_rarer_comes_first() -> None:
    positions = {rank: at("a.py:1", "all_reduce") for rank in range(3)} | {3: at("a.py:9", "barrier")}
    assert diagnosis(positions, set()).startswith("rank 3 waits in barrier at a.py:9; ranks 0, 1, 2 wait")


def test_a_rank_without_a_sign_of_life_comes_before_all() -> None:
    positions = {0: at("a.py:1"), 1: at("a.py:1", "all_reduce")}
    assert diagnosis(positions, {1}) == "rank 1 on worker shows no sign of life; rank 0 stands at a.py:1"


def test_a_rank_that_waits_for_its_checkpoint_stands_where_that_is_written(tmp_path: Path) -> None:
    written = threading.Event()

    def slow_disk(path: Path) -> BinaryIO:
        written.wait(60)
        return open_file(path)

    def look() -> None:
        end = time.monotonic() + 60
        while not any(frame.f_code is slow_disk.__code__ for frame in frames_of(module._thread())):
            if time.monotonic() > end:
                return
        seen.append("the disk")
        written.set()

    seen: list[str] = []
    watch = threading.Thread(target=look)
    watch.start()
    Checkpoints(tmp_path, open_file=slow_disk).save(1, {"step": 1})
    watch.join()
    assert seen == ["the disk"]


def stuck(how: str, folder: Path, kind: str = "cpu") -> tuple[int, dict[str, str] | None, str]:
    """Exit code of rank 0, what it recorded, and what it printed; rank 1 is the launcher's to end, and ended here.

    Both may find out at the same look. Where rank 1 was faster its connection went, and code and record are its own.
    """
    store = new_store()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), rank, str(store.port), how, kind],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                ERROR_FILE: str(folder / rank),
            },
        )
        for rank in ("0", "1")
    ]
    try:
        printed = ranks[0].communicate(timeout=90)[1]
        if how in ("busy", "native"):
            ranks[1].communicate(timeout=90)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    for rank in (0, 1):
        if (folder / str(rank)).exists():
            return ranks[rank].returncode, json.loads((folder / str(rank)).read_text()), printed
    return ranks[0].returncode, None, printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
@pytest.mark.parametrize(
    ("how", "who"),
    [("asleep", r"rank 1 stands at"), ("frozen", f"rank 1 on {HOST} shows no sign of life")],
)
def test_a_stuck_collective_ends_and_names_the_rank(how: str, who: str, tmp_path: Path) -> None:
    code, recorded, _ = stuck(how, tmp_path)
    assert recorded is not None
    message = recorded["message"]["message"]  # type: ignore[index]
    assert message.startswith(f"nothing has moved for 2 s: {who}")
    assert "rank 0 waits in all_reduce at launch/stuck_worker.py:" in message
    assert recorded["exit_code"] == 3
    assert code == 3
    if how == "asleep":
        assert "(load_rows)" in message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["busy", "native"])
def test_a_slow_rank_is_told_of_and_waited_for(how: str, tmp_path: Path) -> None:
    code, recorded, printed = stuck(how, tmp_path)
    assert code == 0
    assert recorded is None
    assert printed.count("warning: has not moved for 2 s: rank 1 stands at") == 1
