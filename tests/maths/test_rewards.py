"""Per-token rewards, against a list built token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dovetail.maths.ppo import clip_scores, per_token_rewards, replace_missing_end
from tests.maths.strategies import POISONS, numbers, poisoned, property_test, tensor
from tests.tolerance import assert_near


@st.composite
def rollouts(draw):
    """Answers as (prompt length, [(logprob, reference logprob)], score)."""
    action = st.tuples(numbers(-6, 0), numbers(-6, 0))
    answer = st.tuples(st.integers(1, 3), st.lists(action, min_size=1, max_size=5), numbers())
    return draw(st.lists(answer, min_size=1, max_size=4))


def laid_out(rollout, filler=0.0):
    """The columns of all answers end to end: logprobs, reference logprobs, mask, last actions, scores."""
    new, reference, mask, last = [], [], [], []
    for prompt_length, actions, _ in rollout:
        new += [filler] * prompt_length + [p for p, _ in actions]
        reference += [filler] * prompt_length + [q for _, q in actions]
        mask += [False] * prompt_length + [True] * len(actions)
        last.append(len(mask) - 1)
    return new, reference, [score for *_, score in rollout], mask, last


def rewards_of(new, reference, scores, mask, last, beta):
    return per_token_rewards(
        tensor(new),
        tensor(reference),
        tensor(scores),
        torch.tensor(mask),
        torch.tensor(last),
        kl_coefficient=beta,
    )


@property_test
@given(rollout=rollouts(), beta=st.sampled_from([0.0, 0.05, 1.0]))
def test_each_action_pays_its_penalty_and_the_last_one_earns_the_score(rollout, beta):
    expected = []
    for prompt_length, actions, score in rollout:
        penalties = [-beta * (p - q) for p, q in actions]
        expected += [0.0] * prompt_length + penalties[:-1] + [penalties[-1] + score]
    assert_near(rewards_of(*laid_out(rollout), beta), expected)


@property_test
@given(rollout=rollouts(), poison=st.sampled_from(POISONS))
def test_excluded_tokens_cannot_matter(rollout, poison):
    assert torch.equal(rewards_of(*laid_out(rollout, poison), 0.1), rewards_of(*laid_out(rollout), 0.1))


@property_test
@given(rollout=rollouts(), data=st.data())
def test_the_order_of_answers_cannot_matter(rollout, data):
    order = data.draw(st.permutations(range(len(rollout))))
    lengths = [prompt + len(actions) for prompt, actions, _ in rollout]
    plain = rewards_of(*laid_out(rollout), 0.1).split(lengths)
    mixed = rewards_of(*laid_out([rollout[i] for i in order]), 0.1)
    assert torch.equal(mixed, torch.cat([plain[i] for i in order]))


def test_arguments_are_left_as_they_were():
    logprobs = tensor([-1.0, -2.0])
    rewards_of(logprobs.tolist(), [-1.5, -1.5], [3.0], [True, True], [1], 0.1)
    scores = tensor([3.0, 9.0])
    replace_missing_end(scores, torch.tensor([True, False]), -1.0)
    clip_scores(scores, 5.0)
    assert scores.tolist() == [3.0, 9.0]


def test_scores_are_clipped_to_both_sides_or_not_at_all():
    scores = tensor([-9.0, -5.0, 0.5, 7.0])
    assert clip_scores(scores, 5.0).tolist() == [-5.0, -5.0, 0.5, 5.0]
    assert clip_scores(scores, None).tolist() == [-9.0, -5.0, 0.5, 7.0]


def test_scores_of_a_low_precision_model_become_float32():
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert clip_scores(scores, None).dtype == torch.float32
    assert replace_missing_end(scores, torch.tensor([True, True]), None).dtype == torch.float32


def test_an_answer_that_was_cut_off_gets_the_penalty_in_place_of_its_score():
    finished = torch.tensor([True, False, True])
    assert replace_missing_end(tensor([1.0, 8.0, -2.0]), finished, -1.0).tolist() == [1.0, -1.0, -2.0]


def test_without_a_penalty_it_gets_one_less_than_the_lowest_score_of_the_batch():
    finished = torch.tensor([True, False, True])
    assert replace_missing_end(tensor([1.0, 8.0, -2.0]), finished, None).tolist() == [1.0, -3.0, -2.0]


@pytest.mark.parametrize("penalty", [None, -1.0])
def test_finished_answers_keep_their_scores(penalty):
    scores = tensor([1.0, 8.0])
    assert replace_missing_end(scores, torch.tensor([True, True]), penalty).tolist() == [1.0, 8.0]


@pytest.mark.parametrize("poison", POISONS)
def test_what_the_model_said_of_a_cut_off_answer_cannot_matter_with_a_fixed_penalty(poison):
    mask = [True, False]
    scores = tensor(poisoned([1.0, 0.0], mask, poison))
    assert replace_missing_end(scores, torch.tensor(mask), -1.0).tolist() == [1.0, -1.0]
