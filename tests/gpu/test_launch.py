"""The launcher over NCCL: one of two processes is killed on the way, and all go on from the checkpoint."""

import os
import signal
from pathlib import Path

import pytest
import torch

from dovetail.config.run import RunConfig
from tests.launch.test_training import one_of
from tests.launch.training import expect_end, expect_same_weights, launched, wait_for
from tests.stages.runs import tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")]
TWO = ("--num-gpus", "2")


def run_on_gpus(folder: Path, name: str) -> RunConfig:
    return tiny_run(folder, device="cuda", output_dir=str(folder / name))


def test_two_processes_one_of_them_killed_end_with_the_weights_of_two_that_were_not(tmp_path: Path) -> None:
    calm, disturbed = (run_on_gpus(tmp_path, name) for name in ("calm", "disturbed"))
    with launched(calm, *TWO) as process:
        expect_end(process, calm, 0)
    with launched(disturbed, *TWO, "--max-restarts", "1") as process:
        wait_for(Path(disturbed.output_dir, "ppo", "checkpoints"), process, "step-*")
        os.kill(one_of(process.pid, 1), signal.SIGKILL)
        said = expect_end(process, disturbed, 0)
    assert "restart 1: a process was lost" in said
    expect_same_weights(disturbed, calm)
