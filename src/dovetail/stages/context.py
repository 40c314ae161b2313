"""What every stage of a run shares: the folder, the device, and where metrics go.

Responsible for: opening a run once and handing its parts to the stages.
Not responsible for: what a stage does with them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dovetail.config.run import RunConfig
from dovetail.config.stages import StageConfig
from dovetail.telemetry.log import say
from dovetail.telemetry.metrics import Metrics
from dovetail.telemetry.progress import Progress
from dovetail.telemetry.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink
from dovetail.training.checkpoint import Checkpoints
from dovetail.training.placement import resolve_device, resolve_dtype
from dovetail.training.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a finished stage says of itself; goes to summary.json under the stage's name."""

    steps: int
    results: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Context:
    """One open run."""

    config: RunConfig
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype

    def checkpoints(self, stage: str, settings: StageConfig) -> Checkpoints:
        """The stage's checkpoints, newest kept as its settings say."""
        return Checkpoints(self.folder.checkpoints(stage), keep=settings.keep_checkpoints)

    @contextmanager
    def metrics(self, stage: str, *, start: int) -> Iterator[Metrics]:
        """Sinks of this stage; rows of steps that a killed run wrote after its last checkpoint are dropped."""
        tracking = self.config.tracking
        sinks: list[Sink] = [JsonlSink(self.folder.metrics, prefix=f"{stage}/", start=start)]
        if tracking.tensorboard:
            sinks.append(TensorBoardSink(self.folder.tensorboard / stage, start=start))
        if tracking.wandb_project:
            sinks.append(WandbSink(tracking.wandb_project, name=f"{self.folder.path.name}/{stage}"))
        metrics = Metrics(sinks)
        try:
            yield metrics
        finally:
            metrics.close()

    def progress(self, stage: str, *, total: int, start: int) -> Progress:
        """A bar with rate and remaining time, or a line now and then when nobody watches."""
        return Progress(stage, total=total, start=start, print_every=self.config.tracking.print_every)


@contextmanager
def open_run(config: RunConfig) -> Iterator[Context]:
    """Create or reopen the run's folder, refusing another run's; locked against a second process."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    with RunFolder.open(config.output_dir, config.model_dump(mode="json")) as folder:
        say(f"run {folder.path}: {device}, {str(dtype).removeprefix('torch.')}")
        yield Context(config, folder, device, dtype)


def resume(checkpoints: Checkpoints, load: Any, stage: str) -> int:
    """Load the newest sound checkpoint, if there is one; returns the step to go on with."""
    found = checkpoints.latest()
    if found is None:
        return 0
    step, state = found
    load(state)
    say(f"{stage}: resumed after step {step}")
    return int(step)
