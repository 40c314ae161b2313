"""Runs of methods without a critic: none is saved, a stopped run ends with the same bytes, wrong names are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors import safe_open

from dovetail.config.run import RunConfig
from dovetail.errors import TrainingStopped
from dovetail.stages import pipeline
from tests.parallel.worker import run_to
from tests.stages.runs import tiny_run

OWN = """
from dovetail.config.policy import METHODS
from dovetail.rlhf.algorithms.group import GroupMethod


class Mine(GroupMethod):
    def __init__(self, policy):
        parts = METHODS["grpo"] | {"answers_per_prompt": 2}
        super().__init__(**parts)
"""


def run_of(folder: Path, algorithm: str, *, name: str = "run", lora: bool = False, **ppo: Any) -> RunConfig:
    policy = {} if ".py:" in algorithm else {"answers_per_prompt": 2}
    settings = {"save_every": 1, "cut_off_answers": "keep_score", **ppo}
    return tiny_run(
        folder,
        algorithm=algorithm,
        policy=policy,
        output_dir=str(folder / name),
        ppo=settings,
        actor={"lora": {"rank": 4, "alpha": 8.0} if lora else None},
    )


COARSE = "def score(answers):\n    return [float(sum(a.answer_ids) % 4 == 0) for a in answers]\n"
"""A reward that is often the same for two answers."""


def refilling_run(folder: Path, *, name: str = "run", **ppo: Any) -> RunConfig:
    """A run that asks further prompts, of some rollouts more than of others, and some prompts less often."""
    (folder / "coarse.py").write_text(COARSE)
    settings = {
        "batch_size": 6, "reward_function": f"{folder}/coarse.py:score", "curriculum_score": 1.0, **ppo
    }  # fmt: skip
    return run_of(folder, "dapo", name=name, **settings)


def model_of(config: RunConfig) -> bytes:
    return (Path(config.output_dir) / "ppo/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dapo", "best_of_n", "online_dpo"])
def test_a_stopped_run_ends_with_the_same_bytes(algorithm: str, lora: bool, tmp_path: Path) -> None:
    undisturbed = run_of(tmp_path, algorithm, lora=lora)
    stopped = run_of(tmp_path, algorithm, lora=lora, name="stopped")
    pipeline.run(undisturbed)
    run_to(("ppo", 1), stopped)
    pipeline.run(stopped)
    assert model_of(stopped) == model_of(undisturbed)


def test_a_run_that_asks_further_prompts_resumes_with_the_next(tmp_path: Path) -> None:
    undisturbed, stopped = refilling_run(tmp_path), refilling_run(tmp_path, name="stopped")
    pipeline.run(undisturbed)
    run_to(("ppo", 2), stopped)
    pipeline.run(stopped)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    asked = [row["ppo/prompts_asked"] for row in rows if "ppo/prompts_asked" in row]
    assert len(set(asked[:2])) == 2, "no round of the first two rollouts was refilled, or all alike"
    assert model_of(stopped) == model_of(undisturbed)


def test_no_number_and_no_weight_of_a_critic_is_left(tmp_path: Path) -> None:
    config = run_of(tmp_path, "grpo")
    pipeline.run(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert "ppo/equal_groups_fraction" in names
    assert not {name for name in names if "critic" in name or "value" in name or "explained" in name}
    checkpoints = list((tmp_path / "run/ppo").rglob("*.safetensors"))
    assert checkpoints
    for file in checkpoints:
        with safe_open(file, "pt") as held:
            assert not [name for name in held.keys() if "critic" in name]  # noqa: SIM118 -- it is no mapping


def test_a_method_of_the_users_own_equals_what_it_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = run_of(tmp_path, f"{tmp_path}/mine.py:Mine", name="own")
    built_in = run_of(tmp_path, "grpo")
    pipeline.run(own)
    pipeline.run(built_in)
    assert model_of(own) == model_of(built_in)


def test_a_run_whose_answers_never_reach_the_reward_says_so(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def none(answers):\n    return [0.0 for _ in answers]\n")
    config = run_of(tmp_path, "expert_iteration", reward_function=f"{tmp_path}/none.py:none")
    with pytest.raises(TrainingStopped, match=r"none reached policy\.min_reward"):
        pipeline.run(config)


def test_the_settings_of_a_group_belong_to_a_method_without_a_critic(tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"policy\.answers_per_prompt is set, but algorithm = ppo .* one of grpo"
    ):
        run_of(tmp_path, "ppo")
    with pytest.raises(ValidationError, match=r"policy\.clip is set, but algorithm = best_of_n .* of grpo"):
        tiny_run(tmp_path, algorithm="best_of_n", policy={"clip": [0.1, 0.1]})
    with pytest.raises(ValidationError, match="not an algorithm; write one of ppo, dpo, grpo"):
        run_of(tmp_path, "grop")
