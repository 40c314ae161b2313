"""Find a straggler: a rank that the others wait for, step after step.

Responsible for: the part of each step that a process spends outside of collectives, and naming one that needs much
longer than the others. Not responsible for: exchanging the numbers (the caller of `working_seconds` and `judge`, once
a step), a run that stands still (launch/stuck.py).

A thread looks now and then whether the main one is in a call of torch.distributed. That costs the step nothing, and
takes no notice of a GPU: one that waits within its own queue, for a kernel of its own or of another, counts as working.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from dovetail.parallel.world import World
from dovetail.telemetry.log import warn
from dovetail.telemetry.stack import frames_of, own_line

RATIO = 1.5
"""A rank is slow if it works this many times as long as the median of the others."""
IN_A_ROW = 5
"""Warn after this many slow steps in a row: one rank gets the longest answers now and then by chance."""
AT_LEAST_S = 1.0
"""Steps shorter than this are judged together, because a few samples say little."""
_SHARE = 0.1
"""Warn only if the slow rank costs at least this share of a step."""
_PERIOD_S = 0.05


class WorkClock:
    """Seconds that this process's main thread spends outside of collectives, estimated by sampling its stack."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks = 0
        self._working = 0
        self._since = clock()

    def look(self) -> None:
        """Sample the main thread once; another thread calls this regularly."""
        _, collective = own_line(frames_of(threading.main_thread()))
        self._looks += 1
        self._working += collective is None

    def take(self) -> float:
        """Return the working seconds since the last call; all of them if there was no sample."""
        now = self._clock()
        share = self._working / self._looks if self._looks else 1.0
        seconds = (now - self._since) * share
        self._looks, self._working, self._since = 0, 0, now
        return seconds


class StragglerDetector:
    """The working time of each rank, and the search for one that needs much longer. `figures`: its last metrics."""

    def __init__(self, world: World, own: WorkClock | None = None) -> None:
        self.figures: dict[str, float] = {}
        self._world = world
        self._own = own or WorkClock()
        self._hosts: list[str] = []
        self._seconds = [0.0] * world.size
        self._steps = 0
        self._since = time.monotonic()
        self._slowest: int | None = None
        self._in_a_row = 0

    def begin(self) -> None:
        """Start anew at the beginning of a stage, because the time before its first step is no step. A collective."""
        self._hosts = self._world.gather(socket.gethostname())
        self._own.take()
        self._reset()
        self._slowest, self._in_a_row, self.figures = None, 0, {}

    def working_seconds(self) -> list[float]:
        """Return this rank's seconds in its place among all ranks, 0 elsewhere; a maximum over ranks joins them."""
        seconds = [0.0] * self._world.size
        seconds[self._world.rank] = self._own.take()
        return seconds

    def judge(self, seconds: Sequence[float], *, elapsed_s: float | None = None) -> None:
        """Take in a step's working seconds by rank; warns once in each stretch of steps with the same slow process.

        elapsed_s: how long the steps took since the last judgement, by default by the clock.
        """
        self._seconds = [before + now for before, now in zip(self._seconds, seconds, strict=True)]
        self._steps += 1
        elapsed = time.monotonic() - self._since if elapsed_s is None else elapsed_s
        if elapsed < AT_LEAST_S or self._world.size == 1:
            return
        slowest = max(range(self._world.size), key=lambda rank: self._seconds[rank])
        longest = self._seconds[slowest]
        others = median(s for rank, s in enumerate(self._seconds) if rank != slowest)
        is_slow = longest > RATIO * others and longest - others > _SHARE * elapsed
        self.figures = {"slowest_rank": float(slowest), "slowest_work_ratio": longest / max(others, 1e-3)}
        self._in_a_row = self._in_a_row + 1 if is_slow and slowest == self._slowest else int(is_slow)
        self._slowest = slowest if is_slow else None
        if self._in_a_row == IN_A_ROW:
            self._warn(slowest, longest / self._steps, others / self._steps)
        self._reset()

    def _warn(self, rank: int, longest: float, others: float) -> None:
        host = f" on {self._hosts[rank]}" if self._hosts else ""
        warn(
            f"rank {rank}{host} is slow: it needs {longest:.3g} s per step, the other ranks {others:.3g} s; check its "
            "device's clocks and temperature, and what else runs there"
        )

    def _reset(self) -> None:
        self._seconds, self._steps, self._since = [0.0] * self._world.size, 0, time.monotonic()


@contextmanager
def straggler_detector(world: World) -> Iterator[StragglerDetector]:
    """Look for slow ranks within the block: a thread samples the main one, if there are other ranks."""
    clock, done = WorkClock(), threading.Event()

    def look() -> None:
        while not done.wait(_PERIOD_S):
            clock.look()

    thread = threading.Thread(target=look, name="stragglers", daemon=True)
    if world.size > 1:
        thread.start()
    try:
        yield StragglerDetector(world, clock)
    finally:
        done.set()
        if world.size > 1:
            thread.join()
