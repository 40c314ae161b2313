from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dovetail.demo.answers import CAREFUL, MIXED, Habits, write_answer
from dovetail.demo.families import all_tasks
from dovetail.demo.gold import GoldScore, gold

TASKS = [task for task in all_tasks() if not task.is_courteous]


def scores_of(habits: Habits, count: int = 400) -> list[GoldScore]:
    rng = random.Random(3)
    tasks = [rng.choice(TASKS) for _ in range(count)]
    return [gold(task, write_answer(task, rng, habits)) for task in tasks]


def test_the_same_seed_gives_the_same_answer() -> None:
    assert write_answer(TASKS[0], random.Random(1)) == write_answer(TASKS[0], random.Random(1))


@pytest.mark.parametrize(
    ("flaw", "part", "value"),
    [
        ({"polite": 0.0, "rude": 1.0}, "politeness", 0.0),
        ({"polite": 0.0}, "politeness", 0.5),
        ({"one_filler": 1.0}, "brevity", 0.5),
        ({"many_fillers": 1.0}, "brevity", 0.0),
        ({"repeats": 1.0}, "clean", 0.0),
        ({"cut": 1.0}, "clean", 0.0),
        ({"errs": 1.0}, "truth", 0.0),
        ({"evades": 1.0}, "truth", 0.0),
    ],
)
def test_each_flaw_costs_the_part_it_is_meant_for(flaw: dict[str, float], part: str, value: float) -> None:
    assert {getattr(score, part) for score in scores_of(replace(CAREFUL, **flaw))} == {value}


def test_faults_of_manner_leave_the_truth_alone() -> None:
    rude = replace(CAREFUL, polite=0.0, rude=1.0, many_fillers=1.0, repeats=1.0)
    assert {score.truth for score in scores_of(rude)} == {1.0}


def test_the_mixed_crowd_is_mostly_right_and_often_ill_mannered() -> None:
    scores = scores_of(MIXED, count=3_000)
    truth = sum(score.truth for score in scores) / len(scores)
    manner = sum(score.manner for score in scores) / len(scores)
    assert truth > 0.8
    assert 0.45 < manner < 0.65
