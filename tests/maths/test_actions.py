"""Bounds of the actions, against counting in lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.masked import cu_actions
from tests.maths.strategies import property_test


@property_test
@given(masks=st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=5))
def test_bounds_count_the_marked_tokens_of_each_sequence(masks):
    flat = torch.tensor([m for mask in masks for m in mask], dtype=torch.bool)
    bounds = [sum(len(mask) for mask in masks[:s]) for s in range(len(masks) + 1)]
    expected = [sum(sum(mask) for mask in masks[:s]) for s in range(len(masks) + 1)]
    assert cu_actions(flat, torch.tensor(bounds, dtype=torch.int32)).tolist() == expected
