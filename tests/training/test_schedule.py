import math

import pytest

from dovetail.training.step import learning_rate_at


def rates(schedule: str, **changes: float) -> list[float]:
    settings = {"peak": 2.0, "warmup_steps": 4, "total_steps": 12, "final_fraction": 0.25, **changes}
    return [learning_rate_at(step, schedule=schedule, **settings) for step in range(16)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_linearly_to_the_peak_and_wastes_no_step_at_zero(schedule: str) -> None:
    assert rates(schedule)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_linear_falls_in_equal_steps_to_the_final_fraction_and_stays() -> None:
    assert rates("linear")[4:] == pytest.approx([2 - 1.5 * i / 8 for i in range(8)] + [0.5] * 4)


def test_cosine_follows_its_formula() -> None:
    expected = [0.5 + 1.5 * (1 + math.cos(math.pi * min(i, 8) / 8)) / 2 for i in range(12)]
    assert rates("cosine")[4:] == pytest.approx(expected)


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant")[4:] == [2.0] * 12


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert rates("cosine", warmup_steps=0)[0] == 2.0


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert rates("cosine", warmup_steps=16, total_steps=10) == pytest.approx(
        [2 * (i + 1) / 16 for i in range(16)]
    )


def test_a_warm_up_as_long_as_the_run_divides_by_nothing() -> None:
    assert rates("linear", warmup_steps=12)[11] == 2.0
    assert rates("linear", warmup_steps=12)[13] == 0.5
