"""Find the line of our code that a thread of this process is in, and whether it waits there for other ranks.

Responsible for: reading the stack from outside. Not responsible for: what follows from it (training/stragglers.py,
launch/stuck.py).
"""

import os
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

_SPEC = find_spec("torch")  # not imported: what reports a run must not need it
assert _SPEC is not None
assert _SPEC.origin is not None
_TORCH = str(Path(_SPEC.origin).parent)
_DISTRIBUTED = os.path.join(_TORCH, "distributed")  # noqa: PTH118 (compared with a frame's file name, a str)
_LOCAL = os.path.join(_DISTRIBUTED, "tensor", "")  # noqa: PTH118 (sharded tensors, which compute; they call the others)


def frames_of(thread: threading.Thread) -> Iterator[FrameType]:
    """Yield the frames of the thread's stack, innermost first; none if the thread has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def own_line(frames: Iterator[FrameType]) -> tuple[FrameType | None, str | None]:
    """Return the innermost frame outside torch, and the torch.distributed function called there, if any."""
    collective = None
    for frame in frames:
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH):
            return frame, collective
        if (
            file.startswith(_DISTRIBUTED)
            and not file.startswith(_LOCAL)
            and frame.f_code.co_name != "wrapper"
        ):
            collective = frame.f_code.co_name
    return None, collective
