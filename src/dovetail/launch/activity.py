"""Whether a thread works while its stack stands still, as in one long native call: a model read, an arena filled.

Responsible for: what the kernel has counted for a thread of this process, and what of it is work. Not responsible for:
whose thread, and what follows (stuck.py).
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
_SHARE = 0.02
"""Of a processor. A loop that sleeps and looks takes less, reading a file from memory or disk more."""
_FAULTS_PER_S = 10
"""Pages first touched: 40 KB/s, where one that waits touches none."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What a thread has done by `when_s`: seconds on a processor, and pages that it touched for the first time."""

    when_s: float
    processor_s: float
    faults: int


def effort_of(thread: int) -> Effort | None:
    """Of a thread of this process, by its native id; None where the system does not tell."""
    try:
        line = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()  # from the third on: the name before may hold anything
    minor, major, user, system = (int(fields[number - 3]) for number in (10, 12, 14, 15))
    return Effort(time.monotonic(), (user + system) * _TICK_S, minor + major)


def has_worked(before: Effort | None, now: Effort | None, *, on_gpu: bool) -> bool:
    """Whether a thread that has not left its line did something there.

    on_gpu: the process uses a GPU. Its thread then spins on a processor also where it waits for a GPU that waits for
    another, so that only pages count.
    """
    if before is None or now is None:
        return False
    seconds = now.when_s - before.when_s
    if now.faults - before.faults > _FAULTS_PER_S * seconds:
        return True
    return not on_gpu and now.processor_s - before.processor_s > _SHARE * seconds


def uses_gpu() -> bool:
    """Whether this process does."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
