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

_ALPACA = ("instruction", "input?")
_PROMPTS = ("prompt", "conversations", "messages", "input.messages", "question", _ALPACA)
_ANSWERS = ("response", "completion", "answer", "output")

_VALUES = ("preference_values", "tie_values")
"""Settings of a guess that are not columns."""
_COMPARISONS: tuple[dict[str, Any], ...] = (
    # UltraFeedback
    {"prompt": "instruction", "answers": "completions[].response", "scores": "completions[].overall_score"},
    # PKU-SafeRLHF
    {
        "prompt": "prompt",
        "answers": ("response_0", "response_1"),
        "preference": "better_response_id",
        "preference_values": (0, 1),
    },
    # HelpSteer 2: -3 = the first is much better, 3 = the second is
    {
        "prompt": "prompt",
        "answers": ("response_1", "response_2"),
        "preference": "preference_strength",
        "preference_values": (-3, 3),
    },
    # HelpSteer 3
    {
        "prompt": "context",
        "answers": ("response1", "response2"),
        "preference": "overall_preference",
        "preference_values": (-3, 3),
    },
    # alpaca_eval
    {"prompt": "instruction", "answers": ("output_1", "output_2"), "preference": "preference"},
    # rankings with a score for each answer
    {"prompt": "prompt", "answers": "answers", "scores": "scores"},
)
"""Comparisons with columns of their own, by the public data sets that have them."""


def with_guessed_columns(source: SourceConfig, row: Mapping[str, Any]) -> SourceConfig:
    """Return a source that names no columns with those that its first row seems to have."""
    if source.names_columns():
        return source
    for guess in _guesses():
        if all(_has(row, column) for name, column in guess.items() if name not in _VALUES):
            beside = {"system": "text" not in guess, "history": guess.get("prompt") == _ALPACA}
            more = {
                name: f"{name}?"  # of rows that have it, if not of the first one
                for name, may_be in beside.items()
                if may_be and getattr(source, name) is None and name not in guess.values()
            }
            return source.model_copy(update=guess | more)
    raise BadRowError(
        f"the source names no columns, and those of the row are not common ones: {', '.join(row)}",
        hint="say what they hold, such as prompt: question, response: answer, or chosen: good, rejected: bad",
    )


def described(source: SourceConfig) -> str:
    """Return what the columns of a source, but for system messages, are taken for: the settings that would say so."""
    names = (
        "messages",
        "prompt",
        "response",
        "chosen",
        "rejected",
        "answers",
        "preference",
        "scores",
        "text",
    )
    given = {name: getattr(source, name) for name in (*names, "history")}
    return ", ".join(
        f"{name}: {columns if isinstance(columns, str) else '[' + ', '.join(columns) + ']'}"
        for name, columns in given.items()
        if columns is not None
    )


def prompt_columns(row: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    """Return the columns of a row that hold a prompt, by their names; None if none does."""
    return next((columns for columns in _PROMPTS if _has(row, columns)), None)


def _guesses() -> Iterator[dict[str, Any]]:
    """Yield forms of rows, those first whose columns are also part of another."""
    yield from _COMPARISONS
    for prompt in _PROMPTS:
        yield {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    yield {"chosen": "chosen", "rejected": "rejected"}
    yield {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    for rejected in ("rejected_response", "rejected_messages"):
        yield {"chosen": "messages", "rejected": rejected}
    yield {"messages": "messages"}
    yield {"messages": "conversations"}
    for prompt in ("prompt", "question", _ALPACA):
        for response in _ANSWERS:
            yield {"prompt": prompt, "response": response}
    yield {"prompt": "input", "response": "target"}  # Firefly
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
