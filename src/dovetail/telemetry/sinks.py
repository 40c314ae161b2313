"""Write rows of metrics to a JSON-lines file, TensorBoard, Weights & Biases, or memory.

Responsible for: writing rows, and forgetting those that a killed run wrote after its last checkpoint, since
the resumed run writes them again. Only this file knows trackers; they are imported when a sink is made.
Not responsible for: the shape of a row (metrics.py).

`start` is the step a stage goes on after: the last one its checkpoint holds, 0 for a stage that begins.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dovetail.errors import CheckpointError, ConfigError


class Sink(Protocol):
    """Anything that takes rows."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Close the sink; no row follows."""
        ...


class MemorySink:
    """Remembers the rows; for tests and notebooks."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.rows.append((step, dict(row)))

    def close(self) -> None:
        self.is_closed = True


class JsonlSink:
    """One JSON object a line: `step`, `time` (seconds since 1970) and the names. NaN and infinity become
    null.

    Several stages share one file; `prefix` says which rows are this stage's.
    """

    def __init__(
        self, path: Path, *, prefix: str, start: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(path, prefix=prefix, start=start)
            self._file = path.open(
                "ab", buffering=0
            )  # whole lines reach the file at once, also if we are killed
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, step: int, row: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps({"step": step, "time": round(self._clock(), 3), **finite}) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard event files, one tag per name."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tracking.tensorboard is on, but tensorboard is not installed",
                hint="pip install tensorboard, or set tracking.tensorboard=false",
            ) from error
        has_history = folder.is_dir() and any(folder.iterdir())
        # TensorBoard hides what earlier files say of steps from purge_step on
        purge_step = (start + 1 if start else 0) if has_history else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. `name` is RUN/STAGE; the stages of a run are grouped under its name."""

    def __init__(self, project: str, *, name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"tracking.wandb_project = {project!r}, but wandb is not installed",
                hint="pip install wandb, or leave tracking.wandb_project out",
            ) from error
        self._run: Any = wandb.init(project=project, name=name, group=name.split("/")[0])

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def drop_rows_after(path: Path, *, prefix: str, start: int) -> None:
    """Take a stage's rows of steps after `start` out of a metrics file (all of them if it begins anew), and a
    last line cut short by a kill. Other lines stay as they are, byte for byte."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and not _is_stale(line, prefix, start)]
    if kept == lines:
        return
    shorter = path.with_name(f".{path.name}.shorter")
    shorter.write_bytes(b"".join(kept))
    shorter.replace(path)


def _is_stale(line: bytes, prefix: str, start: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or not any(name.startswith(prefix) for name in row):
        return False
    return start == 0 or row.get("step", 0) > start


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write metrics to {path}: {error.strerror or error}",
        hint="free space or fix the folder's permissions, then run the same command again: it goes on from "
        "the last checkpoint",
    )
