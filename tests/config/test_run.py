from __future__ import annotations

from typing import Any

import pytest

from dovetail.config.run import RunConfig


@pytest.mark.parametrize(
    ("stages", "asked_for", "shares"),
    [
        (("sft", "reward", "ppo"), None, (2, 4, 4)),
        (("reward", "ppo"), None, (2, 4, 4)),
        (("sft",), None, (1, 0, 0)),
        (("reward",), None, (0, 1, 0)),
        (("ppo",), None, (0, 0, 1)),
        (("sft",), (2, 4, 4), (2, 4, 4)),
        (("sft",), (1, 1, 0), (1, 1, 0)),
    ],
)
def test_a_stage_that_runs_alone_takes_all_rows_unless_a_split_is_asked_for(
    stages: Any, asked_for: Any, shares: tuple[float, ...]
) -> None:
    config = RunConfig.model_validate(
        {"actor": {"path": "x"}, "output_dir": "y", "stages": stages, "data": {"stage_split": asked_for}}
    )
    assert config.data_of_stages().shares == shares
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again.data_of_stages().shares == shares
