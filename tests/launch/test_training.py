"""Real runs through the launcher: two processes, all three stages, stopped or one of them killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from tests.stages.runs import tiny_run
from tests.tolerance import assert_near_after_adam

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/model_ema")
SECONDS = 400
LEARNING_RATE = 1e-3
"""Of tests/stages/runs.py."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of one process that nothing disturbed."""
    config = tiny_run(tmp_path_factory.mktemp("training"))
    pipeline.run(config)
    return config


@pytest.fixture
def both(alone: RunConfig, tmp_path: Path) -> RunConfig:
    """The same run, for two processes."""
    return alone.model_copy(update={"output_dir": str(tmp_path / "both")})


@contextmanager
def launched(config: RunConfig, *flags: str) -> Iterator[subprocess.Popen[str]]:
    recipe = Path(config.output_dir).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    flags = ("--num-gpus", "2", "--actor-zero-stage", "3", *flags)
    process = subprocess.Popen(
        [sys.executable, "-m", "dovetail", "train", str(recipe), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def expect_end(process: subprocess.Popen[str], config: RunConfig, code: int) -> str:
    """What was said until the end; all that the processes wrote is shown where it is another than expected."""
    said, _ = process.communicate(timeout=SECONDS)
    logs = sorted(Path(config.output_dir, "logs").glob("*.log"))
    assert process.returncode == code, "\n".join([said, *(f"{log}:\n{log.read_text()}" for log in logs)])
    return said


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def one_of(launcher: int, rank: int) -> int:
    """Process id of a rank, by the environment that the launcher gave it."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def expect_same_weights(config: RunConfig, reference: RunConfig) -> None:
    for model in MODELS:
        found, wanted = (
            load_file(Path(c.output_dir, model, "model.safetensors")) for c in (config, reference)
        )
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_near_after_adam(found[name], tensor, learning_rate=LEARNING_RATE)


@pytest.mark.system
def test_two_processes_one_of_them_killed_end_with_the_weights_of_one(
    alone: RunConfig, both: RunConfig
) -> None:
    with launched(both, "--max-restarts", "1") as process:
        wait_for(Path(both.output_dir, "sft", "model"), process)
        os.kill(one_of(process.pid, 1), signal.SIGKILL)
        said = expect_end(process, both, 0)
    assert "restart 1: a process was lost" in said
    expect_same_weights(both, alone)


def test_two_processes_that_were_told_to_stop_end_with_the_weights_of_one(
    alone: RunConfig, both: RunConfig
) -> None:
    with launched(both, "--max-restarts", "1") as process:
        wait_for(Path(both.output_dir, "sft", "model"), process)
        process.send_signal(signal.SIGTERM)
        said = expect_end(process, both, 75)
    assert said.count("ended by SIGTERM") == 1
    assert "restart" not in said
    with launched(both) as process:
        expect_end(process, both, 0)
    expect_same_weights(both, alone)
