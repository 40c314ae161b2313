"""The kinds of rows that stages learn from, as text.

Responsible for: what a row is, and what each stage takes from it.
Not responsible for: where it comes from (sources.py), or tokens (tokenize.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dovetail.text.content_hash import content_hash as content_hash
from dovetail.text.message import Message as Message
from dovetail.text.message import Role as Role
from dovetail.text.message import is_learnt as is_learnt
from dovetail.text.message import message as message

Kind = Literal["sft", "reward", "ppo", "text"]
"""The stage that a kind of row serves: demonstrations, comparisons, prompts or plain text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The fields that records of all kinds share."""

    row_id: str
    """A hash of the row's content, which is the same wherever the row stands."""
    source: str
    place: str = field(default="", compare=False)
    """The place of the row, for messages: "rows.jsonl line 3"."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row's columns beside the prompt, such as a reference answer; empty where the stage does not use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(_Row):
    """A conversation up to the point where the assistant must answer; `messages` and `row` are all it needs."""

    messages: tuple[Message, ...]
    row_id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration(_Row):
    """A conversation that ends with the assistant's turn; assistant turns are imitated unless marked."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(_Row):
    """A prompt with k answers, and the pairs of which one is better than the other."""

    messages: tuple[Message, ...]
    """The prompt."""
    answers: tuple[str, ...]
    better_than: tuple[tuple[int, int, float], ...]
    """Tuples (better, worse, margin): two indices into `answers`, and the margin that the source states, 0 where it
    states none. Ties are absent."""

    def best(self) -> int:
        """Return the index of the answer with the most wins minus losses; the first of equals."""
        return best_of(len(self.answers), [(better, worse) for better, worse, _ in self.better_than])


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(_Row):
    """Plain text, without turns."""

    text: str


Record = Prompt | Demonstration | Comparison | Text


def best_of(num_answers: int, pairs: Iterable[tuple[int, int]]) -> int:
    """Return the answer with the most wins minus losses in pairs (better, worse); the first of equals."""
    balance = [0] * num_answers
    for better, worse in pairs:
        balance[better] += 1
        balance[worse] -= 1
    return max(range(num_answers), key=balance.__getitem__)


def kinds_of(record: Record) -> tuple[Kind, ...]:
    """Return the kinds that a row can serve as."""
    served: dict[type[Record], tuple[Kind, ...]] = {
        Text: ("text",),
        Prompt: ("ppo",),
        Demonstration: ("sft", "ppo"),
        Comparison: ("sft", "reward", "ppo"),
    }
    return served[type(record)]


def as_demonstration(record: Record) -> Demonstration | None:
    """Return what supervised fine-tuning takes from a row; a comparison gives its best answer."""
    if isinstance(record, Demonstration):
        return record
    if isinstance(record, Comparison) and record.answers[record.best()].strip():
        answer = message("assistant", record.answers[record.best()])
        messages = (*record.messages, answer)
        return Demonstration(
            messages=messages, row_id=record.row_id, source=record.source, place=record.place
        )
    return None


def as_prompt(record: Record) -> Prompt | None:
    """Return what PPO takes from a row: the conversation before the last answer."""
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Text):
        return None
    turns = record.messages[:-1] if isinstance(record, Demonstration) else record.messages
    messages = tuple(message(turn["role"], turn["content"]) for turn in turns)
    return Prompt(
        messages=messages, row_id=record.row_id, source=record.source, place=record.place, row=record.row
    )


def prompt_key(record: Record) -> str:
    """Return a hash of the prompt alone: equal for all rows that answer the same one."""
    prompt = as_prompt(record)
    return record.row_id if prompt is None else content_hash(prompt.messages)
