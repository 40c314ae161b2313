"""One process per run folder.

Responsible for: a lock that a killed process leaves open, so that none is ever stale.
"""

import errno
import json
import os
import socket
from pathlib import Path
from typing import IO

from dovetail.errors import CheckpointError
from dovetail.telemetry.log import warn

try:
    import fcntl
except ImportError:  # Windows has no flock: there the lock only tells who was here
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Held from the making of the object until `release`, or the death of the process, by kill -9 too.

    The kernel keeps the lock (flock), so a file left behind by a killed run locks nothing. The file says who
    holds it, for the error message. Raises CheckpointError if another process does.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warn(f"{path} cannot be locked ({error.strerror}): let only one process use the run")
            else:
                raise self._held_by_another(path) from error
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _held_by_another(self, path: Path) -> CheckpointError:
        assert self._file is not None
        self._file.seek(0)
        holder = self._file.read()
        self.release()
        try:
            who = "process {pid} on {host}".format(**json.loads(holder))
        except (ValueError, KeyError):
            who = "another process"
        return CheckpointError(
            f"{path.parent} is in use by {who}",
            hint="wait for it or stop it, or give another output_dir",
        )
