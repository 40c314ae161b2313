"""A file of prompts, a line each.

Responsible for: what a line must hold, and errors that name it. Not responsible for: the answers (answer_file.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    where: str
    """File and line."""


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
    return Prompt(columns, row.conversation(), where)
