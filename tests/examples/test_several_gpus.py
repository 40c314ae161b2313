"""The example gives in two processes what it gives in one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.runs import save_tiny_model

ROOT = Path(__file__).parents[2]


def scores(actor: Path, processes: int) -> list[float]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "examples/several_gpus.py", str(actor), "--steps", "2"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count(f"{processes} processes") == 2
    return [float(score) for score in re.findall(r"mean score (\S+),", done.stdout)]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    actor = save_tiny_model(tmp_path / "model")
    alone, together = scores(actor, 1), scores(actor, 2)
    # Scores are means of lengths / 32 over 32 answers, which no rounding moves while the draws are the same.
    assert alone == together
    assert len(set(alone)) == 2
