"""Checkpoints: the state of a stage on disk, whole or not at all.

Responsible for: writing a state (nested dicts of tensors and plain values), in the background if wanted, so that a
kill, a power cut or a full disk at any moment leaves the ones before it usable; finding the newest sound one; keeping
the last few and the best. Several processes write one checkpoint together, each the rows of sharded tensors that it
holds; any number may read it, each the rows that it needs.
Not responsible for: what a state holds (each part has its own `state_dict`), model folders for users.

On disk: `step-00000100/` with `tensors.safetensors`, `state.json` (the structure and the plain values) and
`manifest.json` (sizes and SHA-256 of both, and how good the state is). Several processes leave
`tensors-00000.safetensors` and so on instead, and the manifest says which rows, or which boxes
of tensors that are cut by columns, lie where. A folder gets its name, by a
rename, only once all of it is on the disk. No pickle: reading a stranger's checkpoint runs no code.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dovetail.errors import CheckpointError
from dovetail.model.shards import bounds, is_first_replica, is_shard, local, shard_like
from dovetail.model.slices import boxes, is_part, slice_of, whole_shape
from dovetail.parallel.world import ALONE, World
from dovetail.runs.checksums import MANIFEST, VALUES, HashedFile, find_corrupted, find_incomplete
from dovetail.runs.disk import OpenFile, open_file, sync_folder, write_failure
from dovetail.runs.tensor_file import Place, TensorFiles, num_bytes, place, write_tensors
from dovetail.telemetry.log import warn

TENSORS = "tensors.safetensors"
WRITER = "checkpoint"
"""The prefix of the names of threads that write checkpoints."""
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_UNFINISHED = (".writing-", ".deleting-")
_MARK = "$tensor"


class Checkpoints:
    """The checkpoints of one stage, in one folder.

    keep: how many of the newest stay, beside the best. open_file: how files are opened for writing. world: the
    processes that save and read together, in one folder that all of them see; its collectives must be of its own
    (World.aside), because a thread calls them. Leaving a `with` block over it waits for what is being saved.
    One run at a time may save (runs/run_folder.py sees to it); any number may read.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, open_file: OpenFile = open_file, world: World = ALONE
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must stay")
        self.folder = folder
        self._keep = keep
        self._open_file = open_file
        self._world = world
        self._damaged: set[Path] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=WRITER)
        self._saving: Future[Path] | None = None
        self.last_step: int | None = None
        """The step of the state that was saved last through this object."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except Exception as failure:
            if kind is None:
                raise
            warn(f"the last checkpoint in {self.folder} was not finished: {failure}")

    def save(self, step: int, state: Mapping[str, Any], *, metric: float | None = None) -> Path:
        """Write the state after `step` steps, then remove what is older than the last `keep`. A collective.

        metric: the quality of the state, more is better; the best one is kept. None or not finite: not known.

        Raises CheckpointError if the disk refuses; the checkpoints before are intact then, and no rest is
        left.
        """
        self.begin_save(step, state, metric=metric)
        saved = self.finish()
        assert saved is not None
        return saved

    def begin_save(self, step: int, state: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Save in the background; returns once the state is copied to host memory and may change again.

        Waits for the save before, and raises what went wrong in it.
        """
        self.finish()
        tensors: dict[str, Tensor] = {}
        values = json.dumps(_split(state, "", tensors))
        own = {name: tensor for name, tensor in tensors.items() if _writes(self._world, tensor)}
        places = {name: place(tensor) for name, tensor in own.items() if is_part(tensor)}
        copies = {name: local(tensor).to("cpu", copy=True) for name, tensor in own.items()}
        facts = {"step": step} | ({"metric": metric} if metric is not None and math.isfinite(metric) else {})
        self._saving = self._thread.submit(self._save, facts, values, copies, places)
        self.last_step = step

    def finish(self) -> Path | None:
        """Wait for the save that was begun, if one was, and raise what went wrong in it."""
        saving, self._saving = self._saving, None
        return saving.result() if saving is not None else None

    def expect_no_failure(self) -> None:
        """Raise what went wrong in a save that was begun, if that is known by now."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def _save(
        self,
        facts: Mapping[str, Any],
        values: str,
        own: Mapping[str, Tensor],
        places: Mapping[str, Place],
    ) -> Path:
        target = self.folder / self._world.from_first(_free_name(self.folder, facts["step"]).name)
        temporary = self.folder / f".writing-{target.name}"
        needed = sum(num_bytes(tensor) for tensor in own.values()) + len(values)
        try:
            if self._world.is_first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                temporary.mkdir()
            self._world.wait()
            self._write(temporary, facts, values, own, self._places(places))
            if self._world.is_first:
                temporary.rename(target)
                sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise write_failure(error, target, needed_bytes=needed) from error
        if self._world.is_first:
            self._remove_old()
        self._world.wait()
        return target

    def latest(self, like: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest sound checkpoint, tensors on the CPU; None if there is none at all.

        like: a state of the same structure; of a tensor that is sharded there, only the same rows are read, and come
        back as such a shard. A damaged checkpoint is passed over with a warning. Raises CheckpointError if all are
        damaged, or this process does not see a file that the first one does. A collective.
        """
        found = self._newest_sound()
        return None if found is None else (found[0], _load(found[1], like or {}))

    def best(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the checkpoint with the largest metric, tensors on the CPU; None if none has one.

        For one process. Raises CheckpointError if it is damaged.
        """
        found = _best(self.folder)
        if found is None:
            return None
        step, folder = found
        if problem := find_incomplete(folder) or find_corrupted(folder):
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {problem}", hint="take the newest one, or another run's"
            )
        return step, _load(folder, {})

    def _newest_sound(self) -> tuple[int, Path] | None:
        """Let the first rank check that every file is there, then let each rank read some of the files."""
        world = self._world
        found = world.from_first(_finished(self.folder) if world.is_first else [])
        for step, folder in reversed(found):
            problem = world.from_first(find_incomplete(folder) if world.is_first else None)
            if problem is None:
                problems = world.gather(find_corrupted(folder, rank=world.rank, size=world.size))
                problem = next(filter(None, problems), None)
            if problem is None:
                return step, folder
            self._damaged.add(folder)
            warn(f"checkpoint {folder} is damaged and passed over: {problem}")
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} are damaged",
                hint="delete that folder to begin the stage anew, and check the disk",
            )
        return None

    def _places(self, own: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
        """Name -> file -> what is there of the tensors that lie in several files."""
        if self._world.size == 1:
            return {}
        found = self._world.gather(own)
        if not self._world.is_first:  # who alone writes them
            return {}
        return {
            name: {_file_of(rank): places[name] for rank, places in enumerate(found) if name in places}
            for name in own
        }

    def _write(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        values: str,
        tensors: Mapping[str, Tensor],
        places: Mapping[str, Mapping[str, Place]],
    ) -> None:
        files: dict[str, dict[str, Any]] = {}
        name = TENSORS if self._world.size == 1 else _file_of(self._world.rank)
        with self._hashed(folder / name, files) as file:
            write_tensors(file, tensors)
        files = {name: facts for found in self._world.gather(files) for name, facts in found.items()}
        if not self._world.is_first:
            return
        with self._hashed(folder / VALUES, files) as file:
            file.write(values.encode())
        with self._hashed(folder / MANIFEST, {}) as file:
            manifest = {"format": 1, **facts, "files": files} | ({"rows": places} if places else {})
            file.write(json.dumps(manifest).encode())
        sync_folder(folder)

    def _hashed(self, path: Path, files: dict[str, dict[str, Any]]) -> "HashedFile":
        return HashedFile(self._open_file(path), path.name, files)

    def _remove_old(self) -> None:
        sound = [folder for _, folder in _finished(self.folder) if folder not in self._damaged]
        _, best = _best(self.folder) or (0, None)
        old = [folder for folder in sound[: -self._keep] if folder != best]
        for folder in [*old, *self._damaged]:
            if folder.exists():
                # renamed first: a kill half-way through must not leave something that looks finished
                doomed = folder.rename(folder.with_name(f".deleting-{folder.name}"))
                shutil.rmtree(doomed, ignore_errors=True)
        self._damaged.clear()

    def _remove_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith(_UNFINISHED):
                shutil.rmtree(path, ignore_errors=True)


def _writes(world: World, tensor: Tensor) -> bool:
    """Return whether this rank writes what it holds: each its part of a shard or slice, the first a whole tensor."""
    cut = slice_of(tensor)
    if cut is not None:
        return cut.is_first
    return is_first_replica(tensor) if is_shard(tensor) else world.is_first


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON form of a state; its tensors move to `tensors` and leave {"$tensor": name} behind."""
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


def _join(value: Any, like: Any, files: TensorFiles) -> Any:
    """Undo `_split`; tuples have become lists."""
    if isinstance(value, dict):
        if value.keys() == {_MARK}:
            return _tensor(value[_MARK], like, files)
        inner = like if isinstance(like, Mapping) else {}
        return {key: _join(item, inner.get(key), files) for key, item in value.items()}
    return [_join(item, None, files) for item in value] if isinstance(value, list) else value


def _tensor(name: str, like: Any, files: TensorFiles) -> Tensor:
    # A tensor of another shape is read whole, so that the caller can say what is wrong.
    if not isinstance(like, Tensor) or not is_part(like) or files.shape(name) != whole_shape(like):
        return files.read(name)
    if slice_of(like) is None:
        return shard_like(like, files.read(name, *bounds(like)))
    return shard_like(like, files.read_boxes(name, boxes(like), local(like).shape))


def _file_of(rank: int) -> str:
    return f"tensors-{rank:05d}.safetensors"


def _load(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state of a sound checkpoint."""
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [name for name in manifest["files"] if name != VALUES]
    files = TensorFiles(folder, names, manifest.get("rows", {}))
    state: dict[str, Any] = _join(json.loads((folder / VALUES).read_text()), like, files)
    return state


def _finished(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder), oldest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    ordered = sorted((int(m[1]), int(m[2] or 0), path) for m, path in matches if m)
    return [(step, path) for step, _, path in ordered]


def _free_name(folder: Path, step: int) -> Path:
    """Return a free name, because an earlier save of the same step must stay until this one is complete."""
    plain = folder / f"step-{step:08d}"
    taken = [
        int(m[2] or 0)
        for _, path in _finished(folder)
        if (m := _NAME.fullmatch(path.name)) and int(m[1]) == step
    ]
    return plain if not taken else plain.with_name(f"{plain.name}.{max(taken) + 1}")


def _best(folder: Path) -> tuple[int, Path] | None:
    """Return (step, folder) of the checkpoint with the largest metric, among equal ones the newest."""
    rated = [
        (metric, step, path) for step, path in _finished(folder) if (metric := _metric(path)) is not None
    ]
    return max(rated)[1:] if rated else None


def _metric(folder: Path) -> float | None:
    """Return the metric that was saved with a checkpoint; None for a damaged one."""
    try:
        metric: float | None = json.loads((folder / MANIFEST).read_text()).get("metric")
    except (OSError, ValueError):
        return None
    return metric
