"""A file of prompts: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.errors import DataError
from dovetail.inference.prompt_file import read_prompts


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"),
        ("[]", "dictionary"),
        ('{"id": 1}', "neither `prompt` nor `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "both `prompt` and `messages`"),
        ('{"messages": [{"role": "robot", "content": "b"}]}', "'user'"),
        ('{"messages": []}', "at least 1"),
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
