"""Generalised advantage estimation, against the printed sum, answer by answer."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.ppo import gae
from tests.maths.strategies import answers, property_test, tensor
from tests.tolerance import assert_near

weights = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def gae_by_definition(rewards, values, *, gamma, lam, after=0.0):
    """sum_l (gamma lam)^l delta_{t+l}, exactly as printed; slow on purpose. after: V of the final state."""
    values = [*values, after]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
    return [
        sum((gamma * lam) ** l * delta[t + l] for l in range(len(rewards) - t))  # noqa: E741 - the paper's l
        for t in range(len(rewards))
    ]


def packed(batch):
    """Rewards, values and bounds of all answers end to end."""
    bounds = [sum(len(answer) for answer in batch[:s]) for s in range(len(batch) + 1)]
    flat = [action for answer in batch for action in answer]
    return tensor([r for r, _ in flat]), tensor([v for _, v in flat]), torch.tensor(bounds, dtype=torch.int32)


def one_by_one(batch, **kwargs):
    advantages = []
    for answer in batch:
        advantages += gae_by_definition([r for r, _ in answer], [v for _, v in answer], **kwargs)
    return advantages


@property_test
@given(batch=answers(), gamma=weights, lam=weights)
def test_packed_answers_equal_the_definition_one_by_one(batch, gamma, lam):
    assert_near(gae(*packed(batch), gamma=gamma, lam=lam), one_by_one(batch, gamma=gamma, lam=lam))


@property_test
@given(batch=answers(), data=st.data())
def test_the_order_of_answers_cannot_matter(batch, data):
    order = data.draw(st.permutations(range(len(batch))))
    mixed = gae(*packed([batch[i] for i in order]), gamma=0.9, lam=0.8)
    plain = gae(*packed(batch), gamma=0.9, lam=0.8).split([len(answer) for answer in batch])
    assert_near(mixed, torch.cat([plain[i] for i in order]))


@property_test
@given(batch=answers(), at=st.integers(0, 5))
def test_splitting_into_micro_batches_cannot_matter(batch, at):
    parts = [gae(*packed(part), gamma=0.9, lam=0.8) for part in (batch[:at], batch[at:])]
    assert_near(torch.cat(parts), gae(*packed(batch), gamma=0.9, lam=0.8))


@property_test
@given(batch=answers(), data=st.data())
def test_one_answer_full_of_nan_cannot_spoil_another(batch, data):
    sick = data.draw(st.integers(0, len(batch) - 1))
    nan = float("nan")
    spoiled = [[(nan, nan) for _ in answer] if s == sick else answer for s, answer in enumerate(batch)]
    lengths = [len(answer) for answer in batch]
    rows = zip(
        gae(*packed(spoiled), gamma=1.0, lam=0.95).split(lengths),
        gae(*packed(batch), gamma=1.0, lam=0.95).split(lengths),
        strict=True,
    )
    assert all(torch.equal(row, healthy) for s, (row, healthy) in enumerate(rows) if s != sick)


def test_long_ragged_answers_equal_the_backward_recursion():
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 512, 3, 511, 513, 40, 256, 257]
    rewards = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = []
    for start, end in pairwise(bounds):
        advantage, value_after, backwards = 0.0, 0.0, []
        for t in reversed(range(start, end)):
            advantage = float(rewards[t]) + value_after - float(values[t]) + 0.95 * advantage
            value_after = float(values[t])
            backwards.append(advantage)
        expected += reversed(backwards)
    assert_near(gae(rewards, values, torch.tensor(bounds), gamma=1.0, lam=0.95), expected)
    in_float32 = gae(rewards.float(), values.float(), torch.tensor(bounds), gamma=1.0, lam=0.95)
    assert in_float32.dtype == torch.float32
    assert_near(in_float32, expected)


def test_arguments_are_left_as_they_were():
    rewards, values, bounds = packed([[(1.0, 2.0), (3.0, 4.0)]])
    gae(rewards, values, bounds, gamma=1.0, lam=0.95)
    assert rewards.tolist() == [1.0, 3.0]
    assert values.tolist() == [2.0, 4.0]


def test_an_empty_batch_gives_no_advantages():
    assert gae(*packed([[]]), gamma=1.0, lam=0.95).tolist() == []
    no_answers = torch.zeros(1, dtype=torch.int32)
    assert gae(torch.zeros(0), torch.zeros(0), no_answers, gamma=1.0, lam=1.0).tolist() == []
