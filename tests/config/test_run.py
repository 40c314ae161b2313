from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dovetail.config.run import RunConfig
from dovetail.config.stages import DpoConfig


def run_config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"actor": {"path": "x"}, "output_dir": "y", **settings})


@pytest.mark.parametrize(
    ("settings", "stages", "shares"),
    [
        ({}, ("sft", "dpo"), (2, 4, 0)),
        ({"stages": ("dpo",)}, ("dpo",), (0, 1, 0)),
        ({"stages": ("sft",)}, ("sft",), (1, 0, 0)),
        ({"data": {"stage_split": (1, 2, 3)}}, ("sft", "dpo"), (1, 2, 0)),
        ({"data": {"stage_split": (1, 2, 3)}, "stages": ("dpo",)}, ("dpo",), (1, 2, 0)),
    ],
)
def test_dpo_has_stages_of_its_own_and_reads_the_rows_of_the_reward_model(
    settings: Any, stages: Any, shares: tuple[float, ...]
) -> None:
    config = run_config(algorithm="dpo", **settings)
    assert config.stages == stages
    assert config.data_of_stages().shares == shares
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("algorithm", ["sarsa", ["dpo"], None])
def test_an_unknown_algorithm_is_refused_by_its_name(algorithm: Any) -> None:
    with pytest.raises(ValidationError, match="algorithm"):
        run_config(algorithm=algorithm)


def test_beta_follows_the_loss_unless_it_is_given() -> None:
    betas = {loss: DpoConfig(loss=loss).beta_in_force for loss in ("sigmoid", "ipo", "simpo", "kto", "orpo")}
    assert betas == {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1, "orpo": 0.1}
    assert DpoConfig(loss="simpo", beta=0.3).beta_in_force == 0.3


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
