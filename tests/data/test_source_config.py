from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dovetail.config.data import DataConfig, SourceConfig


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"response": "a"}, "response needs prompt"),
        ({"chosen": "a"}, "chosen and rejected need each other"),
        ({"rejected": "a"}, "chosen and rejected need each other"),
        ({"answers": "a", "scores": "s"}, "answers needs prompt"),
        (
            {"prompt": "p", "answers": "a"},
            "answers go with one of preference, scores and ranks; here with none",
        ),
        ({"prompt": "p", "answers": "a", "scores": "s", "ranks": "r"}, "here with scores and ranks"),
        ({"prompt": "p", "scores": "s"}, "answers go with one of preference, scores and ranks"),
        ({"messages": "m", "text": "t"}, "messages and text are different forms of rows"),
        ({"prompt": "p", "margin": "m"}, "margin belongs to chosen and rejected"),
        ({"remove": "["}, "is not a regular expression"),
        ({"encoding": "klingon"}, "encoding = 'klingon' is not known"),
    ],
)
def test_columns_that_make_no_form_are_refused(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        SourceConfig(path="t", **columns)


def test_short_strings_are_sources() -> None:
    blend = DataConfig.model_validate({"blend": ["rm-static", "rows.jsonl:0.5", "C:\\rows.csv"]}).blend
    assert [(source.path, source.weight) for source in blend] == [
        ("rm-static", None), ("rows.jsonl", 0.5), ("C:\\rows.csv", None)
    ]  # fmt: skip


def test_a_split_without_any_share_is_refused() -> None:
    with pytest.raises(ValidationError, match="stage_split has no positive share"):
        DataConfig(stage_split=(0, 0, 0))
