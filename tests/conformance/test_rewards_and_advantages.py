"""From scores to advantages: what is paid where, over which tokens, in which order."""

import statistics

import pytest
import torch

from dovetail.batches import pack
from tests.conformance.subject import maths
from tests.conformance.toys import LENGTHS, actions_of, layout
from tests.tolerance import assert_near


def packed_batch(lengths=LENGTHS):
    plan = layout(lengths)
    return pack(plan.sequences, plan.masks)


def advantages_of(rewards_T, values_T, batch, *, gamma=1.0, lam=1.0):
    """Advantages of the actions of a packed batch, one list per answer."""
    bounds = maths.cu_actions(batch.mask_T, batch.cu_seqlens_S1)
    flat = maths.gae(rewards_T[batch.mask_T], values_T[batch.mask_T], bounds, gamma=gamma, lam=lam)
    return [row.tolist() for row in flat.split((bounds[1:] - bounds[:-1]).tolist())]


def test_the_score_is_paid_once_at_the_last_action():
    """With gamma = lambda = 1 and no critic, every action of an answer has the score as its advantage; paid
    one position later, on a token nobody chose, it would be lost or discounted."""
    batch = packed_batch()
    scores = [float(s + 1) for s in range(len(LENGTHS))]
    same = torch.full((batch.num_tokens,), -1.0, dtype=torch.float64)
    rewards_T = maths.per_token_rewards(
        same, same, torch.tensor(scores), batch.mask_T, batch.last_index_S(), kl_coefficient=0.1
    )
    assert_near(rewards_T.sum(), sum(scores))
    advantages = advantages_of(rewards_T, torch.zeros_like(rewards_T), batch)
    assert advantages == [[score] * answer for score, (_, answer) in zip(scores, LENGTHS, strict=True)]


def test_rewards_of_an_answer_add_up_to_its_score_minus_its_penalty():
    """Undiscounted, an answer is worth score - beta sum_t log-ratio, whatever its length."""
    batch = packed_batch([(2, 3), (1, 1)])
    logprobs = torch.tensor([9.0, 9.0, -1.0, -2.0, -3.0, 9.0, -0.5], dtype=torch.float64)
    reference = torch.tensor([7.0, 7.0, -1.5, -2.5, -2.0, 7.0, -0.25], dtype=torch.float64)
    rewards_T = maths.per_token_rewards(
        logprobs, reference, torch.tensor([2.0, -1.0]), batch.mask_T, batch.last_index_S(), kl_coefficient=0.5
    )
    assert_near(rewards_T[:5].sum(), 2.0 - 0.5 * (0.5 + 0.5 - 1.0))
    assert_near(rewards_T[5:].sum(), -1.0 - 0.5 * -0.25)


def test_only_scores_are_clipped_and_not_the_penalty():
    """The reward model's score is bounded before the penalty is added; the penalty is not."""
    scores = maths.clip_scores(torch.tensor([40.0]), 5.0)
    columns = (torch.tensor([0.0]), torch.tensor([-100.0]), scores, torch.tensor([True]), torch.tensor([0]))
    rewards = maths.per_token_rewards(*columns, kl_coefficient=0.2)
    assert_near(rewards, [5.0 - 0.2 * 100.0])


def test_a_cut_off_answer_is_known_by_the_generators_account():
    """Whether an answer ended is `finished`, not a look at its last token; only cut-off answers pay."""
    scores, finished = torch.tensor([3.0, 3.0, -1.0]), torch.tensor([True, False, True])
    assert maths.replace_missing_end(scores, finished, -5.0).tolist() == [3.0, -5.0, -1.0]
    assert maths.replace_missing_end(scores, finished, None).tolist() == [3.0, -2.0, -1.0]


REWARDS = torch.tensor([0.0, 0.0, 0.0, 8.0])
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0])
ONE_ANSWER = torch.tensor([0, 4])


def test_the_value_after_an_end_is_zero():
    """Four tokens by hand, gamma = lambda = 1/2: deltas 0, -1/2, -1, 4, each plus a quarter of the next
    sum."""
    advantages = maths.gae(REWARDS, VALUES, ONE_ANSWER, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.125, -0.5, 0.0, 4.0]


def test_tokens_between_two_actions_neither_decay_nor_interrupt():
    """Five tokens of tool output inside an answer leave the advantages of the model's own tokens alone."""
    rewards, values = [0.1, -0.2, 0.3, 1.0], [0.5, 0.4, -0.3, 0.2]
    nan = float("nan")
    plain = pack([[1] * 5], [[False] + [True] * 4])
    broken = pack([[1] * 10], [[False, True, True, *[False] * 5, True, True]])
    without = advantages_of(
        torch.tensor([nan, *rewards]), torch.tensor([nan, *values]), plain, gamma=0.9, lam=0.8
    )
    tool_output = [nan] * 5
    with_tool = advantages_of(
        torch.tensor([nan, *rewards[:2], *tool_output, *rewards[2:]]),
        torch.tensor([nan, *values[:2], *tool_output, *values[2:]]),
        broken,
        gamma=0.9,
        lam=0.8,
    )
    assert with_tool == without


def test_returns_are_the_discounted_rewards_to_go_when_lambda_is_one():
    """The critic's target, advantage + value before any normalisation, is then sum_l gamma^l r_{t+l}."""
    generator = torch.Generator().manual_seed(0)
    batch = packed_batch()
    rewards_T = torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)
    values_T = torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)
    advantages = advantages_of(rewards_T, values_T, batch, gamma=0.9)
    returns = torch.tensor([a for row in advantages for a in row]) + values_T[batch.mask_T]
    expected, rest = [], actions_of(rewards_T, batch.mask_T)
    for _, answer in LENGTHS:
        own, rest = rest[:answer], rest[answer:]
        expected += [sum(0.9**k * r for k, r in enumerate(own[t:])) for t in range(answer)]
    assert_near(returns, expected, dtype=torch.float32)


def random_advantages():
    generator = torch.Generator().manual_seed(1)
    batch = packed_batch()
    return batch, 3 * torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64) + 1


def test_advantages_are_normalised_over_the_actions_of_the_whole_batch():
    """Mean and deviation are those of all actions of all answers, each counted once, prompts not at all."""
    batch, advantages_T = random_advantages()
    poisoned_T = advantages_T.masked_fill(~batch.mask_T, float("nan"))
    actions = actions_of(advantages_T, batch.mask_T)
    mean, deviation = statistics.fmean(actions), statistics.pstdev(actions)
    normalised = actions_of(maths.normalise(poisoned_T, batch.mask_T), batch.mask_T)
    assert_near(torch.tensor(normalised), [(a - mean) / deviation for a in actions], dtype=torch.float32)


def test_normalising_each_part_alone_would_give_other_numbers():
    """Half of the batch alone differs from the whole: it must be done once, before the batch is cut."""
    batch, advantages_T = random_advantages()
    half = batch.num_tokens // 2
    whole = maths.normalise(advantages_T, batch.mask_T)
    first = maths.normalise(advantages_T[:half], batch.mask_T[:half])
    assert (first - whole[:half]).abs().max() > 0.01


def test_a_part_without_actions_neither_fails_nor_counts():
    """A shard whose answers are all masked out gives zeros, no NaN."""
    nothing = torch.zeros(5, dtype=torch.bool)
    assert maths.normalise(torch.full((5,), float("nan")), nothing).tolist() == [0.0] * 5


def test_scaling_rewards_keeps_their_mean_and_ignores_other_tokens():
    """Whitened rewards have unit deviation over the actions and the mean they had; others would shift
    both."""
    batch, rewards_T = random_advantages()
    scaled_T = maths.scale_to_unit_std(rewards_T.masked_fill(~batch.mask_T, 1e6), batch.mask_T)
    before, after = actions_of(rewards_T, batch.mask_T), actions_of(scaled_T, batch.mask_T)
    assert_near(statistics.fmean(after), statistics.fmean(before), dtype=torch.float32)
    assert_near(statistics.pstdev(after), 1.0, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalised_advantages_do_not_depend_on_the_scale_of_the_reward(scale):
    """A reward model with larger scores does not train with a larger step."""
    batch, advantages_T = random_advantages()
    assert_near(
        maths.normalise(scale * advantages_T, batch.mask_T),
        maths.normalise(advantages_T, batch.mask_T),
        dtype=torch.float32,
    )
