"""Losses: exact under any cut of the batch, blind to what is not an action, signs as printed."""

import math

import pytest
import torch

from dovetail.batches import pack_ranked
from tests.conformance.oracles import kl_divergence
from tests.conformance.subject import maths
from tests.conformance.toys import experience
from tests.tolerance import assert_near

CUTS = [1, 9, 13, 24, 1000]
"""Micro-batch sizes in tokens, from one answer each to all seven at once."""


def policy_gradient(batch, max_tokens):
    """Loss and gradient of a policy that is one number per token id; each sum divided by the global count."""
    table = torch.linspace(-3, -0.5, 11, dtype=torch.float64).requires_grad_()
    total, count = 0.0, 0
    for micro in batch.micro_batches(max_tokens):
        loss = maths.clipped_policy_loss(
            table[micro.token_ids_T], micro.old_logprobs_T, micro.advantages_T, micro.mask_T, clip=0.2
        )
        (loss.total / batch.num_targets).backward()
        total, count = total + loss.total.item(), count + int(loss.count)
    assert count == batch.num_targets
    return total / count, table.grad


def value_gradient(batch, max_tokens):
    """The same for a critic that is one number per token id."""
    table = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
    total, count = 0.0, 0
    for micro in batch.micro_batches(max_tokens):
        loss = maths.clipped_value_loss(
            table[micro.token_ids_T], micro.old_values_T, micro.returns_T, micro.mask_T, clip=0.2
        )
        (loss.total / batch.num_targets).backward()
        total, count = total + loss.total.item(), count + int(loss.count)
    assert count == batch.num_targets
    return total / count, table.grad


@pytest.mark.parametrize("max_tokens", CUTS)
@pytest.mark.parametrize("gradient_of", [policy_gradient, value_gradient])
def test_micro_batches_of_any_size_give_the_loss_and_gradient_of_the_batch(gradient_of, max_tokens):
    """Sum over all actions / number of all actions, for actor and critic alike: seven answers in uneven
    parts, the last smaller than the rest, weigh each token once."""
    whole, whole_gradient = gradient_of(experience(), 10_000)
    loss, gradient = gradient_of(experience(), max_tokens)
    assert_near(loss, whole)
    assert_near(gradient, whole_gradient)


def test_the_mean_of_micro_batch_means_is_another_number():
    """What dividing inside each micro-batch would give: short answers would weigh more."""
    batch = experience()
    table = torch.linspace(-3, -0.5, 11, dtype=torch.float64)
    means = []
    for micro in batch.micro_batches(9):
        loss = maths.clipped_policy_loss(
            table[micro.token_ids_T], micro.old_logprobs_T, micro.advantages_T, micro.mask_T, clip=0.2
        )
        means.append((loss.total / loss.count).item())
    whole, _ = policy_gradient(batch, 10_000)
    assert abs(sum(means) / len(means) - whole) > 1e-3


def test_every_answer_is_in_exactly_one_micro_batch():
    """Nothing of the last, partial window is dropped, and no answer is cut in two."""
    for max_tokens in CUTS:
        parts = experience().micro_batches(max_tokens)
        assert sorted(n for part in parts for n in part.lengths) == sorted(experience().lengths)


def test_the_first_pass_over_a_rollout_has_ratio_one():
    """Equal log-probabilities give exactly: no clipping, no divergence; the loss is -mean advantage."""
    batch = experience()
    loss = maths.clipped_policy_loss(
        batch.old_logprobs_T.clone(), batch.old_logprobs_T, batch.advantages_T, batch.mask_T, clip=0.2
    )
    assert (loss.num_clipped, loss.num_clamped) == (0, 0)
    assert loss.kl_sum == 0.0
    assert_near(loss.total, -batch.advantages_T[batch.mask_T].sum())


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 0.0, -50.0])
def test_metrics_are_taken_over_actions_alone(filler):
    """Nine tenths of other tokens, whatever they hold, change neither loss nor clip count, KL or ratio."""
    new, old, advantages = ([-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5], [1.0, -1.0, 2.0])
    rows = [torch.tensor(column) for column in (new, old, advantages)]
    alone = maths.clipped_policy_loss(*rows, torch.ones(3).bool(), clip=0.2)
    padding = [filler] * 27
    padded_rows = [torch.tensor([*padding, *column]) for column in (new, old, advantages)]
    padded = maths.clipped_policy_loss(*padded_rows, torch.arange(30) >= 27, clip=0.2)
    assert padded == alone


def test_approximate_kl_estimates_how_far_the_new_policy_is_from_the_old():
    """The mean of kl_sum over tokens drawn from the old policy is KL(old || new), by enumeration."""
    old, new = [0.5, 0.3, 0.2], [0.4, 0.2, 0.4]
    mean = 0.0
    for p, q in zip(old, new, strict=True):
        logprobs = [torch.tensor([math.log(x)]) for x in (q, p)]
        loss = maths.clipped_policy_loss(*logprobs, torch.ones(1), torch.tensor([True]), clip=0.2)
        mean += p * loss.kl_sum.item()
    assert_near(mean, kl_divergence(old, new), dtype=torch.float32)


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        (1.5, 1.0, True),
        (1.5, -1.0, False),
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (1.1, 1.0, False),
        (0.9, -1.0, False),
    ],
)
def test_clipping_is_one_sided(ratio, advantage, is_clipped):
    """Only a good action already likelier, or a bad one already less likely, stops pushing."""
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = maths.clipped_policy_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), torch.tensor([True]), clip=0.2
    )
    loss.total.backward()
    assert bool(loss.num_clipped) == is_clipped
    assert (logprobs.grad == 0).item() == is_clipped


def test_an_impossible_token_leaves_the_loss_finite_and_is_counted():
    """log p = -inf: the ratio is clamped before exp, the KL is reported as it is, and a counter rises."""
    logprobs = torch.tensor([float("-inf"), -1.0, 200.0], requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    old = torch.full((3,), -1.0)
    loss = maths.clipped_policy_loss(logprobs, old, advantages, torch.ones(3).bool(), clip=0.2)
    loss.total.backward()
    assert loss.total.isfinite()
    assert logprobs.grad.isfinite().all()
    assert loss.num_clamped == 2
    assert loss.kl_sum == math.inf


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.1, 1.0, 0.5 * 0.9**2, -0.9),  # within the clip range: plain squared error
        (0.5, 1.0, 0.5 * 0.8**2, 0.0),  # beyond it, towards the target: the clipped error is larger
        (0.5, -1.0, 0.5 * 1.5**2, 1.5),  # beyond it, away from the target: full gradient back
    ],
)
def test_the_value_loss_is_the_larger_of_two_half_squares(value, target, loss, gradient):
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -0.2, 0.2) - R)^2), V_old = 0; clipped, it has no
    gradient."""
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(1).double(), torch.tensor([target]).double()
    result = maths.clipped_value_loss(values, old, returns, torch.tensor([True]), clip=0.2)
    result.total.backward()
    assert_near(result.total, loss)
    assert_near(values.grad, [gradient])


def test_value_clipping_can_be_switched_off():
    """Without a clip the loss is half the squared error, wherever the value has gone."""
    values = torch.tensor([0.5], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    loss = maths.clipped_value_loss(values, values - 9, one, torch.tensor([True]), clip=None)
    assert_near(loss.total, 0.5 * 0.25)
    assert loss.num_clipped == 0


def test_a_ranking_of_four_weighs_as_much_as_one_pair():
    """All six pairs of four answers share one prompt's weight: the mean of six log-likelihoods."""
    scores = torch.tensor([2.0, 0.5, -0.3, 1.0], dtype=torch.float64)
    pairs = [(a, b, 0.0) for a, b in [(0, 3), (0, 1), (0, 2), (3, 1), (3, 2), (1, 2)]]
    batch = pack_ranked([[[1, 2, 3]] * 4], [pairs])
    total = maths.ranking_loss(
        scores[batch.chosen_P], scores[batch.rejected_P], batch.margin_P, batch.weight_P.double()
    )
    losses = [math.log1p(math.exp(-(scores[a] - scores[b]).item())) for a, b, _ in pairs]
    assert_near(total, sum(losses) / 6, dtype=torch.float32)


def test_a_margin_asks_for_a_gap_of_that_size():
    """-log sigmoid(r_chosen - r_rejected - margin): a gap as large as the margin costs log 2."""
    one = torch.ones(1, dtype=torch.float64)
    assert_near(maths.ranking_loss(3 * one, one, 2 * one, one), math.log(2))
