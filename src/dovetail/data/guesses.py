"""The columns of a source that names none, guessed from its first row.

Responsible for: the names that common data sets give their columns.
Not responsible for: what columns hold (forms.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError, value_of

_PROMPTS = ("prompt", "conversations", "messages", "input.messages", "question", ("instruction", "input?"))
_ANSWERS = ("response", "completion", "answer", "output")


def with_guessed_columns(source: SourceConfig, row: Mapping[str, Any]) -> SourceConfig:
    """Return a source that names no columns with those that its first row seems to have."""
    if source.names_columns():
        return source
    for guess in _guesses():
        if all(_has(row, column) for column in guess.values()):
            if source.system is None and "system" in row and "text" not in guess:
                guess["system"] = "system"
            return source.model_copy(update=guess)
    raise BadRowError(
        f"the source names no columns, and those of the row are not common ones: {', '.join(row)}",
        hint="say what they hold, such as prompt: question, response: answer, or chosen: good, rejected: bad",
    )


def prompt_columns(row: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    """Return the columns of a row that hold a prompt, by their names; None if none does."""
    return next((columns for columns in _PROMPTS if _has(row, columns)), None)


def _guesses() -> Iterator[dict[str, Any]]:
    """Yield forms of rows, those first whose columns are also part of another."""
    for prompt in _PROMPTS:
        yield {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    yield {"chosen": "chosen", "rejected": "rejected"}
    yield {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    for rejected in ("rejected_response", "rejected_messages"):
        yield {"chosen": "messages", "rejected": rejected}
    yield {"messages": "messages"}
    yield {"messages": "conversations"}
    for prompt in ("prompt", "question", ("instruction", "input?")):
        for response in _ANSWERS:
            yield {"prompt": prompt, "response": response}
    yield {"prompt": "prompt"}
    yield {"text": "text"}


def _has(row: Mapping[str, Any], columns: str | tuple[str, ...]) -> bool:
    """Return whether a row has the columns; one of them may be null."""
    for column in (columns,) if isinstance(columns, str) else columns:
        if column in row:
            continue
        with contextlib.suppress(BadRowError):
            value_of(row, column)
            continue
        return False
    return True
