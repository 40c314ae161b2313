from __future__ import annotations

import pytest

from dovetail.demo.families import all_tasks
from dovetail.demo.lookup import task_of
from dovetail.demo.words import PREFIXES
from dovetail.errors import DataError


def test_every_task_is_found_again_from_its_messages() -> None:
    for task in all_tasks():
        assert task_of(task.messages()) == task
        if task.may_take_prefix:
            assert all(task_of(task.messages(prefix)) == task for prefix in PREFIXES)


def test_a_system_message_does_not_matter() -> None:
    task = all_tasks()[0]
    assert task_of([{"role": "system", "content": "Be brief."}, *task.messages()]) == task


def test_an_unknown_prompt_is_an_error_that_quotes_it() -> None:
    with pytest.raises(DataError, match="What is the meaning of life"):
        task_of([{"role": "user", "content": "What is the meaning of life?"}])


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no generated task"):
        task_of([])
