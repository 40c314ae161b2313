"""A file of prompts: what is read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.errors import DataError
from dovetail.serving.inference.prompt_file import read_prompts


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "a row should be an object with columns, but is a list: []"),
        ('{"id": 1}', "neither `prompt` nor `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "both `prompt` and `messages`"),
        ('{"messages": [{"role": "robot", "content": "b"}]}', "messages[0] has the role 'robot'"),
        ('{"messages": []}', "messages should be a list of messages, but is a list: []"),
        ('{"prompt": "a", "answer": "b"}', "has a column `answer` already"),
        ('{"prompt": "a", "finish_reason": "stop"}', "has a column `finish_reason` already"),
        (r'{"prompt": "a", "id": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(file)
    assert f"{file}, line 2: " in caught.value.message
    assert says in caught.value.message


def test_a_file_without_prompts_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, says in (("empty", "has no prompts"), ("none", "cannot be read")):
        with pytest.raises(DataError, match=says):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"prompt": "Human: hi\n\nAssistant:"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": '[{"role": "user", "content": "hi"}]'},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"input": {"messages": [{"role": "user", "content": "hi"}]}},
        {"instruction": "hi", "input": ""},
        {"question": "hi", "id": 7},
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_prompt_may_have_every_form_that_training_takes(
    tmp_path: Path, row: dict[str, Any], mark: str
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(mark + json.dumps(row) + "\n", encoding="utf-8")
    (prompt,) = read_prompts(file)
    assert prompt.conversation == [{"role": "user", "content": "hi"}]
    assert prompt.columns == row
    assert prompt.where == f"{file}, line 1"


def test_tables_of_other_kinds_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,prompt\n1,hi\n", encoding="utf-8")
    (prompt,) = read_prompts(tmp_path / "in.csv")
    assert (prompt.columns, prompt.where) == ({"id": "1", "prompt": "hi"}, f"{tmp_path}/in.csv, line 2")
