"""The generator's policy drew the tokens, another one is trained: weights that correct, and what is reported."""

import math

import pytest
import torch

from tests.conformance.oracles import kl_divergence
from tests.conformance.subject import maths
from tests.tolerance import assert_near

ADVANTAGES = [1.0, -2.0, 0.5, 3.0, -0.25]
DRAWN = [0.30, 0.10, 0.25, 0.15, 0.20]
LOGITS = [0.4, -0.3, 0.0, 0.9, -1.0]
"""mu, and the logits of pi_old, over five answers of one token each."""


def policy(logits):
    """log pi_old of each of the five answers."""
    return logits.log_softmax(-1)


def expected_gradient(*, cap):
    """Of the loss of one update, over draws from mu by enumeration; cap None = no weight."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logprobs, everywhere = policy(logits), torch.ones(5).bool()
    drawn, advantages = (torch.tensor(x, dtype=torch.float64) for x in (DRAWN, ADVANTAGES))
    if cap is not None:
        advantages = advantages * maths.importance_weights(logprobs, drawn.log(), everywhere, cap=cap)
    loss = maths.clipped_policy_loss(logprobs, logprobs.detach(), advantages * drawn, everywhere, clip=0.2)
    loss.total.backward()
    return logits.grad


def on_policy_gradient():
    """Of -E[A], y ~ pi_old, differentiated as an expectation and not through samples."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    (-(logits.softmax(-1) * torch.tensor(ADVANTAGES, dtype=torch.float64)).sum()).backward()
    return logits.grad


def test_weighted_draws_of_the_generator_give_the_gradient_of_the_policy():
    """E_mu[w A grad log pi] = E_pi[A grad log pi], w = pi / mu, where the cap takes nothing off."""
    assert_near(expected_gradient(cap=100.0), on_policy_gradient())


def test_unweighted_draws_of_the_generator_give_another_gradient():
    """Taking mu for pi_old, or leaving the weight out, follows another objective."""
    assert (expected_gradient(cap=None) - on_policy_gradient()).abs().max() > 0.1


@pytest.mark.parametrize("cap", [1.0, 1.5, 2.0])
def test_the_cap_bounds_every_weight_and_touches_no_other(cap):
    """w = min(pi / mu, C), answer by answer."""
    logprobs = policy(torch.tensor(LOGITS, dtype=torch.float64))
    drawn = torch.tensor(DRAWN, dtype=torch.float64)
    weights = maths.importance_weights(logprobs, drawn.log(), torch.ones(5).bool(), cap=cap)
    exact = [math.exp(p) / q for p, q in zip(logprobs.tolist(), DRAWN, strict=True)]
    assert min(exact) < 1.0 < max(exact)
    assert_near(weights, [min(w, cap) for w in exact])


def test_the_weight_carries_no_gradient():
    """It says how to count a draw, and is no way to raise the objective."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    weights = maths.importance_weights(
        policy(logits), torch.tensor(DRAWN).log(), torch.ones(5).bool(), cap=2.0
    )
    assert not weights.requires_grad


def test_the_mismatch_estimates_the_divergence_of_generator_and_policy():
    """The mean of kl_sum over draws from mu is KL(mu || pi_old), by enumeration, whatever a cap would cut."""
    logprobs, drawn = policy(torch.tensor(LOGITS, dtype=torch.float64)), torch.tensor(DRAWN).double()
    found = [
        maths.mismatch(logprobs[i : i + 1], drawn[i : i + 1].log(), torch.tensor([True])) for i in range(5)
    ]
    mean = sum(q * gap.kl_sum.item() for q, gap in zip(DRAWN, found, strict=True))
    assert_near(mean, kl_divergence(DRAWN, logprobs.exp().tolist()), dtype=torch.float32)
