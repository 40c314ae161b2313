"""Checkpoints: the state of a stage on disk, whole or not at all.

Responsible for: writing a state (nested dicts of tensors and plain values) so that a kill, a power cut or a
full disk at any moment leaves the ones before it usable; finding the newest sound one; keeping the last
few.
Not responsible for: what a state holds (each part has its own `state_dict`), model folders for users.

On disk: `step-00000100/` with `tensors.safetensors`, `state.json` (the structure and the plain values) and
`manifest.json` (sizes and SHA-256 of both). A folder gets this name, by a rename, only once all of it is on
the disk. No pickle: reading a stranger's checkpoint runs no code.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.telemetry.log import warn
from dovetail.training.disk import OpenFile, open_file, sync_file, sync_folder, write_failure
from dovetail.training.tensor_file import num_bytes, read_tensors, write_tensors

TENSORS, VALUES, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_UNFINISHED = (".writing-", ".deleting-")
_MARK = "$tensor"


class Checkpoints:
    """The checkpoints of one stage, in one folder.

    keep: how many of the newest stay. open_file: how files are opened for writing.
    One process at a time may save (training/run_folder.py sees to it); any number may read.
    """

    def __init__(self, folder: Path, *, keep: int = 2, open_file: OpenFile = open_file) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must stay")
        self.folder = folder
        self._keep = keep
        self._open_file = open_file
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps, then remove what is older than the last `keep`.

        Raises CheckpointError if the disk refuses; the checkpoints before are intact then, and no rest is
        left.
        """
        tensors: dict[str, Tensor] = {}
        values = json.dumps(_split(state, "", tensors))
        target = self._free_name(step)
        temporary = self.folder / f".writing-{target.name}"
        needed = sum(num_bytes(tensor) for tensor in tensors.values()) + len(values)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            temporary.mkdir()
            self._write(temporary, step, values, tensors)
            temporary.rename(target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise write_failure(error, target, needed_bytes=needed) from error
        self._remove_old()
        return target

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest sound checkpoint, tensors on the CPU; None if there is none at all.

        A damaged one is passed over with a warning. Raises CheckpointError if all are damaged.
        """
        found = self._finished()
        for step, folder in reversed(found):
            try:
                return step, _read(folder)
            except (OSError, ValueError, KeyError) as error:
                self._damaged.add(folder)
                warn(f"checkpoint {folder} is damaged and passed over: {error}")
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} are damaged",
                hint="delete that folder to begin the stage anew, and check the disk",
            )
        return None

    def _finished(self) -> list[tuple[int, Path]]:
        """(step, folder), oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        ordered = sorted((int(m[1]), int(m[2] or 0), path) for m, path in matches if m)
        return [(step, path) for step, _, path in ordered]

    def _free_name(self, step: int) -> Path:
        """A name that is not taken: an earlier save of the same step must stay until this one is complete."""
        plain = self.folder / f"step-{step:08d}"
        taken = [
            int(m[2] or 0)
            for _, path in self._finished()
            if (m := _NAME.fullmatch(path.name)) and int(m[1]) == step
        ]
        return plain if not taken else plain.with_name(f"{plain.name}.{max(taken) + 1}")

    def _write(self, folder: Path, step: int, values: str, tensors: Mapping[str, Tensor]) -> None:
        files: dict[str, dict[str, Any]] = {}
        with self._hashed(folder / TENSORS, files) as file:
            write_tensors(file, tensors)
        with self._hashed(folder / VALUES, files) as file:
            file.write(values.encode())
        with self._hashed(folder / MANIFEST, {}) as file:
            file.write(json.dumps({"format": 1, "step": step, "files": files}, indent=1).encode())
        sync_folder(folder)

    def _hashed(self, path: Path, files: dict[str, dict[str, Any]]) -> "_HashedFile":
        return _HashedFile(self._open_file(path), path.name, files)

    def _remove_old(self) -> None:
        sound = [folder for _, folder in self._finished() if folder not in self._damaged]
        for folder in [*sound[: -self._keep], *self._damaged]:
            if folder.exists():
                # renamed first: a kill half-way through must not leave something that looks finished
                doomed = folder.rename(folder.with_name(f".deleting-{folder.name}"))
                shutil.rmtree(doomed, ignore_errors=True)
        self._damaged.clear()

    def _remove_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith(_UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)


class _HashedFile:
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


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a state; its tensors go to `tensors` and leave {"$tensor": name} behind."""
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors of a state are both called {path}")
        tensors[path] = value
        return {_MARK: path}
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) or key == _MARK for key in value):
            raise TypeError(
                f"{path or 'state'}: keys of a state are strings other than {_MARK}: {list(value)[:5]}"
            )
        return {key: _split(item, f"{path}/{key}" if path else key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be part of a state; only tensors and plain values can"
    )


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_split`; tuples have become lists."""
    if isinstance(value, dict):
        if value.keys() == {_MARK}:
            return tensors[value[_MARK]]
        return {key: _join(item, tensors) for key, item in value.items()}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value


def _read(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises OSError, ValueError or KeyError if anything about it is wrong."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (TENSORS, VALUES):
        expected = manifest["files"][name]
        size, digest = _fingerprint(folder / name)
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes, {expected['bytes']:,} were written")
        if digest != expected["sha256"]:
            raise ValueError(f"the contents of {name} have changed (SHA-256 differs)")
    state: dict[str, Any] = _join(json.loads((folder / VALUES).read_text()), read_tensors(folder / TENSORS))
    return state


def _fingerprint(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            yield block
