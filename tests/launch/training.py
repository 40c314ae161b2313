"""Real runs of the real stages through the launcher, and what they must end with."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors.torch import load_file

from dovetail.config.run import RunConfig
from tests.tolerance import assert_near

MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/model_ema")
SECONDS = 400


@contextmanager
def launched(config: RunConfig, *flags: str, within: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A started `dovetail train` of two processes or machines that share the weights; killed at the end.

    within: a command that runs another one, such as nsenter.
    """
    recipe = Path(config.output_dir).with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "dovetail", "train", str(recipe), "--actor-zero-stage", "3", *flags],
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
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still there after {SECONDS} s\n{everything(config)}") from error
    assert process.returncode == code, f"{said}\n{everything(config)}"
    return said


def everything(config: RunConfig) -> str:
    """All logs of a run."""
    logs = sorted(Path(config.output_dir, "logs").glob("*.log"))
    return "\n".join(f"{log}:\n{log.read_text()}" for log in logs)


def wait_for(path: Path, process: subprocess.Popen[str], pattern: str | None = None) -> None:
    """Until the path is there, or with a pattern something in it that fits."""
    deadline = time.monotonic() + SECONDS
    while not (any(path.glob(pattern)) if pattern else path.exists()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def expect_same_weights(config: RunConfig, reference: RunConfig) -> None:
    """All models of both runs."""
    for model in MODELS:
        found, wanted = (
            load_file(Path(c.output_dir, model, "model.safetensors")) for c in (config, reference)
        )
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_near(found[name], tensor)
