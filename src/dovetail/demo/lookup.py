"""Find the task that a prompt asks, by its words.

Responsible for: the index that lets a reward function or an evaluation judge an answer from the prompt alone.
Not responsible for: the score (gold.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from dovetail.demo.families import all_tasks
from dovetail.demo.tasks import Task
from dovetail.demo.words import PREFIXES
from dovetail.errors import DataError
from dovetail.text.message import Message


def task_of(messages: Sequence[Message]) -> Task:
    """Return the task that a prompt asks. System messages and a user's opening prefix do not matter."""
    turns = tuple(turn["content"] for turn in messages if turn["role"] != "system")
    found = tasks_by_turns().get(turns)
    for prefix in PREFIXES:
        if found is None and turns and turns[0].startswith(prefix):
            found = tasks_by_turns().get((turns[0][len(prefix) :], *turns[1:]))
    if found is None:
        raise DataError(
            f"no generated task asks {' / '.join(turns)!r}",
            hint="the gold score is defined for prompts of dovetail.demo alone",
        )
    return found


@lru_cache(maxsize=1)
def tasks_by_turns() -> Mapping[tuple[str, ...], Task]:
    """Return all tasks by their turns."""
    return {task.turns: task for task in all_tasks()}
