"""A signal asks a run to end: it ends after the step it is in, with a checkpoint.

Responsible for: SIGTERM and Ctrl-C in a process that trains, and the step on which the processes of a run agree.
Not responsible for: saving (saving.py), passing signals on to the processes of a run (launch/agent.py).
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from dovetail.errors import RunInterrupted
from dovetail.parallel.world import World
from dovetail.training.stragglers import StragglerDetector, straggler_detector

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The request of a signal that the processes of `world` end."""

    def __init__(self, world: World, stragglers: StragglerDetector | None = None) -> None:
        self.stragglers = stragglers or StragglerDetector(world)
        self._world = world
        self._number = 0

    def take(self, number: int) -> None:
        """Note that this process has got the signal."""
        self._number = number

    def asked(self) -> str | None:
        """Return the name of the signal, the same on all ranks. A collective, which also exchanges working times."""
        number = self._number
        if self._world.size > 1:
            own = torch.tensor([number, *self.stragglers.working_seconds()], dtype=torch.float64)
            signalled, *worked = self._world.max(own).tolist()
            number = int(signalled)
            self.stragglers.judge(worked)
        return signal.Signals(number).name if number else None

    def expect_none(self, before: str) -> None:
        """Raise RunInterrupted if the run was asked to end before the stage of that name. A collective."""
        name = self.asked()
        if name is not None:
            raise RunInterrupted(f"ended by {name} before {before}")


@contextmanager
def stop_request(world: World) -> Iterator[StopRequest]:
    """While the block runs, SIGTERM and SIGINT only ask for an end; what is ignored stays ignored.

    Alone, a second signal ends the process as it would have done before. One of several takes no notice of more:
    a cluster may signal it and its launcher, which passes the same on. In another thread than the main one, which
    alone takes signals in Python, nothing changes.
    """
    with straggler_detector(world) as stragglers:
        request = StopRequest(world, stragglers)
        if threading.current_thread() is not threading.main_thread():
            yield request
        else:
            with _taking_signals(request, world):
                yield request


@contextmanager
def _taking_signals(request: StopRequest, world: World) -> Iterator[None]:
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def take(number: int, _: FrameType | None) -> None:
        request.take(number)
        if not world.is_group:
            restore()
            _announce(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, take)
    try:
        yield
    finally:
        restore()


def _announce(number: int) -> None:
    """Print without buffers and locks, which the main thread may hold at this moment; the terminal may be gone."""
    name = signal.Signals(number).name
    text = f"\n{name}: the run saves a checkpoint after this step and ends; a second one ends it now\n"
    if sys.__stderr__:
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), text.encode())
