from __future__ import annotations

from typing import Any

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError
from dovetail.data.forms import record_of
from dovetail.data.guesses import described, with_guessed_columns
from dovetail.data.records import Comparison, Demonstration, Prompt, Text
from tests.data.files import assistant, system, user


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Comparison),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, Comparison),
        ({"messages": [user("a"), assistant("b")], "id": 7}, Demonstration),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Demonstration),
        ({"prompt": "a", "completion": "b"}, Demonstration),
        ({"prompt": "a"}, Prompt),
        ({"text": "a"}, Text),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, Comparison),
        (
            {
                "input": {"messages": [user("a")]},
                "preferred_output": [assistant("b")],
                "non_preferred_output": [assistant("c")],
            },
            Comparison,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            Comparison,
        ),
        ({"messages": [user("a"), assistant("b")], "rejected_response": "c"}, Comparison),
        (
            {"messages": [user("a"), assistant("b")], "rejected_messages": [user("a"), assistant("c")]},
            Comparison,
        ),
        ({"system": "", "question": "a", "chosen": "b", "rejected": "c"}, Comparison),
        ({"instruction": "a", "input": "", "output": "b"}, Demonstration),
        ({"instruction": "a", "output": "b"}, Demonstration),
        ({"question": "a", "answer": "b"}, Demonstration),
        ({"kind": "QA", "input": "a", "target": "b"}, Demonstration),
        ({"instruction": "a", "input": "", "output": "b", "history": []}, Demonstration),
        (
            {
                "instruction": "a",
                "completions": [
                    {"model": "m", "response": "b", "overall_score": 7.5},
                    {"model": "n", "response": "c", "overall_score": 2.0},
                ],
            },
            Comparison,
        ),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0}, Comparison),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": -1}, Comparison),
        ({"context": [user("a")], "response1": "b", "response2": "c", "overall_preference": -2}, Comparison),
        ({"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.2}, Comparison),
        ({"prompt": "a", "answers": ["b", "c"], "scores": [0.9, 0.1]}, Comparison),
    ],
)
def test_common_column_names_need_not_be_said(row: dict[str, Any], expected: type) -> None:
    record = record_of(row, with_guessed_columns(SourceConfig(path="t"), row), "t")
    assert isinstance(record, expected)
    if isinstance(record, Comparison):
        assert (record.messages, record.answers) == ((user("a"),), ("b", "c"))
        assert record.better_than == ((0, 1, 0.0),)
    if isinstance(record, Demonstration):
        assert record.messages == (user("a"), assistant("b"))


def test_uncommon_column_names_must_be_said() -> None:
    with pytest.raises(
        BadRowError, match=r"the source names no columns, and those of the row .*: frage, antwort"
    ):
        with_guessed_columns(SourceConfig(path="t"), {"frage": "a", "antwort": "b"})


def test_a_system_column_is_seen() -> None:
    row = {"prompt": "a", "response": "b", "system": "Be kind."}
    record = record_of(row, with_guessed_columns(SourceConfig(path="t"), row), "t")
    assert isinstance(record, Demonstration)
    assert record.messages[0] == system("Be kind.")


def test_the_second_answer_wins_where_the_verdict_says_so() -> None:
    for row in (
        {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1},
        {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 2},
        {"context": "a", "response1": "b", "response2": "c", "overall_preference": 1},
    ):
        record = record_of(row, with_guessed_columns(SourceConfig(path="t"), row), "t")
        assert isinstance(record, Comparison)
        assert record.better_than == ((1, 0, 0.0),)


def test_earlier_turns_are_pairs_or_messages() -> None:
    expected = (user("a"), assistant("b"), user("c"), assistant("d"))
    for history in ([["a", "b"]], [user("a"), assistant("b")], '[["a", "b"]]'):
        row = {"instruction": "c", "input": "", "output": "d", "history": history, "system": None}
        record = record_of(row, with_guessed_columns(SourceConfig(path="t"), row), "t")
        assert isinstance(record, Demonstration)
        assert record.messages == expected


def test_what_is_guessed_is_said_as_settings() -> None:
    row = {"instruction": "a", "input": "", "output": "b", "history": []}
    guessed = with_guessed_columns(SourceConfig(path="t"), row)
    assert described(guessed) == "prompt: [instruction, input?], response: output, history: history?"


def test_turns_and_system_messages_that_the_first_row_lacks_are_read() -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be kind."},
    ]
    source = with_guessed_columns(SourceConfig(path="t"), rows[0])
    records = [record_of(row, source, "t") for row in rows]
    assert [turn["content"] for turn in records[0].messages] == ["a", "b"]  # type: ignore[union-attr]
    assert [turn["content"] for turn in records[1].messages] == ["Be kind.", "a", "b", "c", "d"]  # type: ignore[union-attr]
