"""Describe what a process would train on: its settings, and the files of its machine that they name.

Responsible for: a short description of both, and the difference between two processes. Not responsible for: the
exchange of descriptions (preflight.py), models and data from the hub, whether a file is valid.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

from dovetail.config.run import RunConfig
from dovetail.runs.run_identity import flat_settings

MAY_DIFFER = ("output_dir", "data.cache_dir", "tracking.*")
"""Patterns of settings that may differ between machines. A check of its own finds folders that are not shared."""
_ABSENT = "no such file"
_ENDS = 1 << 16  # bytes read at each end of a file: reading a whole model takes as long as loading it


@dataclass(frozen=True, slots=True)
class Inputs:
    """The settings by dotted name, and a description of each file; `files` is None where a process did not look."""

    settings: Mapping[str, str]
    files: Mapping[str, str] | None = None

    def difference(self, first: "Inputs") -> str | None:
        """Return the first difference from the inputs of rank 0; None if there is none."""
        for name in dict.fromkeys([*first.settings, *self.settings]):
            mine, wanted = (each.settings.get(name, "not set") for each in (self, first))
            if mine != wanted:
                return f"{name} = {mine} (rank 0: {wanted})"
        if self.files is None or first.files is None:
            return None
        for name in sorted({*first.files, *self.files}):
            mine, wanted = (files.get(name, _ABSENT) for files in (self.files, first.files))
            if mine != wanted:
                return f"{name}: {mine} (rank 0: {wanted})"
        return None


def inputs_of(config: RunConfig, *, look_at_files: bool | None = None) -> Inputs:
    """Describe the inputs of this process.

    look_at_files: by default only in the first process of each machine, because all of them see the same files.
    """
    if look_at_files is None:
        look_at_files = os.environ.get("LOCAL_RANK") == "0"
    flat = flat_settings(config.model_dump(mode="json"))
    settings = {
        key: str(value) for key, value in flat.items() if not any(fnmatchcase(key, p) for p in MAY_DIFFER)
    }
    if not look_at_files:
        return Inputs(settings)
    return Inputs(settings, {name: text for path in _paths(config) for name, text in _described(Path(path))})


def _paths(config: RunConfig) -> Iterator[str]:
    """Yield the paths of models, data and code; some of them may be names on the hub."""
    models = (config.actor, config.reward_model)
    for model in filter(None, models):
        yield model.path
        if model.chat_template and "{" not in model.chat_template:  # the name of a file with the template
            yield model.chat_template
    yield from (source.path for source in (*config.data.blend, *config.data.pretraining))
    code = [term.function for term in config.ppo.reward_function]
    if config.ppo.environment is not None:
        code.append(config.ppo.environment.source)
    yield from filter(None, (spec.rpartition(":")[0] for spec in code))  # a built-in verifier has none


def _described(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and identity of a file, or of each file in a folder; nothing if the path does not exist."""
    place = path.expanduser()
    if place.is_file():
        yield str(path), _identity(place)
    elif place.is_dir():
        for file in sorted(place.rglob("*")):
            inside = file.relative_to(place)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield str(path / inside), _identity(file)


def _identity(file: Path) -> str:
    """Return the size of a file and a hash of both ends."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            ends = blake2b(content.read(_ENDS), digest_size=8)
            content.seek(max(0, size - _ENDS))
            ends.update(content.read(_ENDS))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"{size:,} bytes, hash {ends.hexdigest()}"
