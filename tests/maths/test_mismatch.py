"""Generator and training forward: gaps and weights, against plain Python token by token."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.ppo import importance_weights, mismatch
from tests.maths.strategies import POISONS, columns, cut, poisoned, property_test, reordered, tensor
from tests.tolerance import assert_near

cases = columns(2, low=-4, high=4)


def gaps_by_definition(old, drawn, mask):
    return [p - q for p, q, counts in zip(old, drawn, mask, strict=True) if counts]


def found(rows, mask):
    return mismatch(*(tensor(row) for row in rows), torch.tensor(mask, dtype=torch.bool))


@property_test
@given(case=cases, cap=st.sampled_from([0.5, 1.0, 2.0]))
def test_gaps_and_weights_equal_the_definition_token_by_token(case, cap):
    (old, drawn), mask = case
    gaps, gap = gaps_by_definition(old, drawn, mask), found((old, drawn), mask)
    assert_near(gap.gap_sum, sum(map(abs, gaps)))
    assert_near(gap.gap_max, max(map(abs, gaps), default=0.0))
    assert_near(gap.kl_sum, sum(math.exp(d) - 1 - d for d in gaps))
    weights = importance_weights(tensor(old), tensor(drawn), torch.tensor(mask), cap=cap)
    expected = [
        min(math.exp(p - q), cap) if counts else min(1.0, cap)
        for p, q, counts in zip(old, drawn, mask, strict=True)
    ]
    assert_near(weights, expected)


@property_test
@given(case=cases, poison=st.sampled_from(POISONS), column=st.integers(0, 1))
def test_excluded_tokens_cannot_matter(case, poison, column):
    rows, mask = case
    sick = [poisoned(row, mask, poison) if i == column else row for i, row in enumerate(rows)]
    assert found(sick, mask) == found(rows, mask)
    weights = [
        importance_weights(tensor(r[0]), tensor(r[1]), torch.tensor(mask), cap=2.0) for r in (sick, rows)
    ]
    assert torch.equal(*weights)


@property_test
@given(case=cases, at=st.integers(0, 12))
def test_micro_batches_add_up_to_the_batch(case, at):
    rows, mask = case
    parts = [cut(mask, at)[part] for part in range(2)]
    pieces = [found([cut(row, at)[i] for row in rows], parts[i]) for i in range(2) if parts[i]]
    whole = found(rows, mask)
    assert_near(sum(piece.gap_sum for piece in pieces), whole.gap_sum)
    assert_near(sum(piece.kl_sum for piece in pieces), whole.kl_sum)
    assert_near(max(piece.gap_max for piece in pieces), whole.gap_max)


@property_test
@given(case=cases, data=st.data())
def test_the_order_of_tokens_cannot_matter(case, data):
    rows, mask = case
    order = data.draw(st.permutations(range(len(mask))))
    mixed = found([reordered(row, order) for row in rows], reordered(mask, order))
    assert_near(mixed.gap_sum, found(rows, mask).gap_sum)


def test_an_impossible_token_is_weighted_zero_and_nan_is_not_hidden():
    old = torch.tensor([float("-inf"), float("nan"), 300.0])
    weights = importance_weights(old, torch.full((3,), -1.0), torch.ones(3).bool(), cap=2.0)
    assert weights.tolist()[::2] == [0.0, 2.0]
    assert weights[1].isnan()
    assert found([[float("-inf")], [-1.0]], [True]).gap_max.isinf()


def test_low_precision_is_widened_before_the_difference():
    old, drawn = (torch.tensor([x], dtype=torch.bfloat16) for x in (-10.0, -10.0625))
    weights = importance_weights(old, drawn, torch.tensor([True]), cap=2.0)
    assert_near(weights, [math.exp(0.0625)])
    assert weights.dtype == torch.float32
