"""The one widening cast."""

import pytest
import torch

from dovetail.maths.masked import at_least_float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_low_precision_is_widened_and_high_precision_is_kept(given, expected):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == expected
