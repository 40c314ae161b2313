"""The optimum of the KL-regularised reward is known in closed form and judges the whole chain of equations.

The policy is a table of logits per prefix over a language of 3 tokens (2 ends the answer), at most 3 tokens
long. All its answers are enumerated and weighted by their probability, so that expectations are exact.
"""

import math

import pytest
import torch

from dovetail.batches import pack
from tests.conformance.oracles import (
    distribution,
    every_answer,
    kl_regularised_optimum,
    next_probabilities_of,
    optimal_objective,
    regularised_objective,
    total_variation,
)
from tests.conformance.subject import maths
from tests.tolerance import assert_near

NUM_TOKENS, END, MAX_LENGTH, BETA = 3, 2, 3, 0.5
ANSWERS = every_answer(NUM_TOKENS, END, MAX_LENGTH)
PREFIXES = sorted({y[:t] for y in ANSWERS for t in range(len(y))})
REWARDS = [1.5 * y.count(0) - len(y) / 2 + (y[-1] == END) for y in ANSWERS]


def table(seed):
    """Random logits [prefix, token]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), NUM_TOKENS, generator=generator, dtype=torch.float64)


def probabilities_of(logits):
    """p(y) of each answer under a table, in plain Python."""
    rows = {prefix: logits[i].softmax(-1).tolist() for i, prefix in enumerate(PREFIXES)}
    return distribution(lambda prefix: rows[prefix], ANSWERS)


REFERENCE = table(0)
OPTIMUM = kl_regularised_optimum(probabilities_of(REFERENCE), REWARDS, BETA)


def expected_loss(logits):
    """The chain of one PPO step on every answer at once, each weighted by its probability under the policy.

    Log-probabilities -> penalised per-token rewards -> advantages (no critic) -> clipped loss.
    """
    batch = pack([[0, *y] for y in ANSWERS], [[False] + [True] * len(y) for y in ANSWERS])
    rows = torch.tensor([PREFIXES.index(y[:t]) for y in ANSWERS for t in range(len(y))])
    tokens = torch.tensor([token for y in ANSWERS for token in y])

    def column(table_of_logits):
        zeros = torch.zeros(batch.num_tokens, dtype=torch.float64)
        logprobs = table_of_logits[rows].log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return zeros.masked_scatter(batch.mask_T, logprobs)

    logprobs_T, reference_T = column(logits), column(REFERENCE)
    old_T, scores = logprobs_T.detach(), torch.tensor(REWARDS, dtype=torch.float64)
    rewards_T = maths.per_token_rewards(
        old_T, reference_T, scores, batch.mask_T, batch.last_index_S(), kl_coefficient=BETA
    )
    bounds = maths.cu_actions(batch.mask_T, batch.cu_seqlens_S1)
    rewards_A = rewards_T[batch.mask_T]
    advantages_A = maths.gae(rewards_A, torch.zeros_like(rewards_A), bounds, gamma=1.0, lam=1.0)
    weights = torch.tensor(probabilities_of(logits.detach()), dtype=torch.float64)
    weighted_A = advantages_A * weights.repeat_interleave(bounds[1:] - bounds[:-1])
    advantages_T = torch.zeros_like(rewards_T).masked_scatter(batch.mask_T, weighted_A)
    return maths.clipped_policy_loss(logprobs_T, old_T, advantages_T, batch.mask_T, clip=0.2).total


def test_every_answer_is_enumerated_once():
    """1 + 2 + 4 * 3 answers: ended after one token, after two, all of three; probabilities add up to 1."""
    assert len(ANSWERS) == len(set(ANSWERS)) == 15
    assert_near(sum(probabilities_of(REFERENCE)), 1.0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_no_policy_does_better_than_the_closed_form(beta):
    """pi_ref exp(r / beta) / Z attains beta log Z, and other policies stay below it."""
    reference = probabilities_of(REFERENCE)
    optimum = kl_regularised_optimum(reference, REWARDS, beta)
    best = optimal_objective(reference, REWARDS, beta)
    assert_near(regularised_objective(optimum, reference, REWARDS, beta), best)
    for seed in range(20):
        assert regularised_objective(probabilities_of(table(seed)), reference, REWARDS, beta) < best


def test_conditionals_of_a_distribution_give_it_back():
    """Token by token sampling from the optimum's conditionals is the optimum."""
    conditionals = next_probabilities_of(OPTIMUM, ANSWERS, NUM_TOKENS)
    assert_near(torch.tensor(distribution(conditionals, ANSWERS)), OPTIMUM, dtype=torch.float32)


def test_at_the_optimum_the_expected_policy_gradient_is_zero():
    """Penalty in the reward, reward-to-go and clipped loss together leave the closed-form optimum where it
    is."""
    conditionals = next_probabilities_of(OPTIMUM, ANSWERS, NUM_TOKENS)
    rows = [[math.log(p) for p in conditionals(prefix)] for prefix in PREFIXES]
    logits = torch.tensor(rows, dtype=torch.float64).requires_grad_()
    expected_loss(logits).backward()
    assert_near(logits.grad, torch.zeros_like(logits))


def test_the_expected_policy_gradient_is_that_of_the_regularised_objective():
    """Anywhere else it is minus the gradient of E[r] - beta KL, by central differences."""
    logits = table(1).requires_grad_()
    expected_loss(logits).backward()
    reference, step = probabilities_of(REFERENCE), 1e-5
    for row in range(len(PREFIXES)):
        for token in range(NUM_TOKENS):
            moved = []
            for sign in (1, -1):
                nearby = logits.detach().clone()
                nearby[row, token] += sign * step
                moved.append(regularised_objective(probabilities_of(nearby), reference, REWARDS, BETA))
            assert_near(-logits.grad[row, token], (moved[0] - moved[1]) / (2 * step), dtype=torch.float32)


def test_following_the_gradient_reaches_the_optimum():
    """From the reference, exact policy-gradient steps end at the closed form."""
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    assert total_variation(probabilities_of(logits), OPTIMUM) > 0.3
    for _ in range(150):
        optimizer.zero_grad()
        expected_loss(logits).backward()
        optimizer.step()
    assert total_variation(probabilities_of(logits.detach()), OPTIMUM) < 1e-3
