from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.columns import (
    BadRowError,
    columns_beside_prompt,
    list_of,
    number_of,
    parsed,
    text_of,
    value_of,
)
from tests.data.files import assistant, user

ROW = {
    "plain": "x",
    "a.b": "dotted name",
    "nested": {"text": "inside", "list": [{"t": "first"}, {"t": "second"}]},
    "table": {"t": ["one", "two"]},
    "none": None,
}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("plain", "x"),
        ("a.b", "dotted name"),
        ("nested.text", "inside"),
        ("nested.list[1].t", "second"),
        ("nested.list[].t", ["first", "second"]),
        ("table[].t", ["one", "two"]),
        ("none?", None),
        ("nested.list[7].t?", None),
        ("absent?", None),
    ],
)
def test_paths_reach_nested_values(column: str, value: Any) -> None:
    assert value_of(ROW, column) == value


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    with pytest.raises(BadRowError, match=r"there is no column plian; the row has plain, a\.b") as caught:
        value_of(ROW, "plian")
    assert caught.value.hint == "did you mean plain?"


def test_null_is_an_error_unless_it_may_be_absent() -> None:
    with pytest.raises(BadRowError, match="none is null"):
        value_of(ROW, "none")


def test_a_table_kept_as_columns_has_as_many_items_in_each() -> None:
    with pytest.raises(BadRowError, match=r"t\[\]\.a takes items from lists of different lengths"):
        value_of({"t": {"a": [1, 2], "b": [1]}}, "t[].a")


def test_numbers_count_as_text_but_lists_do_not() -> None:
    assert text_of({"a": 42}, "a") == "42"
    with pytest.raises(BadRowError, match=r"a should be text, but is a list: \['x'\]"):
        text_of({"a": ["x"]}, "a")


@pytest.mark.parametrize("value", ["high", None, [1], float("nan"), float("inf"), 10**400])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(BadRowError, match=r"score should be a (finite )?number"):
        number_of(value, "score")


def test_lists_come_from_columns_one_column_or_json_text() -> None:
    assert list_of({"a": 1, "b": 2}, ("a", "b")) == [1, 2]
    assert list_of({"a": [1, 2]}, "a") == [1, 2]
    assert list_of({"a": "[1, 2]"}, "a") == [1, 2]
    with pytest.raises(BadRowError, match="a should be a list, but is the text 'x'"):
        list_of({"a": "x"}, "a")


def test_text_that_only_looks_like_json_stays_text() -> None:
    assert parsed("[INST] hi") == "[INST] hi"
    assert parsed("hi") == "hi"


def test_an_empty_cell_of_pandas_is_absent() -> None:
    assert value_of({"a": float("nan")}, "a?") is None
    with pytest.raises(BadRowError, match="a is null"):
        value_of({"a": float("nan")}, "a")


@pytest.mark.parametrize(
    ("value", "text"),
    [(42.0, "42"), (-3.0, "-3"), (0.5, "0.5"), (1e300, "1e+300"), (7, "7"), (10**400, f"1{'0' * 400}")],
)
def test_whole_numbers_have_no_point(value: Any, text: str) -> None:
    assert text_of({"a": value}, "a") == text


def test_a_list_as_python_prints_it_is_a_list() -> None:
    assert parsed("[{'role': 'user', 'content': \"it's\"}]") == [{"role": "user", "content": "it's"}]
    assert list_of({"a": "['x', None]"}, "a") == ["x", None]
    assert parsed("['x', \\d]") == "['x', \\d]"
    assert parsed("{[1]: 2}") == "{[1]: 2}"


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [
        ({"prompt": "q"}, {"q"}),
        ({"prompt": "q", "response": "a"}, {"q"}),
        ({"prompt": ("q", "more?"), "system": "s?"}, {"q", "more", "s"}),
        ({"prompt": "nested.question"}, set()),
        ({"messages": "m"}, set()),
    ],
)
def test_all_columns_but_the_prompts_own_stay_beside_it(columns: dict[str, Any], left_out: set[str]) -> None:
    row = {
        "q": "2+2?", "a": "4", "s": "Be brief.", "more": "soon", "m": [user("2+2?"), assistant("4")],
        "nested": {"question": "2+2?", "level": 3}, "tests": ["f(2) == 4"], "right": True, "weight": 0.5,
    }  # fmt: skip
    kept = columns_beside_prompt(row, SourceConfig(path="t", **columns))
    assert kept == {name: value for name, value in row.items() if name not in left_out}


@pytest.mark.parametrize(
    "value", [datetime(2026, 1, 1), b"png", {3: "a"}, ["fine", object()], {"deep": [{"x": b""}]}]
)
def test_values_that_json_has_no_form_for_do_not_stay(value: Any) -> None:
    assert columns_beside_prompt({"q": "?", "odd": value, "a": 1}, SourceConfig(path="t", prompt="q")) == {
        "a": 1
    }


def test_an_empty_cell_beside_the_prompt_is_none() -> None:
    row = {"q": "?", "a": float("nan"), "b": None}
    assert columns_beside_prompt(row, SourceConfig(path="t", prompt="q")) == {"a": None, "b": None}
