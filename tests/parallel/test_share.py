import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.batches import pack, pack_ranked
from dovetail.parallel.world import World, balanced_shares, parts_of, shared_micro_batches

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=30)
RANKS = st.integers(1, 8)


@given(SIZES, RANKS)
def test_every_unit_is_dealt_to_one_rank(sizes: list[int], ranks: int) -> None:
    shares = balanced_shares(sizes, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))


@given(SIZES, RANKS)
def test_no_share_is_larger_than_grahams_bound(sizes: list[int], ranks: int) -> None:
    largest = max(sum(sizes[i] for i in share) for share in balanced_shares(sizes, ranks))
    ordered = sorted(sizes, reverse=True)
    pair = ordered[ranks - 1] + ordered[ranks] if len(sizes) > ranks else 0  # two units must share a rank
    best_possible = max(ordered[0], sum(sizes) / ranks, pair)
    assert largest <= best_possible * (4 / 3)


@given(SIZES, RANKS, st.integers(1, 60))
def test_all_ranks_run_as_many_parts_and_each_unit_counts_once(
    sizes: list[int], ranks: int, max_tokens: int
) -> None:
    found = [parts_of(sizes, max_tokens, World(rank, ranks)) for rank in range(ranks)]
    assert len({len(parts) for parts in found}) == 1
    counted = [i for parts in found for part in parts if part.counts for i in part.index]
    assert sorted(counted) == list(range(len(sizes)))
    for parts in found:
        for part in parts:
            assert sum(sizes[i] for i in part.index) <= max_tokens or len(part.index) == 1


def test_nothing_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="without sequences"):
        parts_of([], 10, World(0, 2))


def test_sequences_without_targets_are_not_dealt() -> None:
    batch = pack([[1, 2, 3], [4, 5], [6, 7]], [[True] * 3, [False] * 2, [True] * 2])
    found = [shared_micro_batches(batch, 100, World(rank, 2)) for rank in (0, 1)]
    assert [[(part.token_ids_T.tolist(), counts) for part, counts in parts] for parts in found] == [
        [([1, 2, 3], True)],
        [([6, 7], True)],
    ]


def test_a_rank_without_work_repeats_the_shortest_unit_that_has_targets() -> None:
    batch = pack([[1, 2, 3], [4, 5]], [[True] * 3, [False] * 2])
    ((part, counts),) = shared_micro_batches(batch, 100, World(1, 2))
    assert part.token_ids_T.tolist() == [1, 2, 3]
    assert not counts


def test_ranked_answers_stay_together() -> None:
    batch = pack_ranked([[[1, 2], [3, 4, 5]], [[6, 7], [8, 9]]], [[(0, 1, 0.0)], [(1, 0, 0.0)]])
    found = [shared_micro_batches(batch, 100, World(rank, 2))[0][0] for rank in (0, 1)]
    assert [part.token_ids_T.tolist() for part in found] == [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert [(part.chosen_P.tolist(), part.rejected_P.tolist()) for part in found] == [([0], [1]), ([1], [0])]
