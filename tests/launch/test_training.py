"""A real run through the launcher: two processes, all three stages, one of them killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run
from tests.tolerance import assert_near_after_adam

pytestmark = [pytest.mark.slow, pytest.mark.system]  # looks for a process in Linux's /proc
MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/model_ema")
SECONDS = 400
LEARNING_RATE = 1e-3
"""Of tests/stages/runs.py."""


def launched(config: RunConfig, *flags: str) -> subprocess.Popen[str]:
    recipe = Path(config.output_dir).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "dovetail", "train", str(recipe), "--num-gpus", "2", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def one_of(launcher: int, rank: int) -> int:
    """Process id of a rank, by the environment that the launcher gave it."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def test_two_processes_one_of_them_killed_end_with_the_weights_of_one(tmp_path: Path) -> None:
    alone = tiny_run(tmp_path, output_dir=str(tmp_path / "alone"))
    pipeline.run(alone)
    both = alone.model_copy(update={"output_dir": str(tmp_path / "both"), "device": "cpu"})
    process = launched(both, "--actor-zero-stage", "3", "--max-restarts", "1")
    deadline = time.monotonic() + SECONDS
    first_model = Path(both.output_dir, "sft", "model")
    while not first_model.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(one_of(process.pid, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert "restart 1: a process was lost" in said
    for model in MODELS:
        found, wanted = (load_file(Path(c.output_dir, model, "model.safetensors")) for c in (both, alone))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_near_after_adam(found[name], tensor, learning_rate=LEARNING_RATE)
