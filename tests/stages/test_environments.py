"""Runs with an environment: by PPO and group methods, stopped and resumed, in two processes; wrong ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.config.run import RunConfig
from dovetail.errors import ConfigError, DovetailError
from dovetail.model.save import save_model
from dovetail.parallel.world import ALONE
from dovetail.stages import checks, pipeline
from tests.fakes import byte_tokenizer, tiny_model
from tests.parallel.group import run_all
from tests.parallel.test_training import at_stage, expect_same_numbers
from tests.parallel.worker import run_to
from tests.stages.runs import tiny_run

CODE = '''
import random
import time

from dovetail.rlhf.environments import Step


class Game:
    """Asks twice, after a moment, and pays for capital letters."""

    def reset(self, row, seed):
        self.turns = 0
        return f"Begin {seed % 10}"

    async def step(self, turn):
        import asyncio

        await asyncio.sleep(random.random() / 100)
        self.turns += 1
        return Step(f"More {self.turns}", sum(c.isupper() for c in turn.text) / 4, self.turns == 2)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


TOOLS = [add]
NUMBER = 7


def length(answers):
    return [len(answer.text) / 10 for answer in answers]
'''


def run_of(
    folder: Path, *, name: str = "run", algorithm: str = "ppo", source: str = "Game", **ppo: Any
) -> RunConfig:
    file = folder / "game.py"
    file.write_text(CODE)
    model = tiny_model()
    model.config.max_position_embeddings = 1024  # the description of a tool is long in bytes
    save_model(model, byte_tokenizer(), folder / "model-llama")
    policy = {} if algorithm == "ppo" else {"answers_per_prompt": 2}
    settings = {
        "save_every": 1,
        "cut_off_answers": "keep_score",
        "environment": {"source": f"{file}:{source}", "max_turns": 3, "time_limit": 20},
        "sampling": {"max_new_tokens": 60},
        **ppo,
    }
    return tiny_run(
        folder, algorithm=algorithm, policy=policy, reward_model=None, stages=["sft", "ppo"],
        output_dir=str(folder / name), ppo=settings,
    )  # fmt: skip


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "environment/turns_mean" in row]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(algorithm: str, tmp_path: Path) -> None:
    undisturbed = run_of(tmp_path, algorithm=algorithm)
    stopped = run_of(tmp_path, algorithm=algorithm, name="stopped")
    pipeline.run(undisturbed)
    run_to(("ppo", 1), stopped)
    pipeline.run(stopped)
    expect_same_numbers(tmp_path / "stopped", tmp_path / "run", ["ppo/model"])
    rows = rows_of(undisturbed)
    assert len(rows) == 3
    assert all(row["environment/failures"] == 0 for row in rows)
    assert any(row["environment/turns_mean"] > 1 for row in rows)
    assert all("reward/environment_mean" in row for row in rows)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = run_of(tmp_path, name="alone", algorithm="grpo")
    together = at_stage(run_of(tmp_path, name="together", algorithm="grpo"), 0)
    pipeline.run(alone)
    run_all([(together, None)], size=2)
    expect_same_numbers(tmp_path / "together", tmp_path / "alone", ["ppo/model"])


def test_tools_are_scored_by_functions(tmp_path: Path) -> None:
    config = run_of(tmp_path, source="TOOLS", reward_function=f"{tmp_path}/game.py:length", max_steps=1)
    pipeline.run(config)
    (row,) = rows_of(config)
    assert row["reward/length_mean"] > 0
    assert row["reward/environment_mean"] == 0


def test_tools_without_a_score_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DovetailError, match="neither a reward model nor a reward function"):
        pipeline.run(run_of(tmp_path, source="TOOLS"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "has no environment nothing"),
        ("NUMBER", "is neither a class nor a list of functions"),
    ],
)
def test_an_environment_that_cannot_be_loaded_is_refused_before_anything_is_trained(
    source: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        checks.refuse(run_of(tmp_path, source=source), ALONE)


def test_a_file_that_cannot_be_run_is_named_with_its_line(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    (tmp_path / "game.py").write_text("\n\nimport no_such_module\n")
    with pytest.raises(ConfigError, match=r"No module named 'no_such_module' \(.*game\.py line 3\)"):
        checks.refuse(config, ALONE)
