"""Read a file of prompts, one per row, in the forms that training takes.

Responsible for: the column of the prompt, and errors that name the row. Not responsible for: the answers
(answer_file.py), reading tables and conversations (data/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError
from dovetail.data.forms import prompt_turns
from dovetail.data.guesses import prompt_columns
from dovetail.data.tables import rows_of
from dovetail.errors import DataError
from dovetail.text.message import Message

_HINT = 'write an object such as {"prompt": "Hello"} or {"messages": [{"role": "user", "content": "Hello"}]}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompts."""

    columns: Mapping[str, Any]
    """All columns, as they stood in the file."""
    conversation: Sequence[Message]
    where: str
    """The file and line of the row."""


def read_prompts(file: Path) -> list[Prompt]:
    """Return every row: an object with `prompt` or `messages`, as in training. Raises DataError that names the line."""
    prompts = []
    for place, row in rows_of(file):
        where = f"{file}, {place}"
        try:
            if isinstance(row, BadRowError):
                raise row
            prompts.append(_prompt(row, where))
        except BadRowError as error:
            raise DataError(f"{where}: {error.reason}", hint=error.hint or _HINT) from error
    if not prompts:
        raise DataError(f"{file} has no prompts", hint='a line is an object such as {"prompt": "Hello"}')
    return prompts


def _prompt(columns: Mapping[str, Any], where: str) -> Prompt:
    found = prompt_columns(columns)
    if found is None or {"prompt", "messages"} <= columns.keys():
        given = "neither `prompt` nor" if found is None else "both `prompt` and"
        raise BadRowError(f"{given} `messages`", hint=_HINT)
    for ours in ("answer", "finish_reason"):
        if ours in columns:
            raise BadRowError(f"it has a column `{ours}` already", hint="rename that column")
    try:
        json.dumps(columns, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"half a surrogate pair is not a character: {error}", hint="remove it from that line"
        ) from error
    except TypeError as error:
        raise BadRowError(
            f"a column cannot be written as JSON: {error}", hint="leave that column out"
        ) from error
    return Prompt(columns, prompt_turns(columns, SourceConfig(path=where, prompt=found)), where)
