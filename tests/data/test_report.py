from __future__ import annotations

from dovetail.data.report import DataReport, SourceCounts

COUNTS = SourceCounts(
    source="a.jsonl", read=1200, bad=3, rows=500, unusable=5, first_bad=("a.jsonl line 7: why",)
)
REPORT = DataReport(
    stage="reward", part="train", sources=(COUNTS, SourceCounts(source="b.csv", read=10, rows=10))
)


def test_every_count_that_is_not_zero_is_said() -> None:
    lines = REPORT.with_lengths({0: 12}, {1: 4}).lines()
    assert lines == [
        "reward/train  a.jsonl: 1,200 rows read, 3 bad (skipped), 500 for this stage, 5 without anything to learn "
        "(left out), 12 too long (left out)",
        "    skipped: a.jsonl line 7: why",
        "reward/train  b.csv: 10 rows read, 10 for this stage, 4 with the prompt cut from the left",
    ]


def test_rows_used_are_those_not_left_out() -> None:
    assert REPORT.used == 505
    assert REPORT.with_lengths({0: 12}, {1: 4}).used == 493
