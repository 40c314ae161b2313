"""Each illness of a run is diagnosed on rollouts made to show it, and a healthy run has none."""

import json
from pathlib import Path

import pytest

from dovetail.stages.diagnosis import Trends

Row = dict[str, float]


def rollout(done: float, **change: tuple[float, float]) -> Row:
    """Return a rollout of a healthy run after the share `done` of it; change: a metric's value at the start and end."""
    course = {
        "score_mean": (0.0, 1.0),
        "score_std": (1.0, 0.8),
        "answer_tokens": (40.0, 45.0),
        "entropy_nats_per_token": (2.0, 1.6),
        "kl_nats_per_answer": (0.0, 5.0),
        "explained_variance": (0.3, 0.6),
        "learning_rate": (1e-5, 1e-6),
    } | change
    row = {f"ppo/{name}": (1 - done) * start + done * end for name, (start, end) in course.items()}
    return row | {"rollout/mismatch_kl_nats_per_token": 0.001}


def diagnosed(rows: list[Row]) -> dict[str, str]:
    """Return the illnesses found at any rollout."""
    trends, found = Trends(), dict[str, str]()
    for row in rows:
        found |= trends.see(row)
    return found


def course(rollouts: int = 60, **change: tuple[float, float]) -> list[Row]:
    return [rollout(number / (rollouts - 1), **change) for number in range(rollouts)]


def evaluated(rows: list[Row], rewards: tuple[float, ...]) -> list[Row]:
    """Add evaluations with a standard error of 0.05, evenly over the run, the last at its end."""
    every = len(rows) // len(rewards)
    for number, reward in enumerate(rewards, start=1):
        rows[number * every - 1] |= {"ppo/held_out_reward": reward, "ppo/held_out_reward_stderr": 0.05}
    return rows


def test_a_healthy_run_has_no_illness() -> None:
    assert diagnosed(evaluated(course(), (0.2, 0.5, 0.9))) == {}


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "reward hacking",
            course(answer_tokens=(41.0, 5.0), entropy_nats_per_token=(2.0, 0.03), score_mean=(-0.1, 2.4)),
            "answers shrank from",
        ),
        ("held-out reward", evaluated(course(), (0.5, 0.9, 0.3)), "from 0.90 at its best to 0.30"),
        ("critic", course(explained_variance=(-0.1, -0.2)), "the critic explained -0.19"),
        ("nothing moves", course(kl_nats_per_answer=(0.0, 0.01), score_mean=(0.3, 0.31)), "hardly moves"),
        (
            "equal groups",
            course(equal_groups_fraction=(0.5, 1.0)),
            "of the prompts all answers have the same",
        ),
        ("saturated reward", course(score_std=(1.0, 0.001)), "hardly tells answers apart"),
    ],
)
def test_an_illness_is_named_with_its_figures(name: str, rows: list[Row], words: str) -> None:
    found = diagnosed(rows)
    assert list(found) == [name]
    assert words in found[name]


def test_a_generator_apart_from_the_trainer_is_named() -> None:
    rows = [row | {"rollout/mismatch_kl_nats_per_token": 0.2} for row in course()]
    assert "disagree by 0.200 nats" in diagnosed(rows)["generator and trainer"]


@pytest.mark.parametrize("end", ["stock phrase", "standstill"])
def test_a_run_that_goes_wrong_at_once_is_told_so_within_twenty_rollouts(end: str) -> None:
    rows = {
        "stock phrase": course(20, answer_tokens=(40.0, 2.0), entropy_nats_per_token=(2.0, 0.0)),
        "standstill": course(20, kl_nats_per_answer=(0.0, 0.0), score_mean=(0.0, 0.0)),
    }[end]
    assert diagnosed(rows)


def test_the_critics_warm_up_is_no_standstill() -> None:
    rows = course(25, kl_nats_per_answer=(0.0, 0.0), score_mean=(0.0, 0.0))
    for row in rows:
        del row["ppo/learning_rate"]
    assert diagnosed(rows) == {}


def test_an_answer_that_is_not_measured_is_no_number() -> None:
    rows = [row | {"ppo/explained_variance": float("nan")} for row in course()]
    assert diagnosed(rows) == {}


def test_a_resumed_run_finds_what_the_whole_one_finds(tmp_path: Path) -> None:
    rows = evaluated(course(score_std=(1.0, 0.01)), (0.5, 0.9, 0.3))
    whole = Trends()
    told = [whole.see(row) for row in rows]
    half, saved = Trends(), tmp_path / "state.json"
    for row in rows[:40]:
        half.see(row)
    saved.write_text(json.dumps(half.state_dict()))
    resumed = Trends()
    resumed.load_state_dict(json.loads(saved.read_text()))
    assert [resumed.see(row) for row in rows[40:]] == told[40:]
