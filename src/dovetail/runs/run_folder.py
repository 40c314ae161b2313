"""The folder of a run: what lies where, whose it is, and which stages are finished.

Responsible for: refusing a folder that is not a run or belongs to another configuration, the lock against a
second process, the names of all files, `summary.json` and the marks of finished stages.
Not responsible for: the contents of checkpoints (checkpoint.py), metrics (telemetry/), models
(model/save.py).

    config.yaml  summary.json  metrics.jsonl  warnings.jsonl  report.html  tensorboard/
    sft/model  reward/model  ppo/model  ppo/model_ema  ppo/best  ppo/samples.jsonl  ppo/held_out.jsonl  dpo/model
    STAGE/checkpoints  STAGE/done
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dovetail.errors import CheckpointError
from dovetail.runs.disk import write_atomically, write_failure
from dovetail.runs.lock import FolderLock
from dovetail.runs.run_identity import expect_same_identity, is_identity, write_identity
from dovetail.telemetry.log import warn

_MODELS = {
    "sft": "sft/model",
    "reward": "reward/model",
    "ppo": "ppo/model",
    "dpo": "dpo/model",
    "ema": "ppo/model_ema",
    "best": "ppo/best",
}


class RunFolder:
    """One run on disk. `RunFolder(path)` only names files; `RunFolder.open` claims the folder for this
    process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    @classmethod
    def open(cls, path: str | Path, config: Mapping[str, Any]) -> "RunFolder":
        """Create the folder, or go on with the run in it; use as `with RunFolder.open(...) as folder:`.

        config: the resolved configuration as plain values (run_identity.py says which may change between
        starts). Raises CheckpointError if the folder is not a run, is another configuration's, or is in
        use. A run that has saved nothing yet gives way to any configuration.
        """
        folder = cls(path)
        folder._expect_run_or_nothing()
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._lock = FolderLock(folder.path / ".lock")
        except OSError as error:
            raise write_failure(error, folder.path, needed_bytes=0) from error
        try:
            folder._expect_same_run(config)
            write_identity(folder.config, config)
        except BaseException:
            folder.close()
            raise
        return folder

    def expect_usable(self, config: Mapping[str, Any]) -> None:
        """Raise what `open` would raise, but for a lock, and write nothing."""
        self._expect_run_or_nothing()
        self._expect_same_run(config)
        place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reason = "you may not write to" if place.is_dir() else "this is a file:"
            raise CheckpointError(
                f"output_dir = {self.path} cannot be written: {reason} {place}",
                hint="give an output_dir in a folder that you may write to",
            )

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> Path:
        """The resolved configuration; can be given to `dovetail train`."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metrics of all stages, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def warnings(self) -> Path:
        """The warnings of all stages, one JSON object a line."""
        return self.path / "warnings.jsonl"

    @property
    def held_out(self) -> Path:
        """Answers to the same held-out prompts at each evaluation of PPO."""
        return self.path / "ppo" / "held_out.jsonl"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Event files, a folder for each stage."""
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        """The run's results, one JSON object."""
        return self.path / "summary.json"

    @property
    def samples(self) -> Path:
        """Sample answers of PPO with their scores."""
        return self.path / "ppo" / "samples.jsonl"

    def model(self, name: str) -> Path:
        """Return the Hugging Face folder of a stage, of PPO's moving average `ema`, or of its `best` so far."""
        return self.path / _MODELS[name]

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / stage / "checkpoints"

    def is_done(self, stage: str) -> bool:
        """Return whether the stage has finished and its model is still there (deleting the model asks for it
        anew)."""
        return self._mark(stage).exists() and self.model(stage).is_dir()

    def mark_done(self, stage: str) -> None:
        """Call when all that the stage leaves is on disk."""
        write_atomically(
            self._mark(stage), "This stage has finished. Delete the stage's folder to run it again.\n"
        )

    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Add to `summary.json`, at once or not at all; mappings are merged, other values replaced."""
        merged = _merged(self.read_summary(), values)
        write_atomically(self.summary, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")

    def keep_warning(self, text: str) -> None:
        """Add a warning to `warnings.jsonl`; one that a full disk does not take was printed all the same."""
        line = json.dumps({"time": round(time.time(), 3), "text": text}, ensure_ascii=False) + "\n"
        with suppress(OSError), self.warnings.open("a", encoding="utf-8") as file:
            file.write(line)

    def read_summary(self) -> dict[str, Any]:
        """Return the contents of `summary.json`."""
        if not self.summary.exists():
            return {}
        try:
            found = json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError as error:
            warn(f"{self.summary} is not JSON and is written anew: {error}")
            return {}
        return found if isinstance(found, dict) else {}

    def has_progress(self) -> bool:
        """Return whether any stage has saved a checkpoint or has finished."""
        return any(next(self.path.glob(kept), None) for kept in ("*/checkpoints/step-*", "*/done"))

    def _mark(self, stage: str) -> Path:
        return self.path / stage / "done"

    def _expect_same_run(self, config: Mapping[str, Any]) -> None:
        if self.config.exists() and (self.has_progress() or not is_identity(self.config)):
            expect_same_identity(self.config, config)

    def _expect_run_or_nothing(self) -> None:
        """Raise CheckpointError for a folder with other things in it; hidden files and logs do no harm."""
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"output_dir = {self.path} is a file", hint="give the name of a folder")
        if not self.path.is_dir() or self.config.exists():
            return
        foreign = sorted(
            p.name
            for p in self.path.iterdir()
            if not p.name.startswith(".") and p.suffix != ".log" and p.name != "logs"
        )
        if foreign:
            raise CheckpointError(
                f"output_dir = {self.path} is not a run: it has no config.yaml, but holds {foreign[0]}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""),
                hint="give a new or empty folder",
            )


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    nested = {k for k in new if isinstance(old.get(k), Mapping) and isinstance(new[k], Mapping)}
    return {key: _merged(old[key], new[key]) if key in nested else value for key, value in both.items()}
