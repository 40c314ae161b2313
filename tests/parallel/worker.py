"""One process of a group: runs the configurations of a file, one after the other.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=... python -m tests.parallel.worker CASES.json

CASES.json: [{"config": a RunConfig, "port": where the processes meet, "stop": null}, ...]; `stop` may be [stage,
step]: the run ends there, right after the checkpoint.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dovetail.config.run import RunConfig
from dovetail.errors import RunInterrupted
from dovetail.runs.checkpoint import Checkpoints
from dovetail.stages import pipeline

Stop = tuple[str, int] | None


def run_to(stop: Stop, config: RunConfig) -> None:
    """Run it to its end, or until it has written the checkpoint of that stage and step."""
    if stop is None:
        pipeline.run(config)
        return
    try:
        with _interrupted_at(*stop):
            pipeline.run(config)
    except RunInterrupted:
        return
    except SystemExit as end:  # of processes other than the first
        if end.code != RunInterrupted.exit_code:
            raise
        return
    raise AssertionError(f"the run never came to {stop}")


@contextmanager
def _interrupted_at(stage: str, step: int) -> Iterator[None]:
    """Within the block that step ends a run as a signal would: saved, in all processes alike."""
    begin_save = Checkpoints.begin_save

    def save_and_stop(self: Checkpoints, at: int, state: Any, *, metric: float | None) -> None:
        begin_save(self, at, state, metric=metric)
        if self.folder.parent.name == stage and at == step:
            self.finish()
            raise RunInterrupted("as asked for")

    with patch.object(Checkpoints, "begin_save", save_and_stop):
        yield


def main(cases_file: str) -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    for case in json.loads(Path(cases_file).read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        run_to(case["stop"] and tuple(case["stop"]), RunConfig.model_validate(case["config"]))


if __name__ == "__main__":
    main(sys.argv[1])
