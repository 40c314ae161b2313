"""Log-probabilities and entropy, against sums over the vocabulary in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.logprobs import entropy_of, logprobs_of
from tests.maths.strategies import numbers, property_test, tensor
from tests.tolerance import assert_near

rows = st.lists(st.lists(numbers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=6)


def softmax_by_definition(logits, temperature):
    weights = [math.exp(z / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


@property_test
@given(logits=rows, temperature=st.sampled_from([0.5, 1.0, 2.0]), data=st.data())
def test_logprob_is_the_log_of_the_softmax_at_the_token(logits, temperature, data):
    ids = [data.draw(st.integers(0, 3)) for _ in logits]
    expected = [math.log(softmax_by_definition(z, temperature)[i]) for z, i in zip(logits, ids, strict=True)]
    assert_near(logprobs_of(tensor(logits), torch.tensor(ids), temperature), expected)


@property_test
@given(logits=rows, temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_entropy_is_the_expected_surprise(logits, temperature):
    probabilities = [softmax_by_definition(z, temperature) for z in logits]
    expected = [-math.fsum(p * math.log(p) for p in row) for row in probabilities]
    assert_near(entropy_of(tensor(logits), temperature), expected)


def test_uniform_logits_have_the_entropy_of_a_fair_die():
    assert_near(entropy_of(torch.zeros(1, 6, dtype=torch.float64)), [math.log(6)])


def test_a_forbidden_token_adds_nothing_to_entropy_or_its_gradient():
    logits = torch.tensor([[1.0, 2.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    entropy = entropy_of(logits)
    assert_near(entropy, entropy_of(logits.detach()[:, :2]))
    entropy.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32_logprobs(dtype):
    logits = torch.tensor([[10.0, 9.0, -4.0]], dtype=dtype)
    logprobs = logprobs_of(logits, torch.tensor([1]))
    assert logprobs.dtype == torch.float32
    assert_near(logprobs, [math.log(softmax_by_definition([10.0, 9.0, -4.0], 1.0)[1])])


def test_huge_logits_do_not_overflow():
    assert_near(logprobs_of(torch.tensor([[1e5, 1e5]]), torch.tensor([0])), [math.log(0.5)])
