"""Handle signals that come before a run can: while modules are imported, and while the inputs are checked.

Responsible for: an orderly end at that time. Not responsible for: signals to the processes of a run (agent.py), signals
to a process that trains (stages/stopping.py). Imports no torch.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to end. One that is ignored at the start stays ignored, such as SIGHUP under `nohup`."""

Handler = Callable[[int, FrameType | None], None]


class Stopped(Exception):
    """The end of a run by a signal, before it saved; all processes are gone. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop(number: int, _: FrameType | None = None) -> None:
    """Answer a signal by raising Stopped."""
    raise Stopped(number)


def handle_stops(handler: Handler) -> dict[int, object]:
    """Let `handler` handle all of STOPS that are not ignored; return the earlier handlers by signal number."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there alone
        return {}
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped in the block on a signal. A container's first process would not get one without a handler."""
    with _handled(stop):
        yield


@contextmanager
def signals_kept() -> Iterator[None]:
    """Raise Stopped after the block if a signal came in it, because a half-imported module may hide an error."""
    came: list[int] = []
    with _handled(lambda number, _: came.append(number)):
        yield
    if came:
        raise Stopped(came[0])


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    before = handle_stops(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)  # type: ignore[arg-type]
