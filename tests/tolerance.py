"""How near is equal, by dtype: the only place in the tests where a tolerance is written.

Responsible for: comparing tensors with plain Python numbers, lists or other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

NEAR = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Relative, and absolute for values below one: room for the rounding of a few hundred operations."""


def assert_near(actual: Any, expected: Any, *, dtype: torch.dtype | None = None) -> None:
    """Every number of `actual` equals that of `expected` to the precision of `dtype` (default: of `actual`).

    `expected` may be a number, a list or a tensor; shapes must agree. NaN equals nothing.
    """
    actual = torch.as_tensor(actual)
    near = NEAR[dtype or (actual.dtype if actual.is_floating_point() else torch.float64)]
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().cpu().double(), expected.detach().cpu(), rtol=near, atol=near)


def assert_all_near(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, and every tensor near its namesake to the precision of `actual`."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_near(tensor, expected[name])
