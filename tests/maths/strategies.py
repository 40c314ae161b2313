"""What property tests draw: columns of tokens with a mask, and ways to cut and reorder them.

Responsible for: inputs as plain Python lists. The tests turn them into tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

POISONS = (float("nan"), float("inf"), float("-inf"))
"""What an excluded token may hold. NaN * 0 and inf * 0 are NaN, so multiplying by a mask does not help."""

property_test = settings(max_examples=50, deadline=None, derandomize=True, database=None)
"""Reproducible: the same examples on every run, nothing written to disk."""


def numbers(low: float = -5.0, high: float = 5.0) -> st.SearchStrategy[float]:
    """Numbers that float32 holds exactly, so that they mean the same in Python and in a tensor."""
    return st.floats(low, high, width=32, allow_subnormal=False)


Columns = tuple[list[list[float]], list[bool]]


@st.composite
def columns(draw: Any, count: int, *, low: float = -5.0, high: float = 5.0) -> Columns:
    """`count` columns of one length (1 to 12) and a mask."""
    length = draw(st.integers(1, 12))
    rows = [draw(st.lists(numbers(low, high), min_size=length, max_size=length)) for _ in range(count)]
    return rows, draw(st.lists(st.booleans(), min_size=length, max_size=length))


@st.composite
def answers(draw: Any) -> list[list[tuple[float, float]]]:
    """Up to 5 answers of 0 to 9 actions, each action a (reward, value)."""
    action = st.tuples(numbers(), numbers())
    return draw(st.lists(st.lists(action, max_size=9), min_size=1, max_size=5))


def tensor(column: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(column, dtype=dtype)


def poisoned(column: Sequence[float], mask: Sequence[bool], poison: float) -> list[float]:
    """The column with `poison` wherever the mask is False."""
    return [x if m else poison for x, m in zip(column, mask, strict=True)]


def reordered(column: Sequence[Any], order: Sequence[int]) -> list[Any]:
    return [column[i] for i in order]


def cut(column: Sequence[Any], at: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """The two parts of a column, either of which may be empty."""
    return column[:at], column[at:]
