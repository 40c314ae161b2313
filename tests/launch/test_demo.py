"""The demo in two processes: the command itself, at a size that only shows that all of it runs, and runs alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dovetail.config.recipes import FOLDER

STAND_IN = Path(__file__).parent / "small_demo"
SIZES = {
    "documents": 300,
    "demonstrations": 240,
    "reward_prompts": 16,
    "ppo_prompts": 16,
    "test_prompts": 16,
    "dev_prompts": 16,
    "held_out_documents": 8,
}
STEPS = {"base": 12, "sft": 12, "reward": 2, "ppo": 2}
TOLERANCE = 1e-4
"""Of a mean of some numbers after 28 steps in float32; one other answer among 16 moves a score by more."""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with the demo's recipe, of fewer rows and steps."""
    recipe = yaml.safe_load((FOLDER / "demo" / "tiny.yaml").read_text(encoding="utf-8"))
    recipe["sizes"] = SIZES
    for stage, steps in STEPS.items():
        recipe[stage] |= {"max_steps": steps}
    recipe["ppo"] |= {
        "batch_size": 8,
        "eval_every": 1,
        "sampling": {"temperature": 1.0, "max_new_tokens": 16},
    }
    folder = tmp_path / "recipes" / "demo"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder.parent


def demo(run: Path, recipes: Path, *flags: str) -> str:
    """What the command says; it leaves `run`."""
    path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "dovetail", "demo", "--output-dir", str(run), *flags],
        env={**os.environ, "PYTHONPATH": path, "RECIPES": str(recipes), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary(run: Path) -> dict[str, Any]:
    """The scores of a finished demo, without what it took."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    del found["seconds"]
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    both: dict[str, float] = {}
    for key, value in values.items():
        both |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return both


@pytest.mark.slow
def test_two_processes_end_with_the_scores_of_one(tmp_path: Path, recipes: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    demo(one, recipes)
    said = demo(two, recipes, "--num-gpus", "2")
    assert yaml.safe_load((two / "config.yaml").read_text())["zero_stage"]["actor"] == 3
    alone, together = flat(summary(one)), flat(summary(two))
    assert together.keys() == alone.keys()
    assert {name: value for name, value in together.items() if abs(value - alone[name]) > TOLERANCE} == {}
    assert "Gold score on 16 held-out prompts" in said
    assert "Human: What is my name?" in said
    assert (two / "logs" / "rank-1.log").exists()
