"""Save the state of a stage before an error ends it, so that no finished step is lost.

Responsible for: saving on an error that the user can repair. Not responsible for: saves that are due
(context.py), what a state holds.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dovetail.errors import CheckpointError, DovetailError, RunInterrupted
from dovetail.parallel.world import World
from dovetail.runs.checkpoint import Checkpoints
from dovetail.telemetry.log import say, warn


@dataclass(slots=True)
class Place:
    """The progress of a loop."""

    done: int | None
    """The number of steps whose state is in memory; None while a step changes it."""


@contextmanager
def saved_on_error(
    checkpoints: Checkpoints, state: Callable[[], Mapping[str, Any]], *, start: int, world: World
) -> Iterator[Place]:
    """Save the state when a DovetailError leaves a stage's loop, which keeps the place up to date; then raise it.

    start: the steps that the newest checkpoint holds. Of several processes only an error that all of them raise
    (`is_everywhere`) is answered so: a checkpoint is written by all.
    """
    place = Place(start)
    try:
        yield place
    except (RunInterrupted, CheckpointError):  # the state is saved, or the disk refuses
        raise
    except DovetailError as error:
        if world.size == 1 or error.is_everywhere:
            _save(checkpoints, state, place, start)
        raise


def _save(checkpoints: Checkpoints, state: Callable[[], Mapping[str, Any]], place: Place, start: int) -> None:
    stage = checkpoints.folder.parent.name
    try:
        checkpoints.finish()
        if place.done is not None and place.done not in (start, checkpoints.last_step):
            checkpoints.save(place.done, state())
    except CheckpointError as failure:
        warn(f"{stage}: the state could not be saved: {failure.message}")
        return
    if place.done:
        say(f"{stage}: the state after step {place.done} is saved; the same command goes on from there")
