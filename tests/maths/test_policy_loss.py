"""PPO's clipped surrogate, against the formula token by token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.groups import sequence_ratio_loss
from dovetail.maths.ppo import clipped_policy_loss
from tests.maths.strategies import POISONS, columns, cut, poisoned, property_test, reordered, tensor
from tests.tolerance import assert_near

cases = columns(3, low=-4, high=4)


def surrogate_by_definition(new, old, advantages, mask, *, clip):
    """-min(r A, clip(r) A), its sum, and how often the clipped term was the smaller."""
    total, num_clipped, divergence = 0.0, 0, 0.0
    for p, q, a, counts in zip(new, old, advantages, mask, strict=True):
        if counts:
            ratio = math.exp(p - q)
            plain, clipped = ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a
            total -= min(plain, clipped)
            num_clipped += clipped < plain
            divergence += ratio - 1 - (p - q)
    return total, num_clipped, divergence


def loss_of(rows, mask, clip=0.2):
    return clipped_policy_loss(
        *(tensor(row) for row in rows), torch.tensor(mask, dtype=torch.bool), clip=clip
    )


@property_test
@given(case=cases, clip=st.sampled_from([0.1, 0.2, 0.5]))
def test_loss_equals_the_formula_token_by_token(case, clip):
    rows, mask = case
    total, num_clipped, divergence = surrogate_by_definition(*rows, mask, clip=clip)
    loss = loss_of(rows, mask, clip)
    assert_near(loss.total, total)
    assert_near(loss.kl_sum, divergence)
    assert (loss.count.item(), loss.num_clipped.item()) == (sum(mask), num_clipped)


@property_test
@given(case=cases, poison=st.sampled_from(POISONS), column=st.integers(0, 2))
def test_excluded_tokens_cannot_change_any_number(case, poison, column):
    rows, mask = case
    sick = [poisoned(row, mask, poison) if i == column else row for i, row in enumerate(rows)]
    assert loss_of(sick, mask) == loss_of(rows, mask)


@property_test
@given(case=cases, poison=st.sampled_from(POISONS))
def test_excluded_tokens_get_no_gradient_and_spoil_no_other(case, poison):
    (new, old, advantages), mask = case
    logprobs = tensor(poisoned(new, mask, poison)).requires_grad_()
    rest = [tensor(poisoned(row, mask, poison)) for row in (old, advantages)]
    clipped_policy_loss(logprobs, *rest, torch.tensor(mask), clip=0.2).total.backward()
    clean = tensor(new).requires_grad_()
    clipped_policy_loss(clean, tensor(old), tensor(advantages), torch.tensor(mask), clip=0.2).total.backward()
    assert torch.equal(logprobs.grad, clean.grad)
    assert logprobs.grad[~torch.tensor(mask)].abs().sum() == 0


@property_test
@given(case=cases, at=st.integers(0, 12))
def test_micro_batches_add_up_to_the_batch(case, at):
    rows, mask = case
    first, second = (loss_of([cut(row, at)[part] for row in rows], cut(mask, at)[part]) for part in range(2))
    whole = loss_of(rows, mask)
    for name in ("total", "count", "num_clipped", "kl_sum", "num_clamped"):
        assert_near(getattr(first, name) + getattr(second, name), getattr(whole, name))


@property_test
@given(case=cases, data=st.data())
def test_the_order_of_tokens_cannot_matter(case, data):
    rows, mask = case
    order = data.draw(st.permutations(range(len(mask))))
    mixed = loss_of([reordered(row, order) for row in rows], reordered(mask, order))
    assert_near(mixed.total, loss_of(rows, mask).total)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # inside the range the loss falls with the ratio: d(-r A)/d log r = -r A
        (1.1, -1.0, 1.1),
        (1.5, 1.0, 0.0),  # a good action is already likely enough
        (0.5, -1.0, 0.0),  # a bad action is already unlikely enough
        (1.5, -1.0, 1.5),  # a bad action became likelier: never clipped
        (0.5, 1.0, -0.5),  # a good action became unlikelier: never clipped
    ],
)
def test_gradient_stops_only_where_the_step_has_gone_far_enough(ratio, advantage, gradient):
    logprobs = tensor([math.log(ratio)]).requires_grad_()
    loss = clipped_policy_loss(logprobs, tensor([0.0]), tensor([advantage]), torch.tensor([True]), clip=0.2)
    loss.total.backward()
    assert_near(logprobs.grad, [gradient])
    assert bool(loss.num_clipped) == (gradient == 0.0)


@pytest.mark.parametrize("log_ratio", [-3.0, math.log(0.85), 0.0, math.log(1.25), math.log(1.4), 2.0, 30.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 0.5])
@pytest.mark.parametrize("of", ["tokens", "sequences"])
def test_bounds_act_on_the_side_of_their_sign(of, advantage, log_ratio):
    """The table: a good action is bounded above, by 1.28; a bad one below, by 0.8, and far above, by 3."""
    logprobs = tensor([log_ratio]).requires_grad_()
    rest = tensor([0.0]), tensor([advantage]), torch.tensor([True])
    if of == "tokens":
        loss = clipped_policy_loss(logprobs, *rest, clip=0.2, clip_high=0.28, dual_clip=3.0)
    else:
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        loss = sequence_ratio_loss(logprobs, *rest, bounds, clip=(0.2, 0.28), dual_clip=3.0)
    loss.total.backward()
    ratio = math.exp(min(log_ratio, 20.0))
    low, high = {-2.0: (0.8, 3.0), 0.0: (-math.inf, math.inf), 0.5: (-math.inf, 1.28)}[advantage]
    is_inside = low <= ratio <= high
    assert_near(loss.total, -advantage * min(max(ratio, low), high))
    assert_near(logprobs.grad, [-advantage * ratio if is_inside and log_ratio < 20 else 0.0])
    assert bool(loss.num_clipped) == (not is_inside)


def test_low_precision_is_widened_before_the_ratio():
    new = torch.tensor([-10.0], dtype=torch.bfloat16)
    old = torch.tensor([-10.0625], dtype=torch.bfloat16)
    loss = clipped_policy_loss(new, old, torch.ones(1), torch.tensor([True]), clip=0.2)
    assert_near(loss.total, -math.exp(0.0625))
    assert loss.total.dtype == torch.float32


def test_statistics_carry_no_gradient():
    logprobs = tensor([-1.0, -2.0]).requires_grad_()
    old, advantages, mask = tensor([-1.1, -1.0]), tensor([1.0, 1.0]), torch.tensor([True, True])
    loss = clipped_policy_loss(logprobs, old, advantages, mask, clip=0.2)
    assert loss.total.requires_grad
    assert not any(t.requires_grad for t in (loss.kl_sum, loss.num_clipped, loss.num_clamped, loss.count))


def test_nan_in_an_action_is_not_hidden():
    loss = loss_of([[float("nan"), -1.0], [-1.0, -1.0], [1.0, 1.0]], [True, True])
    assert loss.total.isnan()
