"""The equations of methods without a critic, against plain Python written from the papers."""

import math
import random
import statistics

import pytest
import torch
from torch import Tensor

from dovetail.maths.groups import (
    clipped_weight_loss,
    group_advantages,
    kl_loss,
    leave_one_out_advantages,
    overlong_penalty,
    sequence_ratio_loss,
    token_weights,
)
from dovetail.maths.ppo import clipped_policy_loss

LENGTHS, PROMPT_TOKENS, LIMIT = (5, 3, 7, 4), 2, 9
MASK = torch.tensor([i >= PROMPT_TOKENS for n in LENGTHS for i in range(n)])
BOUNDS = torch.tensor([0, 5, 8, 15, 19], dtype=torch.int32)
ANSWERS = [[t for t in range(a + PROMPT_TOKENS, b)] for a, b in ((0, 5), (5, 8), (8, 15), (15, 19))]


def column(seed: int, spread: float) -> Tensor:
    """One random number a token; those that must not count are NaN."""
    rng = random.Random(seed)
    drawn = [rng.uniform(-spread, spread) for _ in range(len(MASK))]
    return torch.tensor(drawn, dtype=torch.float64).masked_fill(~MASK, torch.nan)


def policies() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities to differentiate, older ones at ratios on both sides of every bound, and advantages."""
    new = column(1, 0.6) - 1.0
    per_answer = torch.tensor([1.3, -0.4, 0.8, -1.1], dtype=torch.float64)
    advantages = per_answer.repeat_interleave(torch.tensor(LENGTHS))
    return new.requires_grad_(), (column(2, 0.6) - 1.0), advantages


def gradient(total: Tensor, new: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(total, new)
    return found


def numerical(loss, new: Tensor) -> Tensor:
    """Central differences of a plain Python function of a list of log-probabilities."""
    values, step, found = new.detach().tolist(), 1e-6, [0.0] * len(new)
    for t in [t for answer in ANSWERS for t in answer]:
        up, down = list(values), list(values)
        up[t], down[t] = values[t] + step, values[t] - step
        found[t] = (loss(up) - loss(down)) / (2 * step)
    return torch.tensor(found, dtype=torch.float64)


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, 1 - low), 1 + high)


def test_group_advantages_are_those_of_the_papers():
    rewards = [1.0, 2.0, 4.0, -1.0, 0.5, 0.25]
    scaled, centred = [], []
    for group in (rewards[:3], rewards[3:]):
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        scaled += [(r - mean) / (deviation + 1e-4) for r in group]
        centred += [r - mean for r in group]
    rewards_S = torch.tensor(rewards, dtype=torch.float64)
    found = group_advantages(rewards_S, 3, divides_by_std=True)
    torch.testing.assert_close(found, torch.tensor(scaled, dtype=torch.float64))
    found = group_advantages(rewards_S, 3, divides_by_std=False)
    torch.testing.assert_close(found, torch.tensor(centred, dtype=torch.float64))


def test_the_baseline_of_an_answer_is_the_mean_of_the_others():
    rewards = [1.0, 2.0, 4.0, -1.0, 0.5, 0.25]
    expected = [
        r - statistics.mean([o for j, o in enumerate(rewards) if j // 3 == i // 3 and j != i])
        for i, r in enumerate(rewards)
    ]
    found = leave_one_out_advantages(torch.tensor(rewards, dtype=torch.float64), 3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("advantages_of", [
    lambda r: group_advantages(r, 3, divides_by_std=True),
    lambda r: group_advantages(r, 3, divides_by_std=False),
    lambda r: leave_one_out_advantages(r, 3),
])  # fmt: skip
def test_a_group_of_equal_rewards_gives_exactly_nothing(advantages_of):
    assert advantages_of(torch.tensor([0.1, 0.1, 0.1])).tolist() == [0.0, 0.0, 0.0]


def test_the_overlong_penalty_falls_over_its_buffer():
    found = overlong_penalty(torch.tensor([1, 80, 85, 99, 100]), limit=100, buffer=20)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, -0.25, -0.95, -1.0]))


def test_weights_make_the_sum_over_tokens_the_mean_that_is_asked_for():
    losses = column(3, 2.0)
    per_answer = [[float(losses[t]) for t in answer] for answer in ANSWERS]
    means = {
        "sequence_mean": statistics.mean(statistics.mean(own) for own in per_answer),
        "token_mean": statistics.mean(x for own in per_answer for x in own),
        "constant_length": sum(sum(own) for own in per_answer) / (len(ANSWERS) * LIMIT),
    }
    for aggregation, expected in means.items():
        weights = token_weights(MASK, BOUNDS, aggregation=aggregation, max_tokens=LIMIT)
        found = (weights.double() * losses.nan_to_num()).sum() / MASK.sum()
        assert math.isclose(float(found), expected, rel_tol=1e-6)


def test_an_answer_that_is_left_out_counts_in_no_mean():
    mask = MASK & (torch.arange(len(MASK)) >= 5)
    weights = token_weights(mask, BOUNDS, aggregation="sequence_mean", max_tokens=LIMIT)
    assert weights[:5].tolist() == [0.0] * 5
    assert math.isclose(float(weights[ANSWERS[1][0]]), (1 + 5 + 2) / 3, rel_tol=1e-6)


def test_the_upper_bound_may_be_wider_than_the_lower():
    new, old, advantages = policies()

    def loss(values: list[float]) -> float:
        total = 0.0
        for t in [t for answer in ANSWERS for t in answer]:
            ratio, a = math.exp(values[t] - float(old[t])), float(advantages[t])
            total -= min(ratio * a, clamp(ratio, 0.2, 0.28) * a)
        return total

    found = clipped_policy_loss(new, old, advantages, MASK, clip=0.2, clip_high=0.28)
    assert math.isclose(float(found.total.detach()), loss(new.tolist()), rel_tol=1e-12)
    torch.testing.assert_close(gradient(found.total, new), numerical(loss, new), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.1, 0.05), (0.9, 5.0)])
def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens(clip):
    new, old, advantages = policies()

    def loss(values: list[float]) -> float:
        total = 0.0
        for answer in ANSWERS:
            ratio = math.prod(math.exp(values[t] - float(old[t])) for t in answer) ** (1 / len(answer))
            a = float(advantages[answer[0]])
            total -= len(answer) * min(ratio * a, clamp(ratio, *clip) * a)
        return total

    found = sequence_ratio_loss(new, old, advantages, MASK, BOUNDS, clip=clip)
    assert math.isclose(float(found.total.detach()), loss(new.tolist()), rel_tol=1e-12)
    torch.testing.assert_close(gradient(found.total, new), numerical(loss, new), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("clip", [(1.0, 0.2), (0.3, 0.3)])
def test_a_clipped_weight_leaves_every_token_its_gradient(clip):
    new, old, advantages = policies()
    begun = new.tolist()

    def loss(values: list[float]) -> float:
        return -sum(
            clamp(math.exp(begun[t] - float(old[t])), *clip) * float(advantages[t]) * values[t]
            for answer in ANSWERS
            for t in answer
        )

    found = clipped_weight_loss(new, old, advantages, MASK, clip=clip)
    assert math.isclose(float(found.total.detach()), loss(begun), rel_tol=1e-12)
    found_T = gradient(found.total, new)
    torch.testing.assert_close(found_T, numerical(loss, new), atol=1e-7, rtol=1e-6)
    assert (found_T[MASK] != 0).all()


@pytest.mark.parametrize(("estimator", "of"), [
    ("k2", lambda d: d * d / 2),
    ("k3", lambda d: math.exp(-d) - 1 + d),
])  # fmt: skip
def test_the_kl_in_the_loss_is_the_weighted_sum_of_its_estimator(estimator, of):
    new, reference, _ = policies()
    weights = token_weights(MASK, BOUNDS, aggregation="sequence_mean", max_tokens=LIMIT).double()

    def loss(values: list[float]) -> float:
        return sum(
            float(weights[t]) * of(values[t] - float(reference[t])) for answer in ANSWERS for t in answer
        )

    total = kl_loss(new, reference, weights, MASK, estimator=estimator)
    assert math.isclose(float(total.detach()), loss(new.tolist()), rel_tol=1e-12)
    torch.testing.assert_close(gradient(total, new), numerical(loss, new), atol=1e-7, rtol=1e-6)
