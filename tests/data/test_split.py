from __future__ import annotations

from collections import Counter

from dovetail.data.split import is_held_out, stage_of, unit_interval

KEYS = [f"{i:032x}" for i in range(20_000)]
ALL = ("sft", "reward", "ppo")


def test_shares_are_met() -> None:
    counts = Counter(stage_of(key, (2, 4, 4), ALL) for key in KEYS)
    for stage, share in zip(ALL, (0.2, 0.4, 0.4), strict=True):
        sigma = (share * (1 - share) * len(KEYS)) ** 0.5
        assert abs(counts[stage] - share * len(KEYS)) < 4 * sigma


def test_a_stage_without_share_gets_nothing() -> None:
    assert set(map(lambda key: stage_of(key, (0, 1, 0), ALL), KEYS[:500])) == {"reward"}


def test_a_stage_that_the_source_cannot_serve_leaves_its_share_to_the_others() -> None:
    counts = Counter(stage_of(key, (2, 4, 4), ("sft", "ppo")) for key in KEYS)
    assert set(counts) == {"sft", "ppo"}
    assert abs(counts["sft"] / len(KEYS) - 1 / 3) < 0.02


def test_rows_of_one_key_meet_in_the_same_stage_whatever_else_they_can_serve() -> None:
    for key in KEYS[:2000]:
        comparison, demonstration = stage_of(key, (2, 4, 4), ALL), stage_of(key, (2, 4, 4), ("sft", "ppo"))
        assert demonstration == comparison or comparison == "reward"


def test_a_larger_share_takes_from_the_others_and_gives_them_nothing() -> None:
    moved = [(stage_of(key, (2, 4, 4), ALL), stage_of(key, (2, 4, 8), ALL)) for key in KEYS[:2000]]
    assert {after for before, after in moved if before != after} == {"ppo"}


def test_rows_that_no_stage_wants_have_no_stage() -> None:
    assert stage_of(KEYS[0], (1, 1, 0), ("ppo",)) is None


def test_held_out_rows_are_spread_over_the_stages() -> None:
    held_out = [key for key in KEYS if is_held_out(key, 0.1)]
    assert abs(len(held_out) - 2_000) < 4 * (0.1 * 0.9 * 20_000) ** 0.5
    counts = Counter(stage_of(key, (2, 4, 4), ALL) for key in held_out)
    assert abs(counts["sft"] / len(held_out) - 0.2) < 0.04


def test_more_held_out_rows_keep_those_that_were() -> None:
    few = {key for key in KEYS if is_held_out(key, 0.02)}
    assert few < {key for key in KEYS if is_held_out(key, 0.05)}


def test_nothing_is_held_out_at_zero() -> None:
    assert not any(is_held_out(key, 0.0) for key in KEYS)


def test_the_split_stays_the_same_over_versions() -> None:
    assert [stage_of(key, (2, 4, 4), ALL) for key in KEYS[3:9]] == [
        "ppo", "reward", "ppo", "ppo", "ppo", "sft"
    ]  # fmt: skip
    assert all(0 <= unit_interval(key, "p") < 1 for key in KEYS[:1000])
