"""Make a process of a run report its error to the launcher, and end when the launcher ends.

Responsible for: the error file of a process, its exit code, and its end when the launcher is gone.
Not responsible for: joining the process group, training.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dovetail.errors import DovetailError

LAUNCHER = "DOVETAIL_LAUNCHER"
"""Environment variable with the process id of Dovetail's launcher, in the processes that it starts."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable that names the file a process writes its error to, by torch's convention."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextmanager
def as_rank() -> Iterator[None]:
    """Run the block as the work of one process among several.

    An error goes to the error file that the elastic agent named. Dovetail's launcher shows it, so that under it the
    process then ends without a message; under any other launcher the error is raised again.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        _end_with(int(launcher))
    try:
        yield
    except Exception as error:
        record(error)
        if launcher is None:
            raise
        sys.exit(error.exit_code if isinstance(error, DovetailError) else 1)
    except KeyboardInterrupt:
        if launcher is None:
            raise
        sys.exit(130)


def record(error: BaseException) -> None:
    """Write the error where the elastic agent looks for it, in torch's form with our hint beside it.

    The first error of a process is kept, because later ones follow from it.
    """
    name = os.environ.get(ERROR_FILE)
    if not name or Path(name).exists():
        return
    trace = {
        "py_callstack": "".join(traceback.format_exception(error)),
        "timestamp": str(int(time.time())),
    }
    report: dict[str, Any]
    if isinstance(error, DovetailError):
        report = {"message": {"message": error.message, "extraInfo": trace}}
        report |= {"known": True, "hint": error.hint, "exit_code": error.exit_code}
    else:
        report = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": trace}}
    partial = Path(f"{name}.{os.getpid()}")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(name)


def _end_with(launcher: int) -> None:
    """Let the kernel kill this process when the launcher ends, for whatever reason. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before this request
        os.kill(os.getpid(), signal.SIGKILL)
