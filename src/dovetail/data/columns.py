"""Find a value in a row by the name that a configuration gives.

Responsible for: column names, paths into nested values (`a.b`, `a[0]`, `a[].b` for all items, `a?` for a
value that may be absent), errors that name what the row has instead, and the columns that stay beside a prompt.
Not responsible for: what values mean (conversations.py, forms.py).
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from string import Formatter
from typing import Any

from dovetail.config.data import SourceConfig

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_LARGEST_EXACT = 2**53
"""The magnitude from which one float stands for several whole numbers."""
_NOT_A_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)
"""All errors that `ast.literal_eval` raises."""
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d*)\]")


class BadRowError(Exception):
    """The reason why a row cannot be used. It becomes a DataError with its place, or is counted and skipped."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """Return the value under a column name or path; None where an optional one (`name?`) is absent or null."""
    path, is_optional = (column[:-1], True) if column.endswith("?") else (column, False)
    try:
        value = row[path] if path in row else _walk(row, path)
    except (KeyError, IndexError, TypeError):
        if is_optional:
            return None
        raise _missing(row, path) from None
    except ValueError:  # of zip, in _descend
        raise BadRowError(
            f"{path} takes items from lists of different lengths", hint="repair the row: one length for all"
        ) from None
    if is_absent(value) and not is_optional:
        raise BadRowError(f"{path} is null", hint=f"repair the row, or write {path}? if it may be absent")
    return None if is_absent(value) else value


def is_absent(value: Any) -> bool:
    """Return whether a value stands for an empty cell: null, or NaN, as tables of pandas have it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_plain(value: Any) -> bool:
    """Return whether JSON has a form for a value: text, numbers, lists, and objects with names."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float)


def columns_beside_prompt(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """Return the columns of a row that are not its prompt, without values that JSON has no form for."""
    of_prompt = (source.prompt,) if isinstance(source.prompt, str) else source.prompt or ()
    others = (source.system, source.history)
    left_out = {column.removesuffix("?") for column in (*of_prompt, *others) if column is not None}
    return {
        name: None if is_absent(value) else value
        for name, value in row.items()
        if name not in left_out and is_plain(value)
    }


def is_template(column: str) -> bool:
    """Return whether a prompt is a text with columns in braces, and not the name of a column."""
    return "{" in column


def columns_in(template: str) -> list[str]:
    """Return the columns in braces of a template, in order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def filled(template: str, row: Mapping[str, Any]) -> str:
    """Return the template with the text of each column in its braces; an optional column that is absent is empty."""
    parts = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        if name:
            value = value_of(row, name)
            parts.append("" if value is None else as_text(value, name))
    return "".join(parts).strip()


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return a value that must be text; a number, as CSV or JSON may give it, counts as its digits."""
    return as_text(value_of(row, column), column)


def as_text(value: Any, column: str) -> str:
    """Return the value as text, or raise a BadRowError that says what it is.

    A whole number is written without a point: tables of pandas make 42 a float where another cell is empty.
    """
    if isinstance(value, str):
        return expect_characters(value, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() and abs(value) < _LARGEST_EXACT else value)
    raise BadRowError(f"{column} should be text, but is {describe(value)}")


def expect_characters(text: str, column: str) -> str:
    """Return the text; raise BadRowError if it holds half a surrogate pair, as JSON can, which no tokenizer takes."""
    if _HALF_A_PAIR.search(text):
        raise BadRowError(
            f"{column} holds half a surrogate pair, which is not a character", hint="remove it from the text"
        )
    return text


def number_of(value: Any, column: str) -> float:
    """Return the value as a finite number, or raise a BadRowError that says what it is."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{column} should be a number, but is {describe(value)}") from None
    if not math.isfinite(number):
        raise BadRowError(f"{column} should be a finite number, but is {number}")
    return number


def list_of(row: Mapping[str, Any], columns: tuple[str, ...] | str) -> list[Any]:
    """Return one value per column, or the list that one column holds (as JSON, in CSV files)."""
    if not isinstance(columns, str):
        return [value_of(row, column) for column in columns]
    value = parsed(value_of(row, columns))
    if not isinstance(value, list):
        raise BadRowError(
            f"{columns} should be a list, but is {describe(value)}",
            hint="or give one column per answer: [a, b]",
        )
    return value


def parsed(value: Any) -> Any:
    """Return the list or object that a text holds as JSON or as Python prints it, and anything else as it is.

    Tuples and arrays become lists.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return _literal(value)
    if not isinstance(value, (str, list, Mapping)) and hasattr(value, "__iter__"):
        return list(value)
    return value


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    with warnings.catch_warnings(), contextlib.suppress(*_NOT_A_LITERAL):
        warnings.simplefilter("ignore")  # Python warns of escapes that it does not know
        return ast.literal_eval(text.strip())
    return text


def describe(value: Any) -> str:
    """Describe a value in a few words, for errors."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    kinds = {str: "the text", list: "a list:", dict: "an object:", bool: "", type(None): ""}
    return f"{kinds.get(type(value), type(value).__name__)} {shown}".strip()


def _walk(row: Mapping[str, Any], path: str) -> Any:
    steps = [(match[1], match[2]) for match in _STEP.finditer(path)]
    return _descend(row, steps)


def _descend(value: Any, steps: list[tuple[str, str]]) -> Any:
    for position, (name, index) in enumerate(steps):
        if name:
            value = value[name]
        elif index:
            value = value[int(index)]
        else:
            rest = steps[position + 1 :]
            items = zip(*value.values(), strict=True) if isinstance(value, Mapping) else value
            if isinstance(value, Mapping):  # a table kept as columns, as `datasets` stores lists of objects
                return [_descend(dict(zip(value, item, strict=True)), rest) for item in items]
            return [_descend(item, rest) for item in items]
    return value


def _missing(row: Mapping[str, Any], path: str) -> BadRowError:
    close = difflib.get_close_matches(path, list(row), n=1)
    has = ", ".join(row) or "nothing"
    return BadRowError(
        f"there is no column {path}; the row has {has}",
        hint=f"did you mean {close[0]}?" if close else "name one of these columns in the source",
    )
