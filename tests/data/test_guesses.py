from __future__ import annotations

from typing import Any

import pytest

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError
from dovetail.data.forms import record_of
from dovetail.data.guesses import with_guessed_columns
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
    ],
)
def test_common_column_names_need_not_be_said(row: dict[str, Any], expected: type) -> None:
    record = record_of(row, with_guessed_columns(SourceConfig(path="t"), row), "t")
    assert isinstance(record, expected)
    if isinstance(record, Comparison):
        assert (record.messages, record.answers) == ((user("a"),), ("b", "c"))
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
