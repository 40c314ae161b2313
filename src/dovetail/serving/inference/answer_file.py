"""Write the answers to a file of prompts, one per line, in order; an interrupted file is continued.

Responsible for: the answers' JSON lines, and the record beside them of the model and settings that wrote them.
Not responsible for: the prompts (prompt_file.py), generating answers (chat_model.py), flags (cli/generate.py).

`answers.jsonl` has `answers.jsonl.settings.json` beside it. Answers of another model or other settings are never
added to a file: its content is either all of one kind or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dovetail.errors import DataError
from dovetail.serving.inference.prompt_file import Prompt
from dovetail.telemetry.log import warn

try:
    import fcntl
except ImportError:  # Windows has no flock: there two processes can write one file
    fcntl = None  # type: ignore[assignment]

Settings = Mapping[str, str | int | float | None]
"""The settings that decide the answers, by the names that the message about a difference shows."""

_ANEW = "choose another --output, or remove this file to begin anew"


class AnswerFile:
    """The answers, one per line, in the order of the prompts; those already there are kept. Use it in a `with`."""

    def __init__(self, file: Path, prompts: Sequence[Prompt], settings: Settings) -> None:
        """Open the file for this process alone.

        Raises DataError if it holds answers to other prompts or drawn with other settings, or cannot be written.
        """
        self._file = file
        self._prompts = prompts
        self._early: dict[int, str] = {}
        """The lines that wait for an earlier one."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = file.open("a", encoding="utf-8", newline="\n")
            try:
                self._lock()
                self.num_done = self._keep_whole_lines()
                self._expect_or_write(settings)
            except BaseException:
                self._lines.close()
                raise
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be used: {error}", hint="choose another --output") from error
        self._next = self.num_done

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def add(self, index: int, answer: str | None, finish_reason: str) -> None:
        """Write the answer to one prompt as soon as all before it are written. None: the prompt got no answer."""
        row = {**self._prompts[index].columns, "answer": answer, "finish_reason": finish_reason}
        self._early[index] = json.dumps(row, ensure_ascii=False) + "\n"
        while self._next in self._early:
            self._lines.write(self._early.pop(self._next))
            self._next += 1
        self._lines.flush()

    def _lock(self) -> None:
        """Lock the file. The kernel ends the lock with the process, so a killed one leaves none behind."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self._file} is being written by another process",
                hint="wait for it, or choose another --output",
            ) from error
        except OSError as error:  # some file systems have no locks
            warn(f"{self._file} cannot be locked ({error.strerror}): let one process alone write it")

    def _keep_whole_lines(self) -> int:
        """Count the answers that are there, and remove half a line that a killed process left."""
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").split("\n")[:-1]
        self._expect_answers(lines)
        if whole != content:
            self._lines.truncate(len(whole))
        return len(lines)

    def _expect_answers(self, lines: Sequence[str]) -> None:
        if len(lines) > len(self._prompts):
            raise DataError(
                f"{self._file} has {len(lines)} answers, and there are {len(self._prompts)} prompts",
                hint=_ANEW,
            )
        for number, (line, prompt) in enumerate(zip(lines, self._prompts, strict=False), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or {k: row.get(k) for k in prompt.columns} != prompt.columns:
                raise DataError(f"{self._file}, line {number}: no answer to prompt {number}", hint=_ANEW)

    def _expect_or_write(self, settings: Settings) -> None:
        """Compare the record with `settings`, or write it where there are no answers yet."""
        record = self._file.with_name(self._file.name + ".settings.json")
        if not self.num_done:
            record.write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            return
        try:
            found: Any = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise DataError(
                f"{self._file} has {self.num_done} answers, and {record} does not say what wrote them",
                hint=_ANEW,
            )
        changed = [name for name in settings if found.get(name) != settings[name]]
        if changed:
            differences = ", ".join(
                f"{name} {json.dumps(found.get(name), ensure_ascii=False)} and now "
                f"{json.dumps(settings[name], ensure_ascii=False)}"
                for name in changed
            )
            raise DataError(
                f"{self._file} has {self.num_done} answers that were drawn with {differences}",
                hint=f"give the same model and settings, {_ANEW}",
            )
