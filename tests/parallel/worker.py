"""One process of a group: runs the configurations of a file, one after the other.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=... python -m tests.parallel.worker CASES.json

CASES.json: [{"config": a RunConfig, "port": where the processes meet, "stop": null}, ...]; `stop` may be [stage,
step]: the process ends there, right after the checkpoint.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dovetail.config.run import RunConfig
from dovetail.stages import pipeline
from dovetail.training.checkpoint import Checkpoints


class Stopped(Exception):
    """Raised in the place of an end from outside."""


def stop_at(stage: str, step: int) -> None:
    """From now on, `Checkpoints.begin_save` raises Stopped after it has written that step."""
    begin_save = Checkpoints.begin_save

    def save_and_stop(self: Checkpoints, at: int, state: Any, *, merit: float | None) -> None:
        begin_save(self, at, state, merit=merit)
        if self.folder.parent.name == stage and at == step:
            self.finish()
            raise Stopped

    Checkpoints.begin_save = save_and_stop  # type: ignore[method-assign]


def main(cases_file: str) -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    for case in json.loads(Path(cases_file).read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        if case["stop"]:
            stop_at(*case["stop"])
        try:
            pipeline.run(RunConfig.model_validate(case["config"]))
        except (Stopped, SystemExit):
            if not case["stop"]:
                raise
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
