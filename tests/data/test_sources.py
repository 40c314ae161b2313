from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.report import Tally
from dovetail.data.sources import label_of, read_source
from dovetail.errors import DataError
from tests.data.files import questions, write_jsonl


def source(path: Any, **columns: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **{"prompt": "prompt", "response": "response", **columns})


def error_of(given: SourceConfig, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_source(given, **options))
    assert caught.value.hint
    return caught.value


def test_rows_become_records_in_order(tmp_path: Path) -> None:
    records = list(read_source(source(write_jsonl(tmp_path / "a.jsonl", questions(5)))))
    assert [record.messages[0]["content"] for record in records] == [f"q {i}?" for i in range(5)]  # type: ignore[union-attr]


def test_strict_stops_at_the_first_bad_row_with_file_line_and_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(2), {"prompt": "q"}])
    error = error_of(source(path))
    assert error.message == f"{path} line 3: there is no column response; the row has prompt"
    assert "data.bad_rows=skip" in str(error.hint)


def test_to_skip_is_proposed_only_where_a_good_row_is_left(tmp_path: Path) -> None:
    bad = [{"prompt": "q"}] * 3
    error = error_of(source(write_jsonl(tmp_path / "a.jsonl", bad)))
    assert error.message.startswith(f"{tmp_path}/a.jsonl line 1: there is no column response")
    assert "none of the 3 rows can be used" in error.message
    assert "bad_rows" not in str(error.hint)
    error = error_of(source(write_jsonl(tmp_path / "b.jsonl", [*bad, *questions(1)])))
    assert error.message == f"{tmp_path}/b.jsonl line 1: there is no column response; the row has prompt"
    assert "data.bad_rows=skip" in str(error.hint)


@pytest.mark.parametrize("values", [(1, 0), ("0", "1"), (False, True), (0.0, 1.0, 1)])
def test_a_preference_of_0_and_1_is_not_read_as_one_of_1_and_2(
    values: tuple[Any, ...], tmp_path: Path
) -> None:
    rows = [{"prompt": "q", "a": f"x {i}", "b": "y", "w": value} for i, value in enumerate(values)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns: dict[str, Any] = {"prompt": "prompt", "answers": ("a", "b"), "preference": "w"}
    error = error_of(SourceConfig(path=path, **columns), strict=False)
    assert error.message.startswith(f"{path}: w holds 0 and 1 alone")
    assert "preference_values: [0, 1]" in str(error.hint)
    for settled in ((0, 1), (1, 2)):
        assert len(list(read_source(SourceConfig(path=path, preference_values=settled, **columns)))) == len(
            rows
        )


def test_records_know_where_they_stand(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(2))
    assert [record.place for record in read_source(source(path))] == [f"{path} line 1", f"{path} line 2"]


def test_a_wrong_column_says_which_was_meant(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(2))
    error = error_of(source(path, response="reponse"))
    assert "line 1: there is no column reponse" in error.message
    assert "did you mean response?" in str(error.hint)


def test_skip_counts_bad_rows_and_quotes_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"prompt": "q"}] * 5 + questions(2))
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": \n', encoding="utf-8")
    tally = Tally()
    assert len(list(read_source(source(file), strict=False, tally=tally))) == 2
    assert (tally.read, tally.bad, len(tally.first_bad)) == (8, 6, 3)
    assert tally.first_bad[0] == f"{file} line 1: there is no column response; the row has prompt"


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(1), {"prompt": "q", "response": "a \ud83d"}])
    reason = f"{path} line 2: response holds half a surrogate pair, which is not a character"
    assert error_of(source(path)).message == reason
    tally = Tally()
    assert len(list(read_source(source(path), strict=False, tally=tally))) == 1
    assert (tally.bad, tally.first_bad) == (1, [reason])


def test_a_source_of_nothing_but_bad_rows_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(4))
    assert (
        "none of its 4 rows can be used; the first"
        in error_of(source(path, response="x"), strict=False).message
    )


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt,response\n")]
)
def test_an_empty_data_set_is_an_error(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert "there are no rows in it" in error_of(source(tmp_path / name)).message


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", questions(1))
    error = error_of(source(tmp_path / "row.jsonl"))
    assert error.message == f"{tmp_path}/row.jsonl: there is no such file"
    assert error.hint == f"did you mean {tmp_path}/rows.jsonl?"


def test_an_unknown_short_name_lists_the_registered_ones() -> None:
    error = error_of(SourceConfig(path="qwertz"))
    assert "nor a data set registered under this name" in error.message
    assert "rm-static" in str(error.hint)
    assert error_of(SourceConfig(path="rm-statik")).hint == "did you mean rm-static?"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.docx").write_bytes(b"PK")
    assert "a file of this kind cannot be read" in error_of(source(tmp_path / "rows.docx")).message


def test_a_folder_of_tables_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", questions(2))
    write_jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", questions(2, "r"))
    write_jsonl(tmp_path / "data" / "test.jsonl", questions(1, "t"))
    assert len(list(read_source(source(tmp_path)))) == 4
    assert len(list(read_source(source(tmp_path, split="test")))) == 1
    missing = error_of(source(tmp_path, split="dev")).message
    assert re.search(r"no table of the split dev in it; it has test.jsonl, train-00000", missing)


def test_a_saved_folder_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(questions(3)).save_to_disk(tmp_path / "saved")
    assert len(list(read_source(source(tmp_path / "saved")))) == 3
    bad = error_of(source(tmp_path / "saved", response="x"))
    assert bad.message.startswith(f"{tmp_path}/saved row 1: there is no column x")


def test_a_limit_chooses_the_same_rows_in_any_order(tmp_path: Path) -> None:
    rows = questions(50)
    forward = source(write_jsonl(tmp_path / "a.jsonl", rows), limit=7)
    backward = source(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), limit=7)
    first, second = ([record.row_id for record in read_source(given)] for given in (forward, backward))
    everything = sorted(record.row_id for record in read_source(source(tmp_path / "a.jsonl")))
    assert sorted(first) == sorted(second) == everything[:7]
    assert first == second[::-1]


def test_labels_tell_sources_apart() -> None:
    assert label_of(SourceConfig(path="a/b", name="c", split="test")) == "a/b c test"
    assert label_of(SourceConfig(path="a.jsonl")) == "a.jsonl"
