"""Saving in the background: the state may change, a save waits for the one before, an error is not lost."""

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from dovetail.errors import CheckpointError
from dovetail.runs.checkpoint import WRITER, Checkpoints
from dovetail.runs.disk import FullDisk, open_file

SECONDS = 60


class Gate:
    """A disk that takes nothing before `opened` is set."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.asked = threading.Event()
        self.asked_by = ""

    def __call__(self, path: Path) -> BinaryIO:
        self.asked_by = threading.current_thread().name
        self.asked.set()
        assert self.opened.wait(SECONDS)
        return open_file(path)


def steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir() if path.name.startswith("step-"))


def test_the_state_may_change_while_it_is_written(tmp_path: Path) -> None:
    gate, weights = Gate(), torch.ones(4)
    checkpoints = Checkpoints(tmp_path, open_file=gate)
    checkpoints.begin_save(1, {"weights": weights, "step": 1})
    assert gate.asked.wait(SECONDS)
    assert gate.asked_by.startswith(WRITER)
    weights.zero_()  # the next step
    assert steps(checkpoints) == []
    gate.opened.set()
    assert checkpoints.finish() == tmp_path / "step-00000001"
    found = checkpoints.latest()
    assert found is not None
    assert torch.equal(found[1]["weights"], torch.ones(4))


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    gate = Gate()
    checkpoints = Checkpoints(tmp_path, open_file=gate)
    checkpoints.begin_save(1, {"step": 1})
    begun = threading.Event()

    def save_again() -> None:
        checkpoints.begin_save(2, {"step": 2})
        begun.set()

    thread = threading.Thread(target=save_again)
    thread.start()
    assert not begun.wait(0.2)
    gate.opened.set()
    thread.join(SECONDS)
    assert begun.is_set()
    assert "step-00000001" in steps(checkpoints)
    checkpoints.finish()
    assert steps(checkpoints) == ["step-00000001", "step-00000002"]


def test_an_error_of_the_writer_is_raised_at_the_next_look(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, open_file=FullDisk(0))
    checkpoints.expect_no_failure()
    checkpoints.begin_save(1, {"w": torch.ones(4)})
    wait([checkpoints._saving], SECONDS)  # type: ignore[list-item]
    with pytest.raises(CheckpointError, match="no room to write"):
        checkpoints.expect_no_failure()
    checkpoints.expect_no_failure()  # it is told once
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_block_waits_and_tells(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "sound") as sound:
        sound.begin_save(1, {"step": 1})
    assert steps(sound) == ["step-00000001"]
    with (
        pytest.raises(CheckpointError, match="no room to write"),
        Checkpoints(tmp_path / "full", open_file=FullDisk(0)) as full,
    ):
        full.begin_save(1, {"step": 1})


def test_another_error_is_not_hidden_by_that_of_the_writer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, open_file=FullDisk(0)) as checkpoints:  # noqa: PT012
        checkpoints.begin_save(1, {"step": 1})
        raise ZeroDivisionError
    assert "was not finished: no room to write" in capsys.readouterr().err
