"""KL: estimators by enumeration, their gradients, the penalty and its controller."""

import math

import pytest
import torch

from tests.conformance.oracles import kl_divergence
from tests.conformance.subject import maths
from tests.tolerance import assert_near

POLICY = [0.85, 0.1, 0.03, 0.02]
REFERENCE = [0.2, 0.2, 0.25, 0.35]


def logs(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def expected(estimates, probabilities):
    return (torch.tensor(probabilities, dtype=torch.float64) * estimates).sum()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimators_average_to_the_divergence(name):
    """Over tokens of the policy, E[k1] = E[k3] = KL(policy || reference), by enumeration."""
    estimates = getattr(maths, name)(logs(POLICY), logs(REFERENCE))
    assert_near(expected(estimates, POLICY), kl_divergence(POLICY, REFERENCE))


def test_the_sign_of_the_log_ratio_matters():
    """k3 with policy and reference exchanged averages to a number that is neither divergence."""
    flipped = expected(maths.k3(logs(REFERENCE), logs(POLICY)), POLICY)
    for divergence in (kl_divergence(POLICY, REFERENCE), kl_divergence(REFERENCE, POLICY)):
        assert abs(flipped.item() - divergence) > 0.05


def gradient_of(loss_of_logprobs):
    """d/d logits of sum_y p(y).detach() * loss(log p(y)): the push of a loss over sampled tokens."""
    logits = logs(POLICY).requires_grad_()
    logprobs = logits.log_softmax(-1)
    (logprobs.exp().detach() * loss_of_logprobs(logprobs)).sum().backward()
    return logits.grad


def gradient_of_the_divergence(first, second):
    """d/d logits of KL(first || second), by central differences; the policy is softmax(logits)."""
    step, gradient = 1e-5, []
    for i in range(len(POLICY)):
        moved = []
        for sign in (1, -1):
            logits = [math.log(p) + sign * step * (j == i) for j, p in enumerate(POLICY)]
            total = sum(math.exp(z) for z in logits)
            named = {"policy": [math.exp(z) / total for z in logits], "reference": REFERENCE}
            moved.append(kl_divergence(named[first], named[second]))
        gradient.append((moved[0] - moved[1]) / (2 * step))
    return gradient


def test_k1_as_a_loss_pushes_nowhere():
    """E[grad k1] = E[grad log p] = 0: the penalty belongs in the reward, not in the loss."""
    assert_near(gradient_of(lambda logprobs: maths.k1(logprobs, logs(REFERENCE))), [0.0] * 4)


def test_k3_as_a_loss_follows_the_other_divergence():
    """E[grad k3] = grad KL(reference || policy), though its value estimates KL(policy || reference)."""
    gradient = gradient_of(lambda logprobs: maths.k3(logprobs, logs(REFERENCE)))
    assert_near(gradient, gradient_of_the_divergence("reference", "policy"), dtype=torch.float32)


@pytest.mark.parametrize("log_ratio", [0.0, 12.0, 50.0, -50.0])
def test_the_penalty_is_not_clamped(log_ratio):
    """A far-off token pays its whole log-ratio, of either sign: a clamp would bias it, abs() falsify it."""
    rewards = maths.per_token_rewards(
        torch.tensor([log_ratio - 60.0]),
        torch.tensor([-60.0]),
        torch.zeros(1),
        torch.tensor([True]),
        torch.tensor([0]),
        kl_coefficient=0.1,
    )
    assert_near(rewards, [-0.1 * log_ratio])


@pytest.mark.parametrize("nats", [1.0, 5.9, 6.0, 7.0, 30.0])
def test_the_controller_follows_ziegler_et_al(nats):
    """beta <- beta (1 + 0.1 clip((KL - target) / target, -0.2, 0.2)) after each rollout."""
    error = (nats - 6.0) / 6.0
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    next_coefficient = maths.adaptive_kl_coefficient(0.05, nats, 6.0)
    assert_near(next_coefficient, 0.05 * (1 + 0.1 * error))


def test_the_controller_reads_nats_per_answer_and_not_per_token():
    """On target in the sum over an answer's tokens, the coefficient rests; the mean per token would lower
    it."""
    per_token = 0.15
    per_answer = 40 * per_token
    assert_near(maths.adaptive_kl_coefficient(0.05, per_answer, 6.0), 0.05)
    assert maths.adaptive_kl_coefficient(0.05, per_token, 6.0) < 0.05
