"""Answers to a file of prompts: a line in, a line out, in order, and resumed where it was left.

Responsible for: the two JSON-lines files. Not responsible for: the answers (chat_model.py), flags (cli/generate.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dovetail.errors import DataError
from dovetail.inference.chat_model import Conversation
from dovetail.text.message import Role, message


class _Turn(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Role
    content: str


class _Row(BaseModel):
    """What a line must have; further columns are kept."""

    model_config = ConfigDict(extra="allow", strict=True)
    prompt: str | None = None
    messages: Annotated[list[_Turn], Field(min_length=1)] | None = None

    def conversation(self) -> Conversation:
        if self.prompt is not None:
            return self.prompt
        return [message(turn.role, turn.content) for turn in self.messages or ()]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts."""

    columns: dict[str, Any]
    """All of them, as they stood."""
    conversation: Conversation


def read_prompts(file: Path) -> list[Prompt]:
    """Every line: an object with `prompt`, a text, or `messages`. Raises DataError that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() breaks at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}", hint="give a UTF-8 file of JSON lines") from error
    prompts = [
        _prompt(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise DataError(f"{file} has no prompts", hint='a line is an object such as {"prompt": "Hello"}')
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    hint = (
        'write an object such as {"prompt": "Hello"} or {"messages": [{"role": "user", "content": "Hello"}]}'
    )
    try:
        columns = json.loads(line)
        row = _Row.model_validate(columns)
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"no JSON: {error}"
        raise DataError(f"{where}: {reason}", hint=hint) from error
    if (row.prompt is None) == (row.messages is None):
        found = "neither `prompt` nor" if row.prompt is None else "both `prompt` and"
        raise DataError(f"{where}: {found} `messages`", hint=hint)
    for ours in ("answer", "finish_reason"):
        if ours in columns:
            raise DataError(f"{where}: it has a column `{ours}` already", hint="rename that column")
    try:
        json.dumps(columns, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a surrogate pair is no character: {error}", hint="remove it from that line"
        ) from error
    return Prompt(columns, row.conversation())


class AnswerFile:
    """The answers, a line each, in the order of the prompts; those already there are kept. Use in a `with`."""

    def __init__(self, file: Path, prompts: Sequence[Prompt]) -> None:
        """Raises DataError if the file holds answers to other prompts, or cannot be written."""
        self._file = file
        self._prompts = prompts
        self._early: dict[int, str] = {}
        """Lines that wait for one before them."""
        self.num_done = self._keep_whole_lines()
        self._next = self.num_done

    def __enter__(self) -> AnswerFile:
        self._lines: TextIO = self._file.open("a", encoding="utf-8", newline="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def add(self, index: int, answer: str, finish_reason: str) -> None:
        """The answer to one prompt; written once all before it are there."""
        row = {**self._prompts[index].columns, "answer": answer, "finish_reason": finish_reason}
        self._early[index] = json.dumps(row, ensure_ascii=False) + "\n"
        while self._next in self._early:
            self._lines.write(self._early.pop(self._next))
            self._next += 1
        self._lines.flush()

    def _keep_whole_lines(self) -> int:
        """How many answers are there; half a line, left by a kill, is removed."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            content = self._file.read_bytes() if self._file.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            lines = whole.decode("utf-8").split("\n")[:-1]
            self._expect_ours(lines)
            if whole != content:
                with self._file.open("r+b") as file:
                    file.truncate(len(whole))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self._file} cannot be used: {error}", hint="choose another --output"
            ) from error
        return len(lines)

    def _expect_ours(self, lines: Sequence[str]) -> None:
        hint = "choose another --output, or remove this file to begin anew"
        if len(lines) > len(self._prompts):
            raise DataError(
                f"{self._file} has {len(lines)} answers, and there are {len(self._prompts)} prompts",
                hint=hint,
            )
        for number, (line, prompt) in enumerate(zip(lines, self._prompts, strict=False), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or {k: row.get(k) for k in prompt.columns} != prompt.columns:
                raise DataError(f"{self._file}, line {number}: no answer to prompt {number}", hint=hint)
