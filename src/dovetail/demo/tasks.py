"""One question to the assistant, with every answer that counts as right.

Responsible for: the record of a task, and which tasks are held out.
Not responsible for: which questions there are (families.py), or the score of an answer (gold.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dovetail.text.message import Message, message

HELD_OUT_PERCENT = 12
"""The share of the keys that no stage of training ever sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A question, or a short conversation that ends with one, and every answer that counts as right."""

    family: str
    """The kind of question; tasks of one family are learnt together."""
    key: str
    """The question regardless of its wording: the unit that is held out."""
    turns: tuple[str, ...]
    """The contents of the turns: user, assistant, ..., user."""
    answers: tuple[str, ...]
    """Right answers, one sentence each, as demonstrations give them."""
    wrong_answers: tuple[str, ...]
    """Plausible wrong answers in the same form."""
    bare_answers: tuple[str, ...] = ()
    """Answers that are right but never demonstrated: the bare word."""
    is_courteous: bool = False
    """True if the answers are courtesies themselves (a greeting, a refusal) and need no other."""
    may_take_prefix: bool = False
    """True if the question reads well after a "Hi!"."""
    fact: str | None = None
    """The fact behind an answer, as plain text for pretraining."""
    quoted_keys: tuple[str, ...] = ()
    """Keys of other tasks whose question or answer the earlier turns repeat."""

    @property
    def is_held_out(self) -> bool:
        """Return whether this key belongs to the evaluation, which is the same in every run."""
        return is_held_out_key(self.key)

    @property
    def is_trainable(self) -> bool:
        """Return whether neither this key nor one that its earlier turns reveal is held out."""
        return not any(map(is_held_out_key, (self.key, *self.quoted_keys)))

    def messages(self, prefix: str = "") -> list[Message]:
        """Return the prompt as chat messages, the first one opened with `prefix`."""
        turns = (prefix + self.turns[0], *self.turns[1:])
        return [message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]


def is_held_out_key(key: str) -> bool:
    """Return whether a key is held out, by a hash of the key alone: alike for every seed and every version."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT
