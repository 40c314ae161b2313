import pytest

from dovetail.cli.flag_lists import repeat_flags


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--step 1 2 3", "--step 1 --step 2 --step 3"),
        ("--step 1 2 opt-1.3b a.b=c", "--step 1 --step 2 opt-1.3b a.b=c"),
        ("--step sft ppo --seed 2", "--step sft --step ppo --seed 2"),
        ("--data a.jsonl b:2 --seed 1", "--data a.jsonl --data b:2 --seed 1"),
        ("--data a.jsonl sft.epochs=2", "--data a.jsonl sft.epochs=2"),
        ("--data a --step 1 2", "--data a --step 1 --step 2"),
        ("opt-1.3b sft.epochs=2 --dry-run", "opt-1.3b sft.epochs=2 --dry-run"),
        ("--step --seed 1", "--step --seed 1"),
        ("--step", "--step"),
        ("--step 7", "--step 7"),
        ("", ""),
    ],
)
def test_a_flag_is_repeated_for_each_of_its_values(typed: str, read: str) -> None:
    assert repeat_flags(typed.split()) == read.split()


def test_a_source_in_braces_is_one_value() -> None:
    source = "{path: x.csv, chosen: a}"
    assert repeat_flags(["--data", "a", source]) == ["--data", "a", "--data", source]
