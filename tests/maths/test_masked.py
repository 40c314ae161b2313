"""Sums, means and scales over a mask, against Python's own `statistics`."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.masked import masked_mean, masked_sum, normalise, scale_to_unit_std, zero_outside
from tests.maths.strategies import POISONS, columns, cut, poisoned, property_test, reordered, tensor
from tests.tolerance import assert_near

EVERY = [zero_outside, masked_sum, masked_mean, normalise, scale_to_unit_std]
COLUMN = [3.0, -1.0, 2.0, 8.0, 0.5, 4.0]
MASK = [True, False, True, True, False, True]
KEPT = [3.0, 2.0, 8.0, 4.0]


def test_sum_and_mean_are_those_of_the_marked_tokens():
    assert_near(masked_sum(tensor(COLUMN), torch.tensor(MASK)), sum(KEPT))
    assert_near(masked_mean(tensor(COLUMN), torch.tensor(MASK)), statistics.fmean(KEPT))


def test_without_any_marked_token_sum_and_mean_are_zero():
    nothing = torch.zeros(len(COLUMN), dtype=torch.bool)
    assert masked_sum(tensor(COLUMN), nothing) == 0
    assert masked_mean(tensor(COLUMN), nothing) == 0
    assert normalise(tensor(COLUMN), nothing).tolist() == [0.0] * len(COLUMN)


def test_normalised_tokens_have_zero_mean_and_unit_deviation_and_the_rest_is_zero():
    mean, deviation = statistics.fmean(KEPT), statistics.pstdev(KEPT)
    expected = [(x - mean) / deviation if m else 0.0 for x, m in zip(COLUMN, MASK, strict=True)]
    assert_near(normalise(tensor(COLUMN), torch.tensor(MASK), eps=0.0), expected)


def test_scaling_keeps_the_mean_and_gives_unit_deviation():
    scaled = scale_to_unit_std(tensor(COLUMN), torch.tensor(MASK), eps=0.0)
    kept = [x for x, m in zip(scaled.tolist(), MASK, strict=True) if m]
    assert_near(statistics.fmean(kept), statistics.fmean(KEPT))
    assert_near(statistics.pstdev(kept), 1.0)
    assert [x for x, m in zip(scaled.tolist(), MASK, strict=True) if not m] == [0.0, 0.0]


@pytest.mark.parametrize("constant", [0.1, -7.3, 1e4, 1e-6])
def test_equal_numbers_normalise_to_zero_and_not_to_amplified_rounding(constant):
    column = torch.full((1000,), constant, dtype=torch.float32)
    everything = torch.ones(1000, dtype=torch.bool)
    assert normalise(column, everything).abs().max() < 1e-4
    assert_near(scale_to_unit_std(column, everything), [constant] * 1000, dtype=torch.float16)


def test_one_action_normalises_to_zero():
    assert normalise(tensor([3.0]), torch.tensor([True])).tolist() == [0.0]


def test_low_precision_is_summed_in_float32():
    column = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    total = masked_sum(column, torch.ones(4096, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert_near(total, 4096 * column[0].double().item())


@pytest.mark.parametrize("function", EVERY)
@property_test
@given(case=columns(1), poison=st.sampled_from(POISONS))
def test_excluded_tokens_cannot_matter(function, case, poison):
    (column,), mask = case
    clean = function(tensor(column), torch.tensor(mask))
    assert torch.equal(function(tensor(poisoned(column, mask, poison)), torch.tensor(mask)), clean)


@pytest.mark.parametrize("function", [zero_outside, masked_sum, masked_mean, normalise])
@pytest.mark.parametrize("poison", POISONS)
def test_excluded_tokens_get_no_gradient_and_spoil_no_other(function, poison):
    column = tensor(poisoned(COLUMN, MASK, poison)).requires_grad_()
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (function(column, torch.tensor(MASK)) * weights).sum().backward()
    assert column.grad.isfinite().all()
    assert column.grad[~torch.tensor(MASK)].tolist() == [0.0, 0.0]


@property_test
@given(case=columns(1), at=st.integers(0, 12))
def test_sums_of_two_parts_add_up_to_the_sum_of_the_whole(case, at):
    (column,), mask = case
    parts = zip(cut(column, at), cut(mask, at), strict=True)
    total = sum(masked_sum(tensor(x), torch.tensor(m, dtype=torch.bool)) for x, m in parts)
    assert_near(total, masked_sum(tensor(column), torch.tensor(mask)))


@property_test
@given(case=columns(1), data=st.data())
def test_the_order_of_tokens_cannot_matter(case, data):
    (column,), mask = case
    order = data.draw(st.permutations(range(len(mask))))
    for function in (normalise, scale_to_unit_std):
        plain = function(tensor(column), torch.tensor(mask), eps=1e-3)
        mixed = function(tensor(reordered(column, order)), torch.tensor(reordered(mask, order)), eps=1e-3)
        assert_near(mixed, plain[list(order)], dtype=torch.float32)
