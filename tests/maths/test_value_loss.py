"""The critic's loss and explained variance, against the formula and `statistics`."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.ppo import clipped_value_loss, explained_variance
from tests.maths.strategies import POISONS, columns, cut, poisoned, property_test, reordered, tensor
from tests.tolerance import assert_near

clips = st.sampled_from([None, 0.2, 1.0])


def error_by_definition(values, old_values, returns, mask, *, clip):
    total, num_clipped = 0.0, 0
    for v, old, target, counts in zip(values, old_values, returns, mask, strict=True):
        if counts:
            near = v if clip is None else min(max(v, old - clip), old + clip)
            total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            num_clipped += (near - target) ** 2 > (v - target) ** 2 + 1e-9
    return total, num_clipped


def loss_of(rows, mask, clip):
    return clipped_value_loss(*(tensor(row) for row in rows), torch.tensor(mask, dtype=torch.bool), clip=clip)


@property_test
@given(case=columns(3), clip=clips)
def test_loss_equals_the_formula_token_by_token(case, clip):
    rows, mask = case
    total, _ = error_by_definition(*rows, mask, clip=clip)
    loss = loss_of(rows, mask, clip)
    assert_near(loss.total, total)
    assert loss.count.item() == sum(mask)


def test_clipped_tokens_are_counted():
    rows = [[1.0, 0.1, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, -2.0, 9.0]]
    mask = [True, True, True, False]
    _, expected = error_by_definition(*rows, mask, clip=0.2)
    assert loss_of(rows, mask, 0.2).num_clipped.item() == expected == 1


@property_test
@given(case=columns(3), clip=clips, poison=st.sampled_from(POISONS))
def test_excluded_tokens_cannot_matter(case, clip, poison):
    rows, mask = case
    assert loss_of([poisoned(row, mask, poison) for row in rows], mask, clip) == loss_of(rows, mask, clip)
    values = tensor(poisoned(rows[0], mask, poison)).requires_grad_()
    clipped_value_loss(
        values, tensor(rows[1]), tensor(rows[2]), torch.tensor(mask), clip=clip
    ).total.backward()
    assert values.grad.isfinite().all()
    assert values.grad[~torch.tensor(mask)].abs().sum() == 0


@property_test
@given(case=columns(3), clip=clips, at=st.integers(0, 12))
def test_micro_batches_add_up_to_the_batch(case, clip, at):
    rows, mask = case
    parts = [loss_of([cut(row, at)[i] for row in rows], cut(mask, at)[i], clip) for i in range(2)]
    whole = loss_of(rows, mask, clip)
    for name in ("total", "count", "num_clipped"):
        assert_near(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name))


@property_test
@given(case=columns(3), clip=clips, data=st.data())
def test_the_order_of_tokens_cannot_matter(case, clip, data):
    rows, mask = case
    order = data.draw(st.permutations(range(len(mask))))
    mixed = loss_of([reordered(row, order) for row in rows], reordered(mask, order), clip)
    assert_near(mixed.total, loss_of(rows, mask, clip).total)


@property_test
@given(case=columns(2))
def test_explained_variance_equals_the_ratio_of_variances(case):
    (values, returns), mask = case
    kept = [(v, r) for v, r, m in zip(values, returns, mask, strict=True) if m]
    spread = statistics.pvariance([r for _, r in kept]) if kept else 0.0
    expected = 1 - statistics.pvariance([r - v for v, r in kept]) / spread if spread > 1e-6 else None
    actual = explained_variance(tensor(values), tensor(returns), torch.tensor(mask))
    if expected is not None:
        expected = max(expected, -10.0)
        assert_near(actual / max(1.0, abs(expected)), expected / max(1.0, abs(expected)), dtype=torch.float32)


@pytest.mark.parametrize("poison", POISONS)
def test_excluded_tokens_cannot_change_explained_variance(poison):
    values, returns, mask = [1.0, 2.0, 0.0, 4.0], [1.5, 2.0, 0.0, 3.0], [True, True, False, True]
    sick = [tensor(poisoned(row, mask, poison)) for row in (values, returns)]
    clean = explained_variance(tensor(values), tensor(returns), torch.tensor(mask))
    assert torch.equal(explained_variance(*sick, torch.tensor(mask)), clean)


def test_explained_variance_of_known_predictions():
    returns, everything = tensor([1.0, 2.0, 3.0]), torch.ones(3).bool()
    assert explained_variance(returns, returns, everything) == 1
    assert explained_variance(tensor([2.0, 2.0, 2.0]), returns, everything) == 0
    assert explained_variance(-returns, returns, everything) == -3
    assert explained_variance(10 * returns, returns, everything) == -10  # -80, which says no more
    assert explained_variance(returns, tensor([2.0, 2.0, 2.0]), everything) == 0  # nothing to explain
