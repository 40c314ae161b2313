"""End a run in which no process moves any more, and name the ranks that the others wait for.

Responsible for: the position of each process, and telling a deadlock from a slow rank. Not responsible for: what counts
as work (activity.py), time limits of single collectives (the process group has its own).

The training loop takes no part in it. A thread of each process looks at the stack of the main thread or, while the main
thread waits for a checkpoint, of the thread that writes it. That thread counts as moving if its stack differs from the
last look, or if it worked outside of a collective (inside one, waiting may keep a processor busy too).
"""

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from dovetail.errors import LaunchError
from dovetail.launch.activity import Effort, effort_of, has_worked, uses_gpu
from dovetail.launch.rank import record
from dovetail.runs.checkpoint import WRITER, Checkpoints
from dovetail.telemetry.log import warn
from dovetail.telemetry.stack import frames_of, own_line

STUCK_AFTER_S = 480
"""Seconds without a move of any process. They are less than the 600 s after which NCCL gives up without a diagnosis
where no other limit is set, as within the sub-meshes that torch makes."""
_LOOKS = 4
"""A process is frozen, and not only short of a processor, if it has not looked while another looked this often."""


@dataclass(frozen=True, slots=True)
class Position:
    """The place where the main thread of one process stands."""

    host: str
    place: str
    collective: str | None
    still_s: float
    """Seconds since it moved."""
    looks: int
    """Number of looks of its watching thread, which stops when the process is frozen or gone."""


@contextmanager
def watched(store: Store, *, stuck_after_s: float = STUCK_AFTER_S) -> Iterator[None]:
    """Share the position of this process's main thread with the other processes while the block runs.

    A thread does it. Once no process has moved for `stuck_after_s`, that thread records a LaunchError with all
    positions and ends this process with exit code 3; as long as another process still moves, it warns once.
    """
    watch = _Watch(store, stuck_after_s)
    watch.start()
    try:
        yield
    finally:
        watch.done.set()
        watch.join()


class _Watch(threading.Thread):
    def __init__(self, store: Store, stuck_after_s: float) -> None:
        super().__init__(name="stuck", daemon=True)
        self.done = threading.Event()
        self._store = store
        self._stuck_after_s = stuck_after_s
        self._period = min(10.0, stuck_after_s / 5)
        self._stack: tuple[object, ...] = ()
        self._effort: Effort | None = None
        self._moved = time.monotonic()
        self._looks = 0
        self._history: list[dict[int, Position]] = []

    def run(self) -> None:
        try:
            while not self.done.wait(self._period):
                self._look()
        except DistError as error:  # the store ended with rank 0: the process group will say the same
            warn(f"the positions of the other ranks are no longer known: {str(error).splitlines()[0]}")

    def _look(self) -> None:
        thread = _thread()
        frames = list(frames_of(thread))
        line, collective = own_line(iter(frames))
        stack = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        effort = effort_of(thread.native_id or 0)
        works = collective is None and has_worked(self._effort, effort, on_gpu=uses_gpu())
        if stack != self._stack or works:
            self._moved = time.monotonic()
        self._stack, self._effort = stack, effort
        self._looks += 1
        still_s = time.monotonic() - self._moved
        mine = Position(socket.gethostname(), _place(line), collective, still_s, self._looks)
        self._store.set(f"position-{os.environ['RANK']}", json.dumps(asdict(mine)))
        if still_s < self._stuck_after_s:
            self._history.clear()
        else:
            self._judge()

    def _judge(self) -> None:
        now = _positions(self._store)
        self._history.append(now)
        if len(self._history) < _LOOKS:
            return
        earlier = self._history[-_LOOKS]
        silent = {rank for rank, position in earlier.items() if now[rank].looks == position.looks}
        text = diagnosis(now, silent)
        if all(rank in silent or now[rank].still_s >= self._stuck_after_s for rank in now):
            error = LaunchError(
                f"nothing has moved for {self._stuck_after_s:g} s: {text}",
                hint="the rank named first is waited for; its log says what it did last",
            )
            record(error)
            os._exit(error.exit_code)  # the main thread waits in a call that nothing else ends
        if len(self._history) == _LOOKS:
            warn(f"has not moved for {self._stuck_after_s:g} s: {text}")


def diagnosis(positions: Mapping[int, Position], silent: set[int]) -> str:
    """Say which ranks are waited for, and where the others wait."""
    lines = [f"rank {rank} on {positions[rank].host} shows no sign of life" for rank in sorted(silent)]
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for rank, position in positions.items():
        if rank not in silent:
            groups[position.place, position.collective].append(rank)
    # Ranks outside of a collective are waited for; among those inside, the smallest group is in the wrong place.
    for (place, collective), ranks in sorted(groups.items(), key=lambda g: (g[0][1] is not None, len(g[1]))):
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        verb = "wait" if len(ranks) > 1 else "waits"
        stand = "stand" if len(ranks) > 1 else "stands"
        lines.append(
            f"{who} {verb} in {collective} at {place}" if collective else f"{who} {stand} at {place}"
        )
    return "; ".join(lines)


def _positions(store: Store) -> dict[int, Position]:
    keys = {rank: f"position-{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))}
    return {rank: Position(**json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}


def _thread() -> threading.Thread:
    """Return the main thread or, while it waits for a checkpoint, the thread that writes it."""
    main = threading.main_thread()
    if any(frame.f_code is Checkpoints.finish.__code__ for frame in frames_of(main)):
        return next((t for t in threading.enumerate() if t.name.startswith(WRITER)), main)
    return main


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "no line of Python"
    parts = Path(frame.f_code.co_filename).parts[-2:]
    return f"{'/'.join(parts)}:{frame.f_lineno} ({frame.f_code.co_name})"
