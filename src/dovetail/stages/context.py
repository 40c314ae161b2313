"""The parts that all stages of a run share: the folder, the device, the sinks of metrics.

Responsible for: opening a run once, handing its parts to the stages, when their state is saved.
Not responsible for: what a stage does with them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch

from dovetail.config.run import RunConfig, StageName
from dovetail.config.stages import StageConfig
from dovetail.errors import ConfigError, RunInterrupted
from dovetail.model.placement import resolve_device, resolve_dtype
from dovetail.parallel.sharing import Sharing
from dovetail.parallel.world import ALONE, World, joined
from dovetail.runs.checkpoint import Checkpoints
from dovetail.runs.run_folder import RunFolder
from dovetail.runs.run_identity import begun_at
from dovetail.stages.report import LiveReport
from dovetail.stages.stopping import StopRequest, stop_request
from dovetail.telemetry.log import say, warnings_heard_by
from dovetail.telemetry.metrics import Metrics
from dovetail.telemetry.notebook import NotebookPlot, notebook_display
from dovetail.telemetry.progress import Progress
from dovetail.telemetry.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink
from dovetail.text.template import clock_stopped


@dataclass(frozen=True, slots=True)
class StageReport:
    """The result of a finished stage, which summary.json keeps under the stage's name."""

    steps: int
    results: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Context:
    """One open run."""

    config: RunConfig
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype
    world: World = ALONE
    """The processes of the run; the first alone writes into the folder."""
    background: World = ALONE
    """The same processes, for the thread that writes checkpoints."""
    stop: StopRequest = field(default_factory=lambda: StopRequest(ALONE))
    """The request to stop, if a signal made one."""
    report: LiveReport | None = None
    """The page of the run, which the first process writes."""

    @property
    def sharing(self) -> Sharing:
        """The distribution of the models over them."""
        return Sharing(
            world=self.world,
            zero_stage=self.config.zero_stage,
            offload=self.config.offload,
            tensor_parallel=self.config.tensor_parallel,
        )

    def is_done(self, stage: StageName) -> bool:
        """Return whether the stage has finished, as the first process sees it. A collective.

        The other processes' view of a shared folder may be a minute old.
        """
        return self.world.from_first(self.folder.is_done(stage))

    def checkpoints(self, stage: str, settings: StageConfig) -> Checkpoints:
        """Open the stage's checkpoints, of which the newest are kept as its settings say."""
        folder = self.folder.checkpoints(stage)
        return Checkpoints(folder, keep=settings.keep_checkpoints, world=self.background)

    def save_if_due(
        self,
        checkpoints: Checkpoints,
        state: Callable[[], Mapping[str, Any]],
        settings: StageConfig,
        *,
        done: int,
        total: int,
        metric: float | None,
    ) -> None:
        """After step `done` of `total`: save the state every few steps, in the background, and at the end of the stage.

        metric: the quality of the model, if it was evaluated after this very step; more is better.

        A signal that asked for an end is answered here: the state is saved, and RunInterrupted raised. A collective.
        Raises CheckpointError as soon as a save is known to have failed.
        """
        checkpoints.expect_no_failure()
        is_last = done == total
        name = None if is_last else self.stop.asked()
        if is_last or name or done % settings.save_every == 0:
            checkpoints.begin_save(done, state(), metric=metric)
        if is_last or name:
            checkpoints.finish()
        if name:
            stage = checkpoints.folder.parent.name
            raise RunInterrupted(f"{stage}: ended by {name} after step {done} of {total}, which is saved")

    @contextmanager
    def metrics(self, stage: str, *, start: int) -> Iterator[Metrics]:
        """Sinks of this stage; rows of steps that a killed run wrote after its last checkpoint are dropped. A
        collective, from which on slow ranks are looked for."""
        stragglers = self.stop.stragglers
        stragglers.begin()
        metrics = Metrics(
            self._sinks(stage, start) if self.world.is_first else [],
            more=lambda: {f"{stage}/{name}": value for name, value in stragglers.figures.items()},
        )
        try:
            yield metrics
        finally:
            metrics.close()

    def _sinks(self, stage: str, start: int) -> list[Sink]:
        tracking = self.config.tracking
        sinks: list[Sink] = [JsonlSink(self.folder.metrics, prefix=f"{stage}/", start=start)]
        if self.report is not None:
            sinks.append(self.report)
        if (show := notebook_display()) is not None:
            sinks.append(NotebookPlot(stage, show))
        if tracking.tensorboard:
            sinks.append(TensorBoardSink(self.folder.tensorboard / stage, start=start))
        if tracking.wandb_project:
            sinks.append(WandbSink(tracking.wandb_project, name=f"{self.folder.path.name}/{stage}"))
        return sinks

    def progress(self, stage: str, *, total: int, start: int) -> Progress:
        """Return a bar with rate and remaining time, or a line now and then where there is no terminal.

        The number of steps is written into summary.json first, for those who look at the run from outside.
        """
        if self.world.is_first:
            self.folder.update_summary({"planned_steps": {stage: total}})
        return Progress(stage, total=total, start=start, print_every=self.config.tracking.print_every)


@contextmanager
def open_run(config: RunConfig, check: Callable[[World], None] | None = None) -> Iterator[Context]:
    """Join the run's processes, and create or reopen its folder, refusing another run's; locked against a second
    run. Within the block SIGTERM and SIGINT ask for an end (stopping.py).

    check: what the first process asks before the folder is touched. Its error ends the others, which wait for it.
    """
    kind = resolve_device(config.device)
    with (
        joined(kind) as world,
        stop_request(world) as stop,
        _folder_of(config, world, check) as folder,
        clock_stopped(_begun_at(folder, world)),
        warnings_heard_by(folder.keep_warning) if world.is_first else nullcontext(),
    ):
        device = world.device(kind)
        dtype = resolve_dtype(config.precision, device)
        number = f"{world.size} processes, " if world.size > 1 else ""
        say(f"run {folder.path}: {number}{device}, {str(dtype).removeprefix('torch.')}")
        if config.offload.models and not world.is_group:
            raise ConfigError(
                f"offload.{config.offload.models[0]} = true, but this process is not one of a group: it shards nothing",
                hint="start it with dovetail train, which makes one, or with torchrun --nproc-per-node 1",
            )
        report = LiveReport(folder) if world.is_first else None
        context = Context(config, folder, device, dtype, world, world.aside(), stop, report)
        if (size := context.sharing.shard_size) < world.size:
            say(f"what is sharded has {world.size // size} copies, each over {size} processes")
        yield context


def _folder_of(config: RunConfig, world: World, check: Callable[[World], None] | None) -> RunFolder:
    """Open the folder in the first process; the others get its paths once it is there."""
    if not world.is_first:
        world.wait()
        return RunFolder(config.output_dir)
    if check is not None:
        check(world)
    folder = RunFolder.open(config.output_dir, config.model_dump(mode="json"))
    world.wait()
    return folder


def _begun_at(folder: RunFolder, world: World) -> datetime:
    """Return when the run began, as the first process reads it."""
    begun = begun_at(folder.config) if world.is_first else None
    return datetime.fromisoformat(world.from_first((begun or datetime.now()).isoformat()))


def resume(
    checkpoints: Checkpoints, load: Callable[[Mapping[str, Any]], None], stage: str, like: Mapping[str, Any]
) -> int:
    """Load the newest sound checkpoint, if there is one; returns the step to go on with.

    like: the state as it is now, to see which rows of sharded tensors are wanted.
    """
    found = checkpoints.latest(like)
    if found is None:
        return 0
    step, state = found
    load(state)
    say(f"{stage}: resumed after step {step}")
    return int(step)
