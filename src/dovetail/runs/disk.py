"""Files that are there whole or not at all.

Responsible for: atomic writes, and what a full or read-only disk means for a person.
Not responsible for: what is written (checkpoint.py, run_folder.py).
"""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dovetail.errors import CheckpointError

OpenFile = Callable[[Path], BinaryIO]
"""Opens a file for writing: the seam to the disk."""


def open_file(path: Path) -> BinaryIO:
    """Write through the real disk's functions."""
    return path.open("wb")


class FullDisk:
    """A disk with room for only so many more bytes; stands in for the real one in tests."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def __call__(self, path: Path) -> BinaryIO:
        return io.BufferedWriter(_LimitedFile(path, self))  # type: ignore[type-var]


class _LimitedFile(io.FileIO):
    def __init__(self, path: Path, disk: FullDisk) -> None:
        super().__init__(path, "wb")
        self._disk = disk

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        room = memoryview(data)[: self._disk.free_bytes]
        if len(room) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(room)
        self._disk.free_bytes -= written
        return written


def write_atomically(path: Path, text: str, *, open_file: OpenFile = open_file) -> None:
    """Replace `path` by `text`: after a kill or a power cut it holds the old text or the new, never a part.

    Raises CheckpointError if the disk refuses; the old file is intact then.
    """
    data = text.encode()
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_file(temporary) as file:
            file.write(data)
            sync_file(file)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _remove_quietly(temporary)
        raise write_failure(error, path, needed_bytes=len(data)) from error


def sync_file(file: BinaryIO) -> None:
    """Wait until the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(error: OSError, path: Path, *, needed_bytes: int) -> CheckpointError:
    """Return the error to raise when the disk refuses to write `path`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"no room to write {path}: {needed_bytes:,} bytes needed ({reason}); "
            "everything saved before is intact",
            hint="free that much, or lower keep_checkpoints, then run the same command again: it goes on "
            "from the last checkpoint",
        )
    return CheckpointError(
        f"cannot write {path}: {reason}; everything saved before is intact",
        hint="check that the disk is there and that you may write to the folder, then run the command again",
    )


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the disk is in trouble already; the error to show is the first one
