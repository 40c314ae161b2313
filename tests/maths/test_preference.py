"""The losses on preference pairs, pair by pair, against the equations of their papers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given

from dovetail.maths.preference import (
    dpo_loss,
    estimated_kl,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pair_sums,
    simpo_loss,
)
from tests.maths.strategies import columns, property_test, tensor
from tests.tolerance import assert_near


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    p = math.exp(mean)
    return math.log(p / (1 - p))


Loss = Callable[..., torch.Tensor]
CASES: dict[str, tuple[Loss, Callable[[float, float], float]]] = {
    "dpo": (
        lambda chosen, rejected: dpo_loss(chosen, rejected, beta=0.4),
        lambda c, r: -math.log(sigmoid(0.4 * c - 0.4 * r)),
    ),
    "cdpo": (
        lambda chosen, rejected: dpo_loss(chosen, rejected, beta=0.4, label_smoothing=0.2),
        lambda c, r: -0.8 * math.log(sigmoid(0.4 * (c - r))) - 0.2 * math.log(sigmoid(0.4 * (r - c))),
    ),
    "ipo": (lambda chosen, rejected: ipo_loss(chosen, rejected, beta=0.4), lambda c, r: (c - r - 1.25) ** 2),
    "kto": (
        lambda chosen, rejected: kto_loss(chosen, rejected, 0.7, beta=0.4),
        lambda c, r: ((1 - sigmoid(0.4 * (c - 0.7))) + (1 - sigmoid(0.4 * (0.7 - r)))) / 2,
    ),
    "simpo": (
        lambda chosen, rejected: simpo_loss(chosen, rejected, beta=0.4, gamma=0.9),
        lambda c, r: -math.log(sigmoid(0.4 * c - 0.4 * r - 0.9)),
    ),
    "orpo": (
        lambda chosen, rejected: orpo_loss(chosen, rejected, beta=0.4),
        lambda c, r: -c - 0.4 * math.log(sigmoid(log_odds(c) - log_odds(r))),
    ),
}
"""By name, a loss and what its paper says of one pair."""


@pytest.mark.parametrize("name", CASES)
@property_test
@given(case=columns(2, low=-5.0, high=-0.125))
def test_losses_and_gradients_follow_the_equations(name, case):
    loss, by_definition = CASES[name]
    (chosen, rejected), _ = case
    chosen_P, rejected_P = tensor(chosen).requires_grad_(), tensor(rejected).requires_grad_()
    loss_P = loss(chosen_P, rejected_P)
    loss_P.sum().backward()
    pairs = list(zip(chosen, rejected, strict=True))
    assert_near(loss_P, [by_definition(c, r) for c, r in pairs])
    step = 1e-5
    slopes = [
        [(by_definition(c + step, r) - by_definition(c - step, r)) / (2 * step) for c, r in pairs],
        [(by_definition(c, r + step) - by_definition(c, r - step)) / (2 * step) for c, r in pairs],
    ]
    for found, slope in zip((chosen_P.grad, rejected_P.grad), slopes, strict=True):
        assert_near(found, slope, dtype=torch.float32)


def test_the_estimated_kl_is_never_negative():
    assert_near(estimated_kl(tensor([-1.0, -2.0]), tensor([-2.0, -2.5])), 0.75)
    assert estimated_kl(tensor([-3.0, -2.0]), tensor([-2.0, -2.5])) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_a_hopeless_pair_and_a_certain_one_have_finite_losses_and_gradients(name):
    loss, _ = CASES[name]
    chosen = torch.tensor([-500.0, 0.0, -1e-9], requires_grad=True)
    rejected = torch.tensor([0.0, -500.0, -1e-9], requires_grad=True)
    total = loss(chosen, rejected).sum()
    total.backward()
    assert torch.cat([total[None], chosen.grad, rejected.grad]).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_widened_before_the_difference(name):
    loss, by_definition = CASES[name]
    chosen, rejected = (torch.tensor([value], dtype=torch.bfloat16) for value in (-3.0, -2.984375))
    found = loss(chosen, rejected)
    assert found.dtype == torch.float32
    assert_near(found, [by_definition(-3.0, -2.984375)])


def test_sums_over_pairs_weigh_each_pair():
    sums = pair_sums(tensor([2.0, 1.0, -1.0]), tensor([0.5, 1.0, 3.0]), tensor([1.0, 0.5, 0.25]))
    assert sums.keys() == {"accuracy", "reward_margin", "chosen_reward", "rejected_reward"}
    assert_near(sums["accuracy"], 1.0 + 0.25)
    assert_near(sums["reward_margin"], 1.5 - 1.0)
    assert_near(sums["chosen_reward"], 2.0 + 0.5 - 0.25)
    assert_near(sums["rejected_reward"], 0.5 + 0.5 + 0.75)


def test_dpo_finds_the_optimum_of_the_rewards_that_made_the_preferences():
    """pi(y) = pi_ref(y) exp(r(y) / beta) / Z (Rafailov et al., eq. 4), where pairs are won as Bradley and Terry say."""
    rewards, reference, beta = [0.5, -0.3, 1.2, 0.0], tensor([0.1, 0.4, 0.2, 0.3]), 0.5
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    won_P = tensor([sigmoid(rewards[i] - rewards[j]) for i, j in pairs])
    better_P, worse_P = torch.tensor(pairs).T
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference.log()
        total = (won_P * dpo_loss(ratio[better_P], ratio[worse_P], beta=beta)).sum()
        total.backward()
        return total

    optimizer.step(loss)
    wanted = [float(p) * math.exp(r / beta) for p, r in zip(reference, rewards, strict=True)]
    assert_near(logits.softmax(0), [w / sum(wanted) for w in wanted], dtype=torch.float32)
