"""The Bradley-Terry loss and accuracy, pair by pair."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.ranking import ranking_loss, won_pairs
from tests.maths.strategies import columns, cut, property_test, reordered, tensor
from tests.tolerance import assert_near


def loss_by_definition(chosen, rejected, margin, weight):
    pairs = zip(chosen, rejected, margin, weight, strict=True)
    return math.fsum(w * -math.log(1 / (1 + math.exp(-(c - r - m)))) for c, r, m, w in pairs)


@property_test
@given(case=columns(4))
def test_loss_equals_the_negative_log_likelihood_of_the_preferences(case):
    rows, _ = case
    assert_near(ranking_loss(*map(tensor, rows)), loss_by_definition(*rows))


@property_test
@given(case=columns(4), at=st.integers(0, 12))
def test_micro_batches_add_up_to_the_batch(case, at):
    rows, _ = case
    total = sum(ranking_loss(*(tensor(cut(row, at)[part]) for row in rows)) for part in range(2))
    assert_near(total, ranking_loss(*map(tensor, rows)))


@property_test
@given(case=columns(4), data=st.data())
def test_the_order_of_pairs_cannot_matter(case, data):
    rows, mask = case
    order = data.draw(st.permutations(range(len(mask))))
    assert_near(
        ranking_loss(*(tensor(reordered(row, order)) for row in rows)), ranking_loss(*map(tensor, rows))
    )


def test_a_pair_of_weight_zero_does_not_count():
    one = ranking_loss(tensor([1.0]), tensor([0.5]), tensor([0.0]), tensor([1.0]))
    two = ranking_loss(tensor([1.0, 9.0]), tensor([0.5, 3.0]), tensor([0.0, 0.0]), tensor([1.0, 0.0]))
    assert_near(two, one)


def test_a_hopelessly_wrong_pair_has_a_finite_loss_and_gradient():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss = ranking_loss(chosen, torch.tensor([500.0]), torch.zeros(1), torch.ones(1))
    loss.backward()
    assert_near(loss, 1000.0)
    assert_near(chosen.grad, [-1.0])


def test_low_precision_scores_are_widened_before_the_difference():
    chosen, rejected = torch.tensor([8.0], dtype=torch.bfloat16), torch.tensor([7.9375], dtype=torch.bfloat16)
    loss = ranking_loss(chosen, rejected, torch.zeros(1), torch.ones(1))
    assert_near(loss, loss_by_definition([8.0], [rejected.item()], [0.0], [1.0]))
    assert loss.dtype == torch.float32


@property_test
@given(case=columns(2))
def test_accuracy_counts_wins_and_half_the_ties(case):
    (chosen, rejected), _ = case
    points = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    assert_near(won_pairs(tensor(chosen), tensor(rejected)).mean(), sum(points) / len(points))


def test_a_model_that_scores_everything_alike_is_at_chance():
    assert won_pairs(torch.ones(7), torch.ones(7)).tolist() == [0.5] * 7


def test_no_pairs_give_no_points():
    assert won_pairs(torch.zeros(0), torch.zeros(0)).numel() == 0
