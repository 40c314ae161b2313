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


def test_a_minibatch_holds_each_prompt_once() -> None:
    experience: Any = batch_of(*[(prompt, [i]) for prompt in (PROMPT, OTHER) for i in range(6)])
    parts = list(minibatches(experience, epochs=2, count=3, seed=0))
    assert len(parts) == 6
    assert all(part.num_sequences == 4 for part in parts)
    assert all(part.shared_lengths.count(0) <= 2 for part in parts)
