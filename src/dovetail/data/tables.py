"""Read tables on disk as rows, each with its place.

Responsible for: JSON, JSON lines, CSV, TSV, Excel, Parquet and Arrow files, plain or gzipped, and what is malformed in
them.
Not responsible for: hub names and saved data sets (hub.py), or what the columns hold (forms.py).

Rows come one at a time: only a JSON file, which has no rows to stop at, is read whole.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from dovetail.data.columns import BadRowError, describe
from dovetail.errors import DataError
from dovetail.text_file import UTF_8, seeming_encoding

_SAMPLE = 1 << 20
"""The number of bytes of a file from which its encoding is guessed."""
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx", ".parquet", ".arrow")


class Placed(NamedTuple):
    """A row, or the reason why there is none, and its place: "line 3"."""

    place: str
    row: Mapping[str, Any] | BadRowError


def is_table(path: Path) -> bool:
    """Return whether the name is that of a file that can be read."""
    return _suffix(path) in SUFFIXES


def rows_of(file: Path, encoding: str = "utf-8") -> Iterator[Placed]:
    """Yield all rows of one file. An unknown suffix means JSON lines.

    encoding: the encoding of tables that are text. Raises DataError if the file cannot be read at all.
    """
    if codecs.lookup(encoding).name == "utf-8":
        encoding = UTF_8
    readers: dict[str, Callable[[Path], Iterator[Placed]]] = {
        ".json": partial(_json_rows, encoding=encoding),
        ".csv": partial(_csv_rows, encoding=encoding),
        ".tsv": partial(_csv_rows, encoding=encoding),
        ".xlsx": _excel_rows,
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
    }
    read = readers[_suffix(file)] if _suffix(file) in readers else partial(_json_lines, encoding=encoding)
    try:
        yield from read(file)
    except (OSError, EOFError, zlib.error, UnicodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}", hint=_remedy(file, encoding)) from error


def _remedy(file: Path, encoding: str) -> str:
    """Return the hint for a file that cannot be read, whose bytes may show why."""
    content = b""
    with contextlib.suppress(OSError, EOFError, zlib.error), _open(file) as stream:
        content = stream.read(_SAMPLE)
    found = seeming_encoding(content)
    if found is None or found == encoding:
        return "check that the file is whole, in UTF-8 or in the encoding that the source names, and readable"
    return f"it seems to be {found}: set encoding: {found} for the source, or save the file in UTF-8"


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _json_lines(file: Path, encoding: str) -> Iterator[Placed]:
    with _open(file) as stream:
        lines: Iterable[bytes | str] = stream
        if encoding != UTF_8:
            lines = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Placed(f"line {number}", _json_row(line))


def _json_row(line: bytes | str) -> Mapping[str, Any] | BadRowError:
    if isinstance(line, bytes) and b"\0" in line:  # as every second byte of UTF-16 is, which is valid UTF-8
        return _not_utf_8(line, line.index(b"\0"))
    try:
        text = line.decode(UTF_8) if isinstance(line, bytes) else line.removeprefix("\ufeff")
        value = json.loads(text.rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _not_utf_8(error.object, error.start)
    except json.JSONDecodeError as error:
        return BadRowError(
            f"not valid JSON: {error.msg} at column {error.colno}",
            hint="each line must be one whole JSON object",
        )
    return _as_row(value)


def _not_utf_8(line: bytes, place: int) -> BadRowError:
    found = seeming_encoding(line)
    if found is None:
        return BadRowError(f"not UTF-8 at byte {place + 1}", hint="save the file in UTF-8")
    return BadRowError(
        f"not UTF-8 at byte {place + 1}; it seems to be {found}",
        hint=f"set encoding: {found} for the source, or save the file in UTF-8",
    )


def _as_row(value: Any) -> Mapping[str, Any] | BadRowError:
    if isinstance(value, dict):
        return value
    return BadRowError(f"a row should be an object with columns, but is {describe(value)}")


def _json_rows(file: Path, encoding: str) -> Iterator[Placed]:
    with _open(file) as stream:
        text = stream.read().decode(encoding)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name of JSON, as many hub files are
            yield from _json_lines(file, encoding)
            return
        where = f"line {error.lineno} column {error.colno}"
        raise DataError(
            f"{file} {where}: not valid JSON: {error.msg}",
            hint="repair the file there; `python -m json.tool FILE` checks it",
        ) from error
    for number, item in enumerate(_items(value, file), start=1):
        yield Placed(f"item {number}", _as_row(item))


def _items(value: Any, file: Path) -> list[Any]:
    """Return the rows of a JSON document: a list, the only list of an object, or an object with one list per column."""
    if isinstance(value, list):
        return value
    lists = (
        {name: part for name, part in value.items() if isinstance(part, list)}
        if isinstance(value, dict)
        else {}
    )
    if len(lists) == 1 and all(isinstance(item, dict) for part in lists.values() for item in part):
        return next(iter(lists.values()))
    if lists and len(lists) == len(value) and len({len(part) for part in lists.values()}) == 1:
        return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    raise DataError(
        f"{file}: should hold a list of rows, but holds {describe(value)}",
        hint='write [{"prompt": ..., "response": ...}, ...], or one object a line in a .jsonl file',
    )


def _csv_rows(file: Path, encoding: str) -> Iterator[Placed]:
    csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # the default of 128 KiB is less than a long conversation
    with _open(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline="") as text:
        table = csv.reader(text, delimiter="\t" if _suffix(file) == ".tsv" else ",", strict=True)
        header = next(table, None)
        if header is None:
            return
        line = table.line_num + 1
        for cells in table:
            if cells:
                yield Placed(f"line {line}", _csv_row(header, cells))
            line = table.line_num + 1


def _csv_row(header: list[str], cells: list[str]) -> Mapping[str, Any] | BadRowError:
    if len(cells) != len(header):
        return BadRowError(
            f"{len(cells)} cells under {len(header)} column names",
            hint="put text with commas, quotes or line breaks in double quotes",
        )
    return dict(zip(header, cells, strict=True))


def _excel_rows(file: Path) -> Iterator[Placed]:
    """Yield the rows of the first sheet, under the names in its first row; empty rows are left out."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise DataError(
            f"{file}: reading Excel files needs the package openpyxl, which is not installed",
            hint="pip install openpyxl, or save the sheet as CSV in UTF-8",
        ) from error
    try:
        with _open(file) as stream:
            book = load_workbook(io.BytesIO(stream.read()), read_only=True, data_only=True)
    except (ValueError, KeyError, zipfile.BadZipFile, InvalidFileException) as error:
        raise DataError(
            f"{file}: not a valid Excel file: {error}", hint="save it again as .xlsx, or as CSV in UTF-8"
        ) from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    names = [str(name) for name in next(rows, ())]
    for number, cells in enumerate(rows, start=2):
        if any(cell is not None for cell in cells):
            yield Placed(f"row {number}", dict(zip(names, cells, strict=False)))


def _parquet_rows(file: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        batches = table.iter_batches(batch_size=1_000)
        yield from _from_batches(batches)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{file}: not a valid Parquet file: {error}", hint="download or write it again"
        ) from error


def _arrow_rows(file: Path) -> Iterator[Placed]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                yield from _from_batches(iter(pyarrow.ipc.open_stream(source)))
            except pyarrow.ArrowInvalid:  # the other of the two formats with this name
                whole = pyarrow.ipc.open_file(source)
                yield from _from_batches(whole.get_batch(i) for i in range(whole.num_record_batches))
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{file}: not a valid Arrow file: {error}", hint="download or write it again"
        ) from error


def _from_batches(batches: Iterator[Any]) -> Iterator[Placed]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Placed(f"row {number}", row)
