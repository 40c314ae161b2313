"""A rank that the others wait for is named: one that sleeps among real processes, and by hand."""

import re
import socket

import pytest

from dovetail.parallel.world import World
from dovetail.training.stragglers import IN_A_ROW, StragglerDetector, WorkClock
from tests.parallel.group import run_group

HOST = socket.gethostname()


def warnings(
    detector: StragglerDetector, steps: list[list[float]], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The warnings after these working seconds by rank, in steps that took as long as their slowest."""
    for seconds in steps:
        detector.judge(seconds, elapsed_s=max(seconds))
    return [line for line in capsys.readouterr().err.splitlines() if "is slow: it needs" in line]


@pytest.fixture
def detector() -> StragglerDetector:
    return StragglerDetector(World(rank=0, size=4))


def test_a_slow_rank_is_named_once_in_a_stretch(
    detector: StragglerDetector, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, even = [2.0, 2.1, 4.2, 1.9], [2.0, 2.1, 2.2, 1.9]
    assert warnings(detector, [slow] * (IN_A_ROW - 1), capsys) == []
    assert warnings(detector, [slow] * 10, capsys) == [
        "warning: rank 2 is slow: it needs 4.2 s per step, the other ranks 2 s; check its device's clocks and "
        "temperature, and what else runs there"
    ]
    assert detector.figures == {"slowest_rank": 2.0, "slowest_work_ratio": 2.1}
    assert warnings(detector, [even], capsys) == []
    assert len(warnings(detector, [slow] * IN_A_ROW, capsys)) == 1


def test_the_longest_answers_by_turns_are_nobodys_fault(
    detector: StragglerDetector, capsys: pytest.CaptureFixture[str]
) -> None:
    by_turns = [[4.0 if rank == step % 4 else 2.0 for rank in range(4)] for step in range(40)]
    assert warnings(detector, by_turns, capsys) == []


def test_a_little_slower_is_not_slow(detector: StragglerDetector, capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings(detector, [[2.0, 2.0, 2.9, 2.0]] * 20, capsys) == []
    # Three times as long, but of a step in which all mostly wait for something else.
    for _ in range(20):
        detector.judge([0.1, 0.1, 0.3, 0.1], elapsed_s=9.0)
    assert warnings(detector, [], capsys) == []


def test_short_steps_are_taken_together(
    detector: StragglerDetector, capsys: pytest.CaptureFixture[str]
) -> None:
    for elapsed in [0.3, 0.6, 0.9, 1.2] * IN_A_ROW:
        detector.judge([0.1, 0.1, 0.3, 0.1], elapsed_s=elapsed)
    assert len(warnings(detector, [], capsys)) == 1


def test_a_clock_counts_what_was_seen_of_work() -> None:
    now = [0.0]
    clock = WorkClock(clock=lambda: now[0])
    now[0] = 3.0
    assert clock.take() == 3.0  # nobody looked
    for _ in range(4):
        clock.look()  # at this test, which is in no collective
    now[0] = 5.0
    assert clock.take() == 2.0


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_among_real_processes() -> None:
    codes, said = run_group(["tests.training.straggling", "15", "1"], size=3)
    assert codes == [0, 0, 0], said
    line = rf"warning: rank 1 on {HOST} is slow: it needs 0\.\d+ s per step"
    assert len(re.findall(line, said[0])) == 1, said[0]
    assert "is slow" not in said[1] + said[2]
    assert "('slowest_rank', 1.0)" in said[0]
