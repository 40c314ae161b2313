"""Read one source, from its path to records.

Responsible for: finding the table (file, folder, hub name or database of labels), and what happens to rows that
cannot be used: the first one raises an error (strict), or they are counted and skipped.
Not responsible for: formats (tables.py, hub.py, label_rows.py), columns (forms.py), stages (blend.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError, columns_beside_prompt, value_of
from dovetail.data.forms import record_of
from dovetail.data.guesses import described, with_guessed_columns
from dovetail.data.hub import hub_rows, is_saved, saved_rows
from dovetail.data.label_rows import is_labels, label_rows, without_password
from dovetail.data.records import Record
from dovetail.data.registry import short_names
from dovetail.data.report import Tally
from dovetail.data.tables import SUFFIXES, Placed, is_table, rows_of
from dovetail.errors import DataError
from dovetail.text.hub_names import expect_available, nearest


def read_source(
    source: SourceConfig, *, strict: bool = True, tally: Tally | None = None, keeps_columns: bool = False
) -> Iterator[Record]:
    """Yield the records of one source (resolved: see registry.py), in the order of the table.

    strict: raise a DataError with the place of the first row that cannot be used. Otherwise such rows are counted in
    `tally`, and only a source without any good row is an error. keeps_columns: each record carries the row's columns
    beside the prompt.
    """
    counts = Tally() if tally is None else tally
    records = _records(source, strict=strict, counts=counts, keeps_columns=keeps_columns)
    yield from records if source.limit is None else _smallest(records, source.limit)
    if counts.read == 0:
        raise DataError(
            f"{label_of(source)}: there are no rows in it", hint="check path, split and limit of the source"
        )


def label_of(source: SourceConfig) -> str:
    """Return the name of a source in reports."""
    split = f" {source.split}" if source.split != "train" else ""
    path = without_password(source.path) if is_labels(source.path) else source.path
    return f"{path}{f' {source.name}' if source.name else ''}{split}"


def expect_there(source: SourceConfig) -> None:
    """Raise DataError unless the source is a file or folder, or a name that the hub or its cache holds."""
    given, is_path = source.path, is_table(Path(source.path))
    if not is_path and "/" not in given and not Path(given).exists():
        names = short_names()
        raise DataError(
            f"{given}: there is no such file, nor a data set registered under this name",
            hint=nearest(given, names)
            or f"give a file, a folder, OWNER/NAME of a hub data set, or one of {', '.join(names)}",
        )
    expect_available(given, kind="dataset", error=DataError, is_path=is_path, revision=source.revision)


def _records(source: SourceConfig, *, strict: bool, counts: Tally, keeps_columns: bool) -> Iterator[Record]:
    label = label_of(source)
    verdicts: set[Any] = set()
    first_bad: tuple[str, BadRowError] | None = None
    for where, row in _rows(source):
        counts.read += 1
        try:
            if not source.names_columns():
                source = with_guessed_columns(source, _whole(row))  # the first good row decides
                counts.guessed = described(source)
            columns = columns_beside_prompt(_whole(row), source) if keeps_columns else {}
            record = replace(record_of(_whole(row), source, label), place=where, row=columns)
        except BadRowError as error:
            first_bad = first_bad or (where, error)
            counts.count_bad(f"{where}: {error.reason}")
        else:
            if len(verdicts) <= 2:
                verdicts.add(_verdict(_whole(row), source))
            yield record
        if strict and first_bad is not None and counts.bad < counts.read:
            raise _bad_row(*first_bad)
    if first_bad is not None and counts.bad == counts.read:
        raise _all_bad(*first_bad, label, counts.read, strict=strict)
    _expect_both_answers_to_win(verdicts, source, label)


def _whole(row: Mapping[str, Any] | BadRowError) -> Mapping[str, Any]:
    if isinstance(row, BadRowError):
        raise row
    return row


def _bad_row(where: str, error: BadRowError) -> DataError:
    skip = "set data.bad_rows=skip to leave such rows out"
    return DataError(f"{where}: {error.reason}", hint=f"{error.hint}; or {skip}" if error.hint else skip)


def _all_bad(where: str, error: BadRowError, label: str, num_rows: int, *, strict: bool) -> DataError:
    """Return the error for a source without any good row: skipping the bad ones would leave nothing."""
    reason = f"{where}: {error.reason}"
    if not strict:
        reason = f"{label}: none of its {num_rows:,} rows can be used; the first: {reason}"
    elif num_rows > 1:
        reason += f"; none of the {num_rows:,} rows can be used"
    return DataError(reason, hint=error.hint or "check the columns that the source names")


def _verdict(row: Mapping[str, Any], source: SourceConfig) -> Any:
    """Return the value of a preference that is read with the default values, as a number where it is one."""
    if source.preference is None or "preference_values" in source.model_fields_set:
        return None
    value = value_of(row, source.preference)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _expect_both_answers_to_win(verdicts: Set[Any], source: SourceConfig, label: str) -> None:
    """Refuse a column of 0 and 1, which under the default values means ties and first answers alone."""
    if verdicts == {0.0, 1.0}:
        raise DataError(
            f"{label}: {source.preference} holds 0 and 1 alone, and 1 and 2 are read as first and second answer",
            hint="set preference_values: [0, 1] if 1 means the second answer, [1, 0] if it means the first, "
            "or [1, 2] if 0 is a tie",
        )


def _smallest(records: Iterable[Record], limit: int) -> Iterator[Record]:
    """Yield the records with the smallest hashes, in their order; no others are held in memory."""
    chosen = heapq.nsmallest(limit, enumerate(records), key=lambda item: (item[1].row_id, item[0]))
    return iter([record for _, record in sorted(chosen, key=lambda item: item[0])])


def _rows(source: SourceConfig) -> Iterator[Placed]:
    """Return the rows with places that name the file: "rows.jsonl line 3"."""
    if is_labels(source.path):
        rows = label_rows(source.path, source.name)
        return (Placed(f"{label_of(source)} {place}", row) for place, row in rows)
    path = Path(source.path).expanduser()
    if path.is_file() and not is_table(path):
        raise DataError(
            f"{path}: a file of this kind cannot be read",
            hint=f"the kinds are {' '.join(SUFFIXES)}, plain or .gz",
        )
    if path.is_file():
        files = [path]
    elif path.is_dir() and not is_saved(path):
        files = _files_of_split(path, source.split)
    else:
        expect_there(source)
        rows = saved_rows(path, source.split) if path.is_dir() else hub_rows(source)
        return (Placed(f"{source.path} {place}", row) for place, row in rows)
    return (Placed(f"{file} {place}", row) for file in files for place, row in rows_of(file, source.encoding))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the tables of a split in a folder: train.jsonl, train-00000-of-00002.parquet, data/train.csv."""
    tables = sorted(file for place in (folder, folder / "data") for file in place.glob("*") if is_table(file))
    chosen = [file for file in tables if file.name.split(".")[0].split("-")[0] == split]
    if chosen:
        return chosen
    found = ", ".join(file.name for file in tables) or "no tables"
    raise DataError(
        f"{folder}: there is no table of the split {split} in it; it has {found}",
        hint="name one file as path, or set split to the beginning of a file's name",
    )
