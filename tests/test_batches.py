"""Shared prompts in packed batches: where they are found, kept, cut, and refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dovetail.batches import PackedBatch, pack, share_prompts
from dovetail.parallel.world import World, shared_micro_batches
from dovetail.rlhf.rewards import Answer
from dovetail.rlhf.roles import over_tokens
from dovetail.rlhf.rollout import pack_rollout
from dovetail.rlhf.update import minibatches
from dovetail.training.step import step_seed

PROMPT, OTHER = [5, 6, 7], [5, 6, 8]


def batch_of(*pairs: tuple[list[int], list[int]]) -> PackedBatch:
    """Prompts with answers, of which each token counts."""
    packed = pack([p + a for p, a in pairs], [[False] * len(p) + [True] * len(a) for p, a in pairs])
    return share_prompts(packed, [len(p) for p, _ in pairs])


FIVE = [(PROMPT, [1]), (PROMPT, [2, 3]), (PROMPT, [4]), (OTHER, [1, 1]), (OTHER, [9])]


def test_neighbours_that_begin_with_the_same_prompt_share_it() -> None:
    batch = batch_of(*FIVE)
    assert batch.shared_lengths == (0, 3, 3, 0, 3)
    assert batch.own_lengths == (4, 2, 1, 5, 1)
    assert batch.lengths == (4, 5, 4, 5, 4)


@pytest.mark.parametrize(
    "pairs",
    [
        [(PROMPT, [1]), (OTHER, [1]), (PROMPT, [2])],
        [(PROMPT, []), (PROMPT, [1])],
        [(PROMPT, [1]), (PROMPT, [])],
        [(PROMPT, [1]), ([*PROMPT, 1], [1])],
    ],
    ids=["not neighbours", "no answer first", "no answer second", "one prompt begins with the other"],
)
def test_other_sequences_share_nothing(pairs: list[tuple[list[int], list[int]]]) -> None:
    assert batch_of(*pairs).shared_lengths == ()


@pytest.mark.parametrize(
    ("index", "shared"),
    [([1, 2], (0, 3)), ([2, 0], (0, 3)), ([0, 3, 1], ()), ([4, 1, 0, 3], (0, 0, 3, 0)), ([2], ()), ([], ())],
)
def test_chosen_sequences_share_what_their_neighbours_still_have(
    index: list[int], shared: tuple[int, ...]
) -> None:
    assert batch_of(*FIVE).sequences(index).shared_lengths == shared


@pytest.mark.parametrize(
    ("max_tokens", "units"),
    [
        (7, [[0, 1, 2], [3, 4]]),
        (6, [[0, 1], [2], [3, 4]]),
        (5, [[0], [1], [2], [3], [4]]),
        (1, [[0], [1], [2], [3], [4]]),
    ],
)
def test_a_group_is_cut_only_where_it_exceeds_the_budget(max_tokens: int, units: list[list[int]]) -> None:
    batch = batch_of(*FIVE)
    assert [run.units for run in batch.runs(max_tokens)] == units
    parts = batch.micro_batches(max_tokens)
    assert sorted(length for part in parts for length in part.lengths) == sorted(batch.lengths)
    assert all(sum(part.own_lengths) <= max(max_tokens, max(part.lengths)) for part in parts)
    assert sum(part.num_targets for part in parts) == batch.num_targets


def test_processes_share_groups_and_drop_no_answer() -> None:
    batch = batch_of(*FIVE)
    found = [shared_micro_batches(batch, 7, World(rank, 2)) for rank in (0, 1)]
    parts = [part for share in found for part, counts in share if counts]
    assert sorted(part.shared_lengths for part in parts) == [(0, 3), (0, 3, 3)]


@pytest.mark.parametrize("max_tokens", [100, 7, 6, 1])
def test_columns_come_back_in_the_order_of_the_batch(max_tokens: int) -> None:
    batch = batch_of(*FIVE)
    (column,) = over_tokens(batch, lambda part: (part.token_ids_T,), max_tokens)
    assert torch.equal(column, batch.token_ids_T)


@pytest.mark.parametrize(
    "shared", [(3, 3, 3, 0, 3), (0, 3, 2, 0, 3), (0, 4, 4, 0, 3), (0, 3), (0, -1, 0, 0, 0)]
)
def test_impossible_groups_are_refused(shared: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="share"):
        replace(batch_of(*FIVE), shared_lengths=shared)


def test_a_rollout_shares_the_prompts_of_neighbouring_answers() -> None:
    answers = [
        Answer(
            messages=(),
            text="",
            prompt_ids=tuple(prompt),
            answer_ids=tuple(answer),
            logprobs=(0.0,) * len(answer),
            finished=True,
        )
        for prompt, answer in FIVE
    ]
    assert pack_rollout(answers).shared_lengths == (0, 3, 3, 0, 3)


def epochs_of(
    experience: Any, *, epochs: int, count: int, seed: int, size: int
) -> list[list[list[tuple[int, ...]]]]:
    """The sequences of each minibatch of each epoch."""
    parts = list(minibatches(experience, epochs=epochs, count=count, seed=seed, answers_per_prompt=size))
    rows = [[tuple(ids.tolist()) for ids in part.token_ids_T.split(part.lengths)] for part in parts]
    return [rows[start : start + count] for start in range(0, len(rows), count)]


@pytest.mark.parametrize(
    ("groups", "size", "count", "cut"),
    [(6, 3, 3, 0), (6, 3, 2, 0), (8, 2, 4, 0), (4, 3, 3, 2), (1, 6, 3, 2), (12, 1, 3, 0)],
)
def test_minibatches_hold_each_answer_once_and_whole_groups(
    groups: int, size: int, count: int, cut: int
) -> None:
    """cut: how many groups are divided, where minibatches of one size cannot hold whole ones."""
    answers = [(group, i) for group in range(groups) for i in range(size)]
    experience: Any = batch_of(*[([7, 1, group], [i]) for group, i in answers])
    epochs = epochs_of(experience, epochs=3, count=count, seed=0, size=size)
    assert len(epochs) == 3
    for parts in epochs:
        assert [len(part) for part in parts] == [groups * size // count] * count
        assert sorted(row for part in parts for row in part) == [(7, 1, group, i) for group, i in answers]
        assert sum(len({row[:3] for row in part}) for part in parts) == groups + cut
    for part in minibatches(experience, epochs=1, count=count, seed=0, answers_per_prompt=size):
        prompts = [tuple(ids.tolist()[:3]) for ids in part.token_ids_T.split(part.lengths)]
        assert (part.shared_lengths or (0,) * len(prompts)).count(0) == len(set(prompts))


def test_no_two_epochs_of_a_run_have_the_same_order() -> None:
    experience: Any = batch_of(*[(prompt, [i]) for prompt in ([1], [2], [3]) for i in range(14)])
    orders = [
        str(parts)
        for rollout in range(5)
        for parts in epochs_of(experience, epochs=4, count=2, seed=step_seed(3, rollout), size=14)
    ]
    assert len(set(orders)) == len(orders) == 20
