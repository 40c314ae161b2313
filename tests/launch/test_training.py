"""Real runs through the launcher: two processes, all three stages, stopped or one of them killed on the way."""

import os
import signal
import sys
from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from tests.launch.training import expect_end, expect_same_weights, launched, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
TWO = ("--num-gpus", "2")


@pytest.fixture
def both(alone: RunConfig, tmp_path: Path) -> RunConfig:
    """The same run, for two processes."""
    return alone.model_copy(update={"output_dir": str(tmp_path / "both")})


def one_of(launcher: int, rank: int) -> int:
    """Process id of a rank, by the environment that the launcher gave it."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def test_two_processes_one_of_them_killed_end_with_the_weights_of_one(
    alone: RunConfig, both: RunConfig
) -> None:
    with launched(both, *TWO, "--max-restarts", "1") as process:
        wait_for(Path(both.output_dir, "sft", "model"), process)
        os.kill(one_of(process.pid, 1), signal.SIGKILL)
        said = expect_end(process, both, 0)
    assert "restart 1: a process was lost" in said
    expect_same_weights(both, alone)


def test_two_processes_that_were_told_to_stop_end_with_the_weights_of_one(
    alone: RunConfig, both: RunConfig
) -> None:
    with launched(both, *TWO, "--max-restarts", "1") as process:
        wait_for(Path(both.output_dir, "sft", "model"), process)
        process.send_signal(signal.SIGTERM)
        said = expect_end(process, both, 75)
    assert said.count("ended by SIGTERM") == 1
    assert "restart" not in said
    with launched(both, *TWO) as process:
        expect_end(process, both, 0)
    expect_same_weights(both, alone)
