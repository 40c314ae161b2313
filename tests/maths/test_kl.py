"""KL estimators and the adaptive coefficient, by enumeration and by hand."""

import math

import pytest
import torch
from hypothesis import given

from dovetail.maths.ppo import adaptive_kl_coefficient, k1, k3
from tests.maths.strategies import columns, property_test, tensor
from tests.tolerance import assert_near


@property_test
@given(case=columns(2, low=-6, high=0))
def test_both_estimators_are_their_formulas(case):
    (new, reference), _ = case
    differences = [p - q for p, q in zip(new, reference, strict=True)]
    assert_near(k1(tensor(new), tensor(reference)), differences)
    assert_near(k3(tensor(new), tensor(reference)), [math.exp(-d) - 1 + d for d in differences])


@property_test
@given(case=columns(2, low=-6, high=0))
def test_k3_is_never_negative(case):
    (new, reference), _ = case
    assert (k3(tensor(new), tensor(reference)) >= -1e-15).all()


def test_equal_policies_give_exactly_zero():
    logprobs = torch.tensor([-0.1, -3.7, -12.0])
    for estimator in (k1, k3):
        assert estimator(logprobs, logprobs).tolist() == [0.0, 0.0, 0.0]


def test_bfloat16_is_widened_before_the_difference():
    new, reference = (
        torch.tensor([-10.0], dtype=torch.bfloat16),
        torch.tensor([-9.9375], dtype=torch.bfloat16),
    )
    assert k1(new, reference).dtype == torch.float32
    assert_near(k3(new, reference), [math.exp(0.0625) - 1 - 0.0625])


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.1)),  # 10 % above
        (5.4, 0.1 * (1 - 0.1 * 0.1)),
        (60.0, 0.1 * (1 + 0.2 * 0.1)),  # clipped
        (math.inf, 0.1 * (1 + 0.2 * 0.1)),
        (-3.0, 0.1 * (1 - 0.2 * 0.1)),
    ],
)
def test_the_coefficient_moves_by_the_clipped_relative_error(observed, expected):
    assert math.isclose(adaptive_kl_coefficient(0.1, observed, 6.0), expected)


@pytest.mark.parametrize("start", [0.01, 0.05, 0.5])
def test_the_controller_brings_a_policy_to_its_target_within_a_hundred_rollouts(start):
    """The policy is a model of one: its KL tends to 1 / (2 beta), a tenth of the way in each rollout."""
    kl, coefficient = 16.5, start
    for _ in range(150):
        kl += 0.1 * (0.5 / coefficient - kl)
        coefficient = adaptive_kl_coefficient(coefficient, kl, 10.0)
    assert kl == pytest.approx(10.0, rel=0.15)


def test_an_undefined_observation_leaves_the_coefficient_alone():
    assert adaptive_kl_coefficient(0.1, math.nan, 6.0) == 0.1
