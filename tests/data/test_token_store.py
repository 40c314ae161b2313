from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.data import token_store
from dovetail.data.token_store import ColumnWriter, default_cache_dir, key_of, stored
from dovetail.errors import DataError

DTYPES: dict[str, Any] = {"tokens": np.int32, "mask": np.bool_, "margins": np.float32}


def writing(count: int, calls: list[int] | None = None) -> Callable[[ColumnWriter], dict[str, Any]]:
    def write(writer: ColumnWriter) -> dict[str, Any]:
        if calls is not None:
            calls.append(count)
        for i in range(count):
            writer.append("tokens", [i, i + 1])
            writer.append("mask", [True, False])
        return {"count": count}

    return write


def test_columns_come_back_as_written_whatever_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "_BUFFER", 7)
    columns, facts = stored(str(tmp_path), "k", DTYPES, writing(100))
    assert facts == {"count": 100}
    assert columns["tokens"].tolist() == [j for i in range(100) for j in (i, i + 1)]
    assert columns["mask"].tolist() == [True, False] * 100
    assert columns["margins"].tolist() == []
    assert {name: column.dtype for name, column in columns.items()} == DTYPES
    assert np.load(tmp_path / "k" / "tokens.npy").tolist() == columns["tokens"].tolist()


def test_columns_are_mapped_and_not_read(tmp_path: Path) -> None:
    columns, _ = stored(str(tmp_path), "k", DTYPES, writing(10))
    assert isinstance(columns["tokens"], np.memmap)
    assert not columns["tokens"].flags.writeable


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    calls: list[int] = []
    stored(str(tmp_path), "k", DTYPES, writing(3, calls))
    columns, facts = stored(str(tmp_path), "k", DTYPES, writing(5, calls))
    assert (calls, facts, len(columns["tokens"])) == ([3], {"count": 3}, 6)


@pytest.mark.parametrize("damage", ["delete", "cut", "cut header", "facts"])
def test_a_damaged_entry_is_written_anew(damage: str, tmp_path: Path) -> None:
    stored(str(tmp_path), "k", DTYPES, writing(50))
    file = tmp_path / "k" / ("facts.json" if damage == "facts" else "tokens.npy")
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[: {"cut": -8, "cut header": 40, "facts": 3}[damage]])
    columns, facts = stored(str(tmp_path), "k", DTYPES, writing(4))
    assert (facts, len(columns["tokens"])) == ({"count": 4}, 8)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(writer: ColumnWriter) -> dict[str, Any]:
        writer.append("tokens", [1])
        raise DataError("a bad row")

    with pytest.raises(DataError, match="a bad row"):
        stored(str(tmp_path), "k", DTYPES, write)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_folder_and_leaves_other_entries(tmp_path: Path) -> None:
    stored(str(tmp_path), "first", DTYPES, writing(2))

    def write(writer: ColumnWriter) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError) as caught:
        stored(str(tmp_path), "second", DTYPES, write)
    assert caught.value.message == f"the disk is full: the token cache in {tmp_path} cannot be written"
    assert "data.cache_dir" in str(caught.value.hint)
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"the token cache in .*file/cache cannot be written: Not a directory"
    ):
        stored(str(tmp_path / "file" / "cache"), "k", DTYPES, writing(1))


def test_of_two_writers_the_first_wins(tmp_path: Path) -> None:
    def write(writer: ColumnWriter) -> dict[str, Any]:
        stored(str(tmp_path), "k", DTYPES, writing(3))  # another process, faster
        return writing(5)(writer)

    _, facts = stored(str(tmp_path), "k", DTYPES, write)
    assert facts == {"count": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["k"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".partial-old", 2), (".partial-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.npy").write_bytes(b"x")
        moment = time.time() - age * 24 * 3600
        os.utime(tmp_path / name / "tokens.npy", (moment, moment))
    stored(str(tmp_path), "k", DTYPES, writing(1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".partial-new", "k"]


def test_keys_differ_with_every_part() -> None:
    assert key_of("a", 1) == key_of("a", 1)
    assert len({key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a", 1, None)}) == 4


def test_the_cache_is_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "dovetail" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "dovetail" / "tokens"
