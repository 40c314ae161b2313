"""Start the run of a configuration again and again, each time killed at the next place.

python -m tests.stages.killed CONFIG.json PLACES.json: one process imports torch, a fork of it dies at each place.
A place is [stage, what]: `step` = after the second optimiser step, before its checkpoint; `checkpoint` = in the
middle of writing one; `model` = as the finished model is about to be written.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dovetail.config.run import RunConfig
from dovetail.runs import checkpoint
from dovetail.stages import pipeline, ppo, reward, sft
from dovetail.telemetry.metrics import Metrics

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


def die(*_: Any, **__: Any) -> None:
    """As by `kill -9`, or by the system when memory runs out: nothing is flushed, nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str, what: str) -> None:
    """Let this process die at the place."""
    if what == "model":
        STAGES[stage].save_model = die
    elif what == "step":
        record = Metrics.record

        def record_or_die(metrics: Metrics, step: int, values: Any) -> None:
            record(metrics, step, values)
            if step == 2 and any(name.startswith(f"{stage}/") for name in values):
                die()

        Metrics.record = record_or_die
    else:
        write = checkpoint.Checkpoints._write

        def write_or_die(self: checkpoint.Checkpoints, folder: Path, facts: Any, *rest: Any) -> None:
            if self.folder.parent.name == stage and facts["step"] == 3:
                checkpoint.write_tensors = die
            write(self, folder, facts, *rest)

        checkpoint.Checkpoints._write = write_or_die


def main(config_file: str, places_file: str) -> int:
    """0 if each fork died where it was to die, and by nothing else."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(Path(config_file).read_text())
    for stage, what in json.loads(Path(places_file).read_text()):
        child = os.fork()
        if child == 0:
            arm(stage, what)
            pipeline.run(config)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.stderr.write(f"{stage} {what}: ended with status {status}, was to be killed\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
