"""Prompts come in the order of their epochs, and a resumed run goes on where the last step ended."""

import json
import random

import pytest
import torch

from dovetail.data.loader import BatchOrder
from dovetail.data.records import Prompt, message
from dovetail.stages.prompt_queue import PromptQueue

PROMPTS = [Prompt(messages=(message("user", str(i)),)) for i in range(7)]


@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 6, 2], [20, 1], [0, 5]])
def test_prompts_come_as_batches_of_any_size_would_hold_them(counts: list[int]) -> None:
    queue, order = PromptQueue(PROMPTS, seed=4), BatchOrder(7, 3, seed=4)
    expected = [PROMPTS[row] for step in range(9) for row in order.batch(step)]
    taken = [prompt for count in counts for prompt in queue.take(count)]
    assert taken == expected[: sum(counts)]


def test_a_resumed_run_goes_on_after_what_was_settled() -> None:
    queue = PromptQueue(PROMPTS, seed=1)
    queue.take(4)
    assert queue.settle(torch.zeros(8)) == {}
    state = queue.state_dict()
    lost = queue.take(5)
    assert queue.state_dict() == state
    resumed = PromptQueue(PROMPTS, seed=1)
    resumed.load_state_dict(state)
    assert resumed.take(5) == lost
    assert resumed.take(3) == queue.take(3)


def answer(queue: PromptQueue, count: int, rates: list[float], rng: random.Random) -> list[int]:
    """One rollout of four answers to each prompt, which pass at the rate of the prompt; returns the prompts."""
    asked = [int(prompt.messages[0]["content"]) for prompt in queue.take(count)]
    scores = [float(rng.random() < rates[row]) for row in asked for _ in range(4)]
    stats = queue.settle(torch.tensor(scores))
    assert stats["ppo/pass_rate"] == pytest.approx(sum(scores) / len(scores))
    assert stats["ppo/turns_passed_over"] >= 0
    return asked


def test_prompts_that_always_or_never_pass_are_asked_less_often() -> None:
    queue = PromptQueue(PROMPTS, seed=3, pass_score=1.0)
    rates, rng = [0.0, 1.0, 0.5, 0.5, 0.5, 0.0, 1.0], random.Random(0)
    first = answer(queue, 7, rates, rng)
    assert sorted(first) == list(range(7)), "nothing is known yet, so all are asked"
    asked = [row for _ in range(150) for row in answer(queue, 2, rates, rng)]
    counts = [asked.count(row) for row in range(7)]
    assert all(1.5 * counts[row] < counts[other] for row in (0, 1, 5, 6) for other in (2, 3, 4))
    assert min(counts) > 5, "none is forgotten"


def test_the_chance_of_a_prompt_follows_its_pass_rate() -> None:
    queue = PromptQueue(PROMPTS[:1], seed=0, pass_score=0.5)
    passed = answered = 0.0
    for scores in ([0.5, 0.0, 0.4, 1.0], [1.0, 1.0, 1.0, 1.0], [0.9, 0.8, 0.7, 0.6], *[[0.0] * 4] * 3):
        queue.take(1)
        queue.settle(torch.tensor(scores))
        passed = passed / 2 + sum(score >= 0.5 for score in scores)
        answered = answered / 2 + len(scores)
        rate = (passed + 1) / (answered + 2)
        assert queue.chance(0) == pytest.approx(max(0.1, 4 * rate * (1 - rate)), rel=1e-12)
    many = PromptQueue(PROMPTS[:1], seed=0, pass_score=0.5)
    many.take(1)
    many.settle(torch.zeros(1000))
    assert many.chance(0) == 0.1


def test_a_curriculum_resumes_with_the_same_prompts() -> None:
    rates = [0.0, 1.0, 0.5, 0.5, 0.9, 0.0, 1.0]
    queue = PromptQueue(PROMPTS, seed=3, pass_score=1.0)
    for _ in range(9):
        answer(queue, 3, rates, random.Random(2))
    state = json.loads(json.dumps(queue.state_dict()))
    queue.take(2)
    assert queue.state_dict() == state, "what is not settled is asked again"
    resumed, undisturbed = (PromptQueue(PROMPTS, seed=3, pass_score=1.0) for _ in range(2))
    for each in (resumed, undisturbed):
        each.load_state_dict(state)
    assert [answer(resumed, 3, rates, random.Random(5)) for _ in range(9)] == [
        answer(undisturbed, 3, rates, random.Random(5)) for _ in range(9)
    ]
