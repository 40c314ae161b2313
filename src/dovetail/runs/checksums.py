"""Checksums of a checkpoint's files.

Responsible for: taking them while files are written, and finding out before a file is read whether it is as it was.
Not responsible for: what is in the files, and which checkpoint takes the place of a damaged one (checkpoint.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from dovetail.errors import CheckpointError
from dovetail.runs.disk import sync_file

VALUES, MANIFEST = "state.json", "manifest.json"


class HashedFile:
    """Counts and hashes what is written, and notes both when the file is safely on the disk."""

    def __init__(self, file: BinaryIO, name: str, notes: dict[str, dict[str, Any]]) -> None:
        self._file = file
        self._name = name
        self._notes = notes
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None:
                sync_file(self._file)
                self._notes[self._name] = {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def find_incomplete(folder: Path) -> str | None:
    """Return what its manifest and the sizes of its files show to be wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in {VALUES, *files}:
            found, written, _ = (folder / name).stat().st_size, files[name]["bytes"], files[name]["sha256"]
            if found != written:
                return f"{name} has {found:,} bytes, {written:,} were written"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def find_corrupted(folder: Path, *, rank: int = 0, size: int = 1) -> str | None:
    """Return what is wrong with the first file whose SHA-256 differs from the manifest or that cannot be read, or None.

    rank, size: each of `size` ranks reads its share of the files. Raises CheckpointError if a file is missing here that
    another rank has seen.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in sorted(files)[rank::size]:
            if _digest(folder / name) != files[name]["sha256"]:
                return f"the contents of {name} have changed (SHA-256 differs)"
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} is not there for process {rank}, and the first one sees it",
            hint="output_dir must be one folder that all machines share",
        ) from error
    except OSError as error:
        return str(error)
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
