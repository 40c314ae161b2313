"""Signals that come before a run can answer them: while modules are imported, and while its inputs are checked.

Responsible for: ending in order then. Not responsible for: signals to the processes of a run (agent.py), and to one
that trains (stages/stopping.py). Imports no torch.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Ask a run to end. One that is ignored when the launcher starts stays ignored: so does `nohup` with SIGHUP."""

Handler = Callable[[int, FrameType | None], None]


class Stopped(Exception):
    """A signal ended the run before it saved; all processes are gone. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop(number: int, _: FrameType | None = None) -> None:
    """Answer a signal by raising Stopped."""
    raise Stopped(number)


def handle_stops(handler: Handler) -> dict[int, object]:
    """Let `handler` answer all of STOPS that are not ignored; return the handlers before, by number."""
    if threading.current_thread() is not threading.main_thread():  # which alone takes signals in Python
        return {}
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped in the block on a signal. Without a handler the first process of a container would not get it."""
    with _handled(stop):
        yield


@contextmanager
def signals_kept() -> Iterator[None]:
    """Raise Stopped behind the block if a signal came in it. A module that is half imported may swallow an error."""
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
