"""The token cache: columns of numbers on disk, written once, then memory-mapped.

Responsible for: folders of .npy files named by a hash of their inputs, written whole or not at all.
Not responsible for: what the columns mean (tokenize.py).

Columns are written in pieces and never held in memory, so that a data set may be larger than it. Any number of
processes may write the same entry; the first to finish wins. Every entry may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dovetail.errors import DataError

FORMAT = 3
"""The version in every key, raised when tokens come out differently for the same input, or the files change."""

_FACTS = "facts.json"
_PARTIAL = ".partial-"
_ABANDONED_AFTER = 24 * 3600  # seconds: no tokenising takes so long without writing
_BUFFER = 1 << 16  # values held before they are written

Columns = dict[str, NDArray[Any]]
Facts = Mapping[str, Any]


class ColumnWriter:
    """A writer that appends to one-dimensional .npy files, in a folder that no process reads yet."""

    def __init__(self, folder: Path, dtypes: Mapping[str, DTypeLike]) -> None:
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._lengths = dict.fromkeys(dtypes, 0)
        self._waiting: dict[str, list[Any]] = {name: [] for name in dtypes}
        self._files: dict[str, BinaryIO] = {}
        for name in dtypes:
            self._files[name] = (folder / f"{name}.npy").open("wb")
            self._write_header(name)

    def append(self, name: str, values: Sequence[Any]) -> None:
        """Add values at a column's end."""
        waiting = self._waiting[name]
        waiting += values
        if len(waiting) >= _BUFFER:
            self._flush(name)

    def close(self) -> None:
        """Write the true lengths into the headers, and everything to disk."""
        for name, file in self._files.items():
            self._flush(name)
            file.seek(0)
            self._write_header(name)
            file.flush()
            os.fsync(file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()

    def _flush(self, name: str) -> None:
        array = np.array(self._waiting[name], dtype=self._dtypes[name])
        self._files[name].write(array.tobytes())
        self._lengths[name] += len(array)
        self._waiting[name].clear()

    def _write_header(self, name: str) -> None:
        # numpy pads headers for lengths of up to 21 digits: the second one takes the same place as the first.
        descr = np.lib.format.dtype_to_descr(self._dtypes[name])
        header = {"descr": descr, "fortran_order": False, "shape": (self._lengths[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)


def stored(
    cache_dir: str | None,
    key: str,
    dtypes: Mapping[str, DTypeLike],
    write: Callable[[ColumnWriter], Facts],
) -> tuple[Columns, Facts]:
    """Return the columns under a key, from the cache or made by `write`, which also returns facts to keep as JSON."""
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    entry = root / key
    found = _read(entry, dtypes)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write(entry, dtypes, write)
    except OSError as error:
        raise _cannot_write(root, error) from error
    found = _read(entry, dtypes)
    if found is None:
        raise DataError(
            f"the token cache entry {entry} cannot be read back",
            hint="delete that folder, or set data.cache_dir to another place",
        )
    return found


def key_of(*parts: object) -> str:
    """Return the name of an entry, a hash of everything that its content depends on."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:40]


def default_cache_dir() -> Path:
    """Return `dovetail/tokens` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dovetail" / "tokens"


def _write(entry: Path, dtypes: Mapping[str, DTypeLike], write: Callable[[ColumnWriter], Facts]) -> None:
    _remove_abandoned(entry.parent)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=entry.parent))
    try:
        writer = ColumnWriter(folder, dtypes)
        try:
            facts = write(writer)
            writer.close()
        finally:
            writer.abandon()
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        if entry.exists() and _read(entry, dtypes) is None:
            shutil.rmtree(entry)  # damaged: a file was cut short or deleted
        try:
            folder.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process was first
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Delete the unfinished folders that killed processes left."""
    for folder in root.glob(f"{_PARTIAL}*"):
        newest = max((file.stat().st_mtime for file in folder.glob("*")), default=folder.stat().st_mtime)
        if time.time() - newest > _ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)


def _read(entry: Path, dtypes: Mapping[str, DTypeLike]) -> tuple[Columns, Facts] | None:
    """Read the entry; None if it is not there or not whole."""
    try:
        facts = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        return {name: _mapped(entry / f"{name}.npy") for name in dtypes}, facts
    except (OSError, ValueError):
        return None


def _mapped(file: Path) -> NDArray[Any]:
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        (length,), _, _ = np.lib.format.read_array_header_1_0(stream)
    mode = "r" if length else None  # an empty file cannot be mapped
    array: NDArray[Any] = np.load(file, mmap_mode=mode)  # type: ignore[arg-type]
    return array


def _cannot_write(root: Path, error: OSError) -> DataError:
    if error.errno == errno.ENOSPC:
        return DataError(
            f"the disk is full: the token cache in {root} cannot be written",
            hint=f"free space there (everything in {root} may be deleted), or set data.cache_dir to another disk",
        )
    return DataError(
        f"the token cache in {root} cannot be written: {error.strerror or error}",
        hint="set data.cache_dir to a folder that you may write to",
    )
