"""The tasks that `KIND=SOURCE` names.

Responsible for: the kinds of tasks, and the rows of a source for one of them. Not responsible for: the tasks (beside
this file), reading sources (data/).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import ValidationError

from dovetail.config.data import DataConfig, SourceConfig, spelt_out
from dovetail.config.explain import config_error
from dovetail.config.load import parse_value
from dovetail.data.blend import load_stage
from dovetail.data.records import Comparison, Kind, Prompt, Text
from dovetail.errors import ConfigError, DataError
from dovetail.rlhf.reward_functions import load_reward_function
from dovetail.rlhf.tasks.pairs import Pairs
from dovetail.rlhf.tasks.squad import Squad, question_of
from dovetail.rlhf.tasks.subject import Drawing, Task
from dovetail.rlhf.tasks.texts import Texts
from dovetail.rlhf.tasks.verified import Verified
from dovetail.rlhf.verifiers.builtin import VERIFIERS

KINDS = ("prompts", "text", "pairs", "squad")
"""The kinds of tasks beside those of a verifier, which have its name."""


@dataclass(frozen=True, slots=True)
class TaskName:
    """A task as it is asked for."""

    kind: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind}={self.source}"

    @property
    def short(self) -> str:
        """The name in metrics, made of the kind and the file's name."""
        kind = self.kind.rpartition(":")[2]
        return f"{kind}_{Path(self.source).name.partition('.')[0]}"


def parse_task(text: str) -> TaskName:
    """Return the task that `KIND=SOURCE` names, or a source alone, which is one of prompts.

    Raises ConfigError for a kind that is none.
    """
    kind, equals, source = text.partition("=")
    if not equals or kind.startswith("{"):
        return TaskName("prompts", text)
    if kind not in KINDS and kind not in VERIFIERS and ":" not in kind:
        near = get_close_matches(kind, [*KINDS, *VERIFIERS], n=1)
        raise ConfigError(
            f"--task {text}: {kind!r} is not a kind of task",
            hint=f"{f'did you mean {near[0]}? ' if near else ''}write one of {', '.join([*KINDS, *VERIFIERS])}, or "
            "path/to/file.py:function",
        )
    return TaskName(kind, source)


def load_task(name: TaskName, drawing: Drawing, *, limit: int) -> Task:
    """Load a task for language models: plain text, SQuAD, or prompts with right and wrong answers.

    limit: the most rows. Raises DataError naming the row that cannot be used.
    """
    if name.kind == "text":
        return Texts(str(name), [row.text for row in rows_of_source(name.source, "text", limit)])
    if name.kind == "squad":
        rows = rows_of_source(name.source, "ppo", limit, prompt="question")
        return Squad(str(name), [question_of(row) for row in rows])
    scorer = load_reward_function(name.kind)
    return Verified(str(name), rows_of_source(name.source, "ppo", limit), scorer, drawing)


def load_training_tasks(texts: Sequence[str], drawing: Drawing, *, limit: int) -> dict[str, Task]:
    """Load the tasks of `ppo.eval_tasks` by their names in metrics. Raises ConfigError for one that compares models."""
    tasks: dict[str, Task] = {}
    for text in texts:
        name = parse_task(text)
        if name.kind in ("prompts", "pairs") or name.short in tasks:
            reason = (
                "two tasks of this name" if name.short in tasks else "a task that compares finished models"
            )
            raise ConfigError(
                f"ppo.eval_tasks lists {text}: {reason}",
                hint="list text=FILE, squad=FILE or VERIFIER=FILE, each file once",
            )
        tasks[name.short] = load_task(name, drawing, limit=limit)
    return tasks


def load_pairs(name: TaskName, *, limit: int) -> Pairs:
    """Load comparisons for reward models."""
    return Pairs(str(name), rows_of_source(name.source, "reward", limit))


@overload
def rows_of_source(text: str, kind: Literal["ppo"], limit: int, **columns: str) -> list[Prompt]: ...
@overload
def rows_of_source(text: str, kind: Literal["reward"], limit: int, **columns: str) -> list[Comparison]: ...
@overload
def rows_of_source(text: str, kind: Literal["text"], limit: int, **columns: str) -> list[Text]: ...
def rows_of_source(text: str, kind: Kind, limit: int, **columns: str) -> list[Any]:
    """Return at most `limit` rows of a source, written as in data.blend, always the same ones.

    columns: those that the task needs under these names, where the source does not say.
    """
    value = parse_value(text, "--task") if text.startswith("{") else text
    given = columns | (spelt_out(value) if isinstance(value, str) else value)
    stages = None if kind == "text" else (kind,)
    try:
        source = SourceConfig.model_validate(given | {"held_out": True, "stages": stages})
    except ValidationError as error:
        raise config_error(error, SourceConfig, {}) from error
    place = "pretraining" if kind == "text" else "blend"
    data = DataConfig.model_validate({place: (source,), "max_eval_rows": limit})
    rows = list(load_stage(data, kind, "held_out"))
    if not rows:
        needs = {
            "ppo": "prompts",
            "reward": "comparisons: chosen and rejected, or answers with scores",
            "text": "text",
        }
        raise DataError(f"--task {text}: no row can be used", hint=f"the task needs {needs[kind]}")
    return rows
