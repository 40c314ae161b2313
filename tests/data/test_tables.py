from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from dovetail.data.columns import BadRowError
from dovetail.data.tables import is_table, rows_of
from dovetail.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a, "quoted"', "response": "line\nbreak"},
    {"prompt": "é ☃", "response": "b"},
]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_excel(path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(ROWS[0]))
    book.active.append([])
    for row in ROWS:
        book.active.append(list(row.values()))
    book.save(path)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "rows.ndjson": lambda path: path.write_text(f"\n{LINES}\n\n", encoding="utf-8"),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8"),
    "columns.json": lambda path: path.write_text(
        json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), encoding="utf-8"
    ),
    "lines.json": lambda path: path.write_text(LINES, encoding="utf-8"),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "rows.xlsx": write_excel,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert is_table(tmp_path / name)
    assert [row for _, row in rows_of(tmp_path / name)] == ROWS


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert [place for place, _ in rows_of(tmp_path / "a.jsonl")] == ["line 2", "line 4"]
    write_csv(tmp_path / "b.csv")  # the first row holds a line break
    assert [place for place, _ in rows_of(tmp_path / "b.csv")] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2", "not valid JSON: Expecting value at column 7"),
        (
            "a.jsonl",
            b'{"a": 1}\n[1]\n',
            "line 2",
            "a row should be an object with columns, but is a list: [1]",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2", "not UTF-8 at byte 8"),
        ("a.json", b'[{"a": 1}, 2]', "item 2", "a row should be an object with columns, but is int 2"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3", "3 cells under 2 column names"),
    ],
)
def test_a_malformed_row_is_told_with_its_place_and_the_rest_is_read(
    name: str, content: bytes, place: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(rows_of(tmp_path / name))
    assert len(rows) == 2
    assert rows[1].place == place
    assert isinstance(rows[1].row, BadRowError)
    assert rows[1].row.reason == reason


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', "a.json line 2 column 8: not valid JSON: Expecting value"),
        ("a.json", b"3", "a.json: should hold a list of rows, but holds int 3"),
        ("a.json", b'{"a": 1}', "a.json: should hold a list of rows, but holds an object: {'a': 1}"),
        ("a.json", b'["\xff"]', "a.json: cannot be read: 'utf-8' codec"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz: cannot be read: Compressed file ended",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99,
            "a.jsonl.gz: cannot be read: Error -3 while decompressing data",
        ),
        ("a.csv", b'a,b\n1,"2\n', "a.csv: cannot be read: unexpected end of data"),
        ("a.xlsx", b"no archive", "a.xlsx: not a valid Excel file"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a valid Parquet file"),
        ("a.arrow", b"ARROW1 and no more", "a.arrow: not a valid Arrow file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(rows_of(tmp_path / name))
    assert problem in caught.value.message
    assert caught.value.hint


def test_long_cells_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n{'x' * 300_000},y\n", encoding="utf-8")
    ((_, row),) = rows_of(tmp_path / "a.csv")
    assert not isinstance(row, BadRowError)
    assert len(row["a"]) == 300_000


CHINESE = [{"prompt": "你好世界", "response": "好的"}, {"prompt": "再见", "response": "再见"}]
CHINESE_FILES = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHINESE),
    "a.json": json.dumps(CHINESE, ensure_ascii=False),
    "a.csv": "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in CHINESE),
}


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "utf-8"])
@pytest.mark.parametrize("name", CHINESE_FILES)
def test_tables_in_other_encodings_are_read_if_these_are_named(
    name: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(CHINESE_FILES[name].encode(encoding))
    assert [placed.row for placed in rows_of(tmp_path / name, encoding)] == CHINESE


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("gb18030", "gb18030"), ("gbk", "gb18030"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le")],
)
@pytest.mark.parametrize("name", CHINESE_FILES)
def test_another_encoding_is_told_by_its_bytes(name: str, encoding: str, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CHINESE_FILES[name].encode(encoding))
    try:
        first = next(rows_of(tmp_path / name)).row
        assert isinstance(first, BadRowError)
        hint = first.hint
    except DataError as error:
        hint = error.hint
    assert f"set encoding: {named}" in str(hint)
