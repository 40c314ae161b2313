"""Tell whether a thread works while its stack does not change, as in a long native call that reads a model.

Responsible for: what the kernel has counted for a thread of this process, and which of it is work. Not responsible for:
which thread to look at, and what follows (stuck.py).
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
_SHARE = 0.02
"""Share of one processor. A loop that sleeps and looks takes less; reading a file from memory or disk takes more."""
_FAULTS_PER_S = 10
"""Pages touched for the first time: these are 40 KB/s, and a thread that waits touches none."""


@dataclass(frozen=True, slots=True)
class Effort:
    """The work that a thread has done by `when_s`: seconds on a processor, and pages touched for the first time."""

    when_s: float
    processor_s: float
    faults: int


def effort_of(thread: int) -> Effort | None:
    """Return the effort of a thread of this process, by its native id; None where the system does not report it."""
    try:
        line = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()  # from field 3 on: the name in field 2 may hold any character
    minor, major, user, system = (int(fields[number - 3]) for number in (10, 12, 14, 15))
    return Effort(time.monotonic(), (user + system) * _TICK_S, minor + major)


def has_worked(before: Effort | None, now: Effort | None, *, on_gpu: bool) -> bool:
    """Return whether a thread that stays on one line has worked there.

    on_gpu: whether the process uses a GPU. Its thread then keeps a processor busy even while it waits for a GPU that
    itself waits for another one, so that only pages count.
    """
    if before is None or now is None:
        return False
    seconds = now.when_s - before.when_s
    if now.faults - before.faults > _FAULTS_PER_S * seconds:
        return True
    return not on_gpu and now.processor_s - before.processor_s > _SHARE * seconds


def uses_gpu() -> bool:
    """Return whether this process uses a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
